"""Writes torchao.npz: what torchao 0.18.0's own `quantize_` makes of one bf16 weight, and of inputs, for every config.

    pip install torch==2.14.1 torchao==0.18.0 numpy && python make_torchao.py FBGEMM

The weight has values halfway between two codes, zeros, a row and groups of zeros, and outliers. Kept by config are the
tensors that torchao's safetensors support writes, the config as transformers stores it, and the weight by torchao's own
dequantization in float32. Two of torchao's kernels need a GPU, which is got around without touching the arithmetic:

- int4wo as SGLang has it (tinygemm): the last step, which shuffles the codes for a kernel, hands them back as they are.
- int4wo in the plain packing calls mslk, which is built for GPUs alone: the three functions that it needs are pure
  torch and are read from FBGEMM, where mslk has them from (a checkout of github.com/pytorch/FBGEMM, quantize.py).
"""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torchao.core.config import config_to_dict
from torchao.prototype.gptq.api import _int4_row_dequantize_zp
from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
from torchao.quantization import (
    Float8DynamicActivationFloat8WeightConfig,
    Float8WeightOnlyConfig,
    Int4WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    PerRow,
    PerTensor,
    quant_api,
    quantize_,
)
from torchao.quantization.quantize_.common.quantize_tensor_kwargs import _choose_quant_func_and_quantize_tensor
from torchao.quantization.quantize_.workflows.int4 import int4_tensor

N, K = 16, 768
GROUPS = (32, 64, 128, 256)
CONFIGS = {
    "int8wo": Int8WeightOnlyConfig(),
    "int8wo-per_tensor": Int8WeightOnlyConfig(granularity=PerTensor()),
    "int8dq": Int8DynamicActivationInt8WeightConfig(),
    "fp8wo": Float8WeightOnlyConfig(),
    "fp8wo-per_tensor": Float8WeightOnlyConfig(granularity=PerTensor()),
    "fp8dq-per_tensor": Float8DynamicActivationFloat8WeightConfig(granularity=PerTensor()),
    "fp8dq-per_row": Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()),
}
found: dict[str, np.ndarray] = {}


def keep(name: str, tensor: torch.Tensor) -> None:
    """bfloat16 as float32 (exact), float8 as its bytes."""
    tensor = tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor
    found[name] = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).detach().numpy()


def keep_text(name: str, value: object) -> None:
    found[name] = np.frombuffer(json.dumps(value).encode(), np.uint8)


def matrix(rows: int, seed: int) -> torch.Tensor:
    """bf16 [rows, K]: rows of very different size, a row of zeros, outliers, and exact ties of every grid in use."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, K, generator=generator) * torch.rand(rows, 1, generator=generator) * 0.1
    w[1] = 0
    w[2, :256] = 0
    w[3] = 0.25  # one value: max - min is 0
    w[4, 17], w[4, 300] = 30.0, -41.0  # outliers
    w[5] = (torch.arange(K) % 255 - 127) / 2  # absmax 63.5: codes of int8 at halves of the step and nearly so
    w[5, 0] = -63.75  # -127.5 of a step of 0.5: every odd multiple of 1/4 below is a tie
    w[6] = ((torch.arange(K) * 7) % 511 - 255) / 4
    w[7] = ((torch.arange(K) * 5) % 31) / 2 - 4  # groups of 15 steps from -4 to 11: every other value is halfway
    w[8] = ((torch.arange(K) * 3) % 1793 - 896) / 2  # absmax 448: ties of float8 e4m3
    w[9] *= 1e-30  # int8's least scale; int4's as well
    return w.to(torch.bfloat16)


def quantized(weight: torch.Tensor, config: object) -> torch.Tensor:
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=torch.bfloat16)
    linear.weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
    quantize_(linear, config)
    return linear.weight


def serialized(name: str, weight: torch.Tensor, config: object) -> None:
    tensors, metadata = flatten_tensor_state_dict({"m.weight": weight})
    for key, tensor in tensors.items():
        keep(f"{name}/{key.removeprefix('m.')}", tensor)
    found[f"{name}/class"] = np.frombuffer(str(metadata["m.weight"]).encode(), np.uint8)
    keep_text(f"{name}/config", config_to_dict(config))


def mslk_functions(checkout: Path) -> dict[str, object]:
    """int4_row_quantize_zp and pack_int4 as FBGEMM has them, without the imports around."""
    source = next(checkout.rglob("gen_ai/quantize.py")).read_text()
    wanted = ("int4_row_quantize_zp", "pack_int4")
    body = [x for x in ast.parse(source).body if isinstance(x, ast.FunctionDef) and x.name in wanted]
    space: dict[str, object] = {"torch": torch}
    exec(compile(ast.Module(body, []), "quantize.py", "exec"), space)
    return {name: space[name] for name in wanted}


def tinygemm(weight: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(codes uint8 [N, K], scale, zero point [N, K / group]) of torchao's quantize_ in the tinygemm packing."""
    taken: list[torch.Tensor] = []

    def unshuffled(packed: torch.Tensor, inner: int) -> torch.Tensor:
        taken.append(packed)
        return packed

    config = Int4WeightOnlyConfig(group_size=group, int4_packing_format="tile_packed_to_4d")
    with (
        mock.patch.object(torch.cuda, "get_device_capability", lambda: (9, 0)),
        mock.patch.object(torch.ops.aten, "_convert_weight_to_int4pack", unshuffled),
    ):
        both = quantized(weight, config).scale_and_zero  # [K' / group, N, 2]
    (packed,) = taken
    codes = torch.stack([packed >> 4, packed & 15], -1).reshape(packed.shape[0], -1)[:N, :K]
    scale, zero = (both[: K // group, :N, i].t().contiguous() for i in (0, 1))
    return codes, scale, zero


def main() -> None:
    weight = matrix(N, 0)
    keep("weight", weight)
    quant_api._check_hardware_support = lambda granularity: None
    for name, config in CONFIGS.items():
        tensor = quantized(weight, config)
        serialized(name, tensor, config)
        if name not in ("int8dq", "fp8dq-per_tensor", "fp8dq-per_row"):  # those have weights of the others
            keep(f"{name}/value", tensor.dequantize(torch.float32))
        if tensor.act_quant_kwargs is not None:
            for dtype in (torch.bfloat16, torch.float32):
                x = matrix(12, 1).to(dtype)
                rows = _choose_quant_func_and_quantize_tensor(x, tensor.act_quant_kwargs)
                kind = str(dtype).removeprefix("torch.")
                keep("input", x)
                keep(f"{name}/{kind}/codes", rows.qdata)
                keep(f"{name}/{kind}/scale", rows.scale)
    for name, function in mslk_functions(Path(sys.argv[1])).items():
        setattr(int4_tensor, name, function)
    for group in GROUPS:
        codes, scale, zero = tinygemm(weight, group)
        keep(f"int4wo-{group}/codes", codes)
        keep(f"int4wo-{group}/scale", scale)
        keep(f"int4wo-{group}/zero", zero)
        config = Int4WeightOnlyConfig(group_size=group)
        tensor = quantized(weight, config)
        name = f"int4wo-{group}-plain"
        serialized(name, tensor, config)
        signed = torch.stack([tensor.qdata << 4 >> 4, tensor.qdata >> 4], -1).reshape(N, K)
        zeros, scales = tensor.zero_point.float(), tensor.scale.float()
        keep(f"{name}/value", _int4_row_dequantize_zp(signed, scales, zeros, group))
    left = quantized(weight[:, :320].contiguous(), Int4WeightOnlyConfig(group_size=256))
    assert type(left.data) is torch.Tensor, "torchao leaves a Linear whose group does not divide K"
    path = Path(__file__).with_name("torchao.npz")
    np.savez_compressed(path, **found)
    print(len(found), "arrays,", path.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
