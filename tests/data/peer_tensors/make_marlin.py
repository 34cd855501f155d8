"""Writes marlin.npz: codes and scales, and how the packer of IST-DASLab's marlin lays them out.

    pip install torch==2.14.1 numpy && python make_marlin.py MARLIN   (a checkout of github.com/IST-DASLab/marlin)

Its `Layer.pack` takes the weight already rounded to the grid; groups of 128, and one group.
"""

from __future__ import annotations

import sys
import types
from pathlib import Path

import numpy as np
import torch


def main() -> None:
    sys.modules["marlin_cuda"] = types.ModuleType("marlin_cuda")  # the kernel; packing does without
    sys.path.insert(0, sys.argv[1])
    import marlin

    found = {}
    rng = np.random.default_rng(0)
    for group in (128, -1):
        n, k = 256, 128 if group == -1 else 256
        size = k if group == -1 else group
        codes = rng.integers(0, 16, (n, k), dtype=np.uint8)
        scale = rng.uniform(1e-3, 2e-2, (n, k // size)).astype(np.float16)
        value = (codes.astype(np.float32) - 8) * scale.astype(np.float32).repeat(size, 1)
        linear = torch.nn.Linear(k, n, bias=False, dtype=torch.half)
        linear.weight.data = torch.from_numpy(value).half()
        layer = marlin.Layer(k, n, groupsize=group)
        layer.pack(linear, torch.from_numpy(scale))
        name = f"group{group}"
        found |= {f"{name}/codes": codes, f"{name}/scale": scale}
        found |= {f"{name}/B": layer.B.numpy(), f"{name}/s": layer.s.numpy()}
    path = Path(__file__).with_name("marlin.npz")
    np.savez_compressed(path, **found)
    print(len(found), "arrays,", path.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
