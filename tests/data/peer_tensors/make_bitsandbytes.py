"""Writes bitsandbytes.npz: weights as bitsandbytes 0.50.2 packs them and as it dequantizes them, in float32.

    pip install torch==2.14.1 bitsandbytes==0.50.2 numpy && python make_bitsandbytes.py

nf4 and fp4, with and without double quantization, in blocks of 64 and 128; N * K / 64 is no multiple of the 256 blocks
that share a nested scale, and one K is no multiple of 64, so that blocks run over the ends of rows. int8 with rows of
zeros, outlier values and an outlier row. Names are those of transformers' files, after "<case>/".
"""

from __future__ import annotations

from pathlib import Path

import bitsandbytes.functional as bnb
import numpy as np
import torch

#: name -> shape, block
SHAPES = {"plain": ((40, 512), 64), "block128": ((8, 256), 128), "over_rows": ((8, 96), 64)}
found: dict[str, np.ndarray] = {}


def matrix(n: int, k: int) -> torch.Tensor:
    torch.manual_seed(n)
    w = torch.randn(n, k) * torch.rand(n, 1) * 0.1
    w[1] = 0
    w[2, 3], w[3] = 12.0, w[3] * 300  # absmax of blocks between 0 and 100: the nested offset matters
    w[4] *= 1e-6
    return w.to(torch.bfloat16)


def four() -> None:
    for shape_name, ((n, k), block) in SHAPES.items():
        for kind in ("nf4", "fp4"):
            for double in (False, True):
                name = f"{kind}{'-double' if double else ''}/{shape_name}"
                packed, state = bnb.quantize_4bit(matrix(n, k), None, None, block, double, kind)
                for key, tensor in {"weight": packed, **state.as_dict(packed=True)}.items():
                    found[f"{name}/{key if key == 'weight' else f'weight.{key}'}"] = tensor.numpy()
                state.dtype = torch.float32  # of what it gives back: nothing is rounded on top
                found[f"{name}/value"] = bnb.dequantize_4bit(packed, state).numpy()


def eight() -> None:
    w = matrix(24, 128)
    w[5, 7] = 60.0
    codes, rows, _ = bnb.int8_vectorwise_quant(w.half(), threshold=0.0)
    found["int8/weight"], found["int8/SCB"] = codes.numpy(), rows.numpy()
    found["int8/value"] = bnb.int8_vectorwise_dequant(codes, rows).float().numpy()


if __name__ == "__main__":
    four()
    eight()
    path = Path(__file__).with_name("bitsandbytes.npz")
    np.savez_compressed(path, **found)
    print(len(found), "arrays,", path.stat().st_size, "bytes")
