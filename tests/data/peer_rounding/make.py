"""Makes rounding.npz: what torchao 0.18.0 and bitsandbytes 0.50.2 make of one small weight. Run where torch is:

pip install torch==2.13.0 torchao==0.18.0 bitsandbytes==0.50.2 numpy && python tests/data/peer_rounding/make.py
"""

from __future__ import annotations

from pathlib import Path

import bitsandbytes.functional as bnb
import numpy as np
import torch
from torchao.quantization.granularity import PerRow, PerTensor
from torchao.quantization.quant_primitives import (
    MappingType,
    _choose_qparams_affine_tinygemm,
    _quantize_affine_tinygemm,
)
from torchao.quantization.quantize_.workflows.float8.float8_tensor import Float8Tensor
from torchao.quantization.quantize_.workflows.int8.int8_tensor import Int8Tensor

N, K = 24, 256
found: dict[str, np.ndarray] = {}


def keep(name: str, tensor: torch.Tensor) -> None:
    """bfloat16 as float32 (exact), float8 as its bytes."""
    if tensor.dtype == torch.float8_e4m3fn:
        tensor = tensor.view(torch.uint8)
    found[name] = (tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor).detach().numpy()


torch.manual_seed(0)
for dtype in (torch.bfloat16, torch.float16, torch.float32):
    w = torch.randn(N, K) * torch.rand(N, 1) * 0.1
    w[3, :64] = 0
    w[5] = 0.25
    w[7, 11] = 3.0
    w = w.to(dtype)
    kind = str(dtype).removeprefix("torch.")
    keep(f"{kind}/weight", w)
    int8 = Int8Tensor.from_hp(w, PerRow())
    keep(f"{kind}/int8/q", int8.qdata)
    keep(f"{kind}/int8/scale", int8.scale)
    for name, granularity in (("row", PerRow()), ("tensor", PerTensor())):
        fp8 = Float8Tensor.from_hp(w, torch.float8_e4m3fn, granularity)
        keep(f"{kind}/fp8_{name}/q", fp8.qdata)
        keep(f"{kind}/fp8_{name}/scale", fp8.scale)
    for group in (32, 128):
        how = {"block_size": (1, group), "quant_min": 0, "quant_max": 15}
        scale, zero = _choose_qparams_affine_tinygemm(
            w,
            MappingType.ASYMMETRIC,
            target_dtype=torch.int32,
            scale_dtype=dtype,
            zero_point_dtype=dtype,
            **how,
        )
        q = _quantize_affine_tinygemm(w, how["block_size"], scale, zero, torch.int32, 0, 15)
        keep(f"{kind}/int4_{group}/q", q.to(torch.uint8))
        keep(f"{kind}/int4_{group}/scale", scale)
        keep(f"{kind}/int4_{group}/zero", zero)
    for name in ("nf4", "fp4"):
        packed, state = bnb.quantize_4bit(w, blocksize=64, quant_type=name)
        keep(f"{kind}/{name}/packed", packed.reshape(N, K // 2))
        keep(f"{kind}/{name}/absmax", state.absmax.reshape(N, K // 64))
        state.dtype = torch.float32
        keep(f"{kind}/{name}/value", bnb.dequantize_4bit(packed, state).reshape(N, K))
np.savez_compressed(Path(__file__).parent / "rounding.npz", **found)
