"""Problems shared by the tests, the bench and the tuner, with their data, answers and error bounds."""

from __future__ import annotations

import dataclasses
from typing import Any

import ml_dtypes
import numpy as np


@dataclasses.dataclass(frozen=True)
class Case:
    """One problem.

    `scales`: "row" (x [M,1], w [N,1]), "tensor" ([1,1] both), "block" (x 1x128, w 128x128), "w block" (x [M,1]) or
    "x block" (w [N,1]).
    """

    m: int
    n: int
    k: int
    qdtype: str = "float8_e4m3fn"
    scales: str = "row"
    bias: bool = False
    out_dtype: str = "bfloat16"


CASES = (
    Case(1, 256, 256),
    Case(1, 256, 256, "int8"),
    Case(16, 256, 512, "int8", bias=True),
    Case(16, 256, 512, bias=True, out_dtype="float32"),
    Case(5, 384, 640, scales="tensor"),
    Case(64, 256, 1024, out_dtype="float16"),
    Case(130, 256, 512),
    Case(130, 256, 512, "int8", scales="tensor"),
    Case(16, 256, 512, scales="block"),
    Case(33, 384, 640, scales="block", bias=True),
    Case(130, 256, 512, scales="block"),
    Case(8, 256, 256, "int8", scales="block"),
    Case(7, 256, 384, scales="w block"),
    Case(8, 256, 512, scales="x block"),
    # Odd shapes: tails in N, K and in the blocks.
    Case(3, 200, 96, "int8"),
    Case(3, 200, 200, scales="block"),
    Case(9, 100, 48),
    Case(0, 256, 256),
)

# Further ones for a GPU: tiles wider than N, chunks of x scales cut short by the end of a tile, rounds of tiles.
DEVICE_CASES = (
    Case(4096, 128, 512),
    Case(300, 200, 256),
    Case(300, 64, 128, "int8"),
    Case(300, 64, 640, scales="block"),
    Case(16, 256, 896, scales="block"),
    Case(512, 4096, 640, scales="block", bias=True),
    Case(700, 1024, 896, scales="block"),
    Case(700, 1024, 896, scales="x block"),
    Case(2, 10240, 1152, "int8"),
    Case(1030, 1536, 2048, bias=True),
)

# (N, K) of one Llama-3.1 layer; the bench's acceptance shapes and, for 70B, its further run.
LLAMA_8B = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
LLAMA_70B = {"qkv": (10240, 8192), "o": (8192, 8192), "gate_up": (57344, 8192), "down": (8192, 28672)}

# Relative to the largest output: one rounding to the output type (2^-9 for bf16, 2^-12 for fp16), or float32 sums.
_OUTPUT_ERROR = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 1e-5}


def make(case: Case, seed: int = 0) -> tuple[Any, ...]:
    """(xq, wq, x_scale, w_scale, bias or None), random; scales over two decades, so that a misplaced one shows."""
    rng = np.random.default_rng(seed)
    dtype = ml_dtypes.float8_e4m3fn if case.qdtype == "float8_e4m3fn" else np.int8

    def values(shape: tuple[int, int]) -> np.ndarray:
        x = rng.normal(size=shape) * (40 if dtype is np.int8 else 100)
        limit = 127 if dtype is np.int8 else 448
        return np.clip(np.round(x) if dtype is np.int8 else x, -limit, limit).astype(dtype)

    def scale(shape: tuple[int, int]) -> np.ndarray:
        return (10.0 ** rng.uniform(-4, -2, size=shape)).astype(np.float32)

    m, n, k = case.m, case.n, case.k
    kb, nb = -(-k // 128), -(-n // 128)
    tensor = case.scales == "tensor"
    x_scale = scale((1, 1) if tensor else (m, kb) if case.scales in ("block", "x block") else (m, 1))
    w_scale = scale((1, 1) if tensor else (nb, kb) if case.scales in ("block", "w block") else (n, 1))
    bias = rng.normal(size=n).astype(np.float32) if case.bias else None
    return values((m, k)), values((n, k)), x_scale, w_scale, bias


def expected(
    xq: np.ndarray, wq: np.ndarray, x_scale: np.ndarray, w_scale: np.ndarray, bias: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The float64 result, and sum |x||w| for error bounds."""
    m, k = xq.shape
    n = wq.shape[0]

    def expand(scale: np.ndarray, rows: int) -> np.ndarray:
        if scale.shape[0] not in (1, rows):
            scale = np.repeat(scale, 128, axis=0)[:rows]
        return scale if scale.shape[1] == 1 else np.repeat(scale, 128, axis=1)[:, :k]

    x = xq.astype(np.float64) * expand(x_scale, m)
    w = wq.astype(np.float64) * expand(w_scale, n)
    y = x @ w.T
    return (y if bias is None else y + bias), np.abs(x) @ np.abs(w).T


def error_bound(case: Case, want: np.ndarray, magnitude: np.ndarray, tensor_cores: bool = False) -> np.ndarray:
    """How far a right result may be from float64's.

    One rounding to the output type; float32 sums of exact products err by well under 1e-5 of sum|x||w|. Hopper's fp8
    sums are shorter: `mosaic_sm90` says by how much, 2^-11 of sum|x||w| covers every promotion interval (the worst of
    1.6 million outputs at K = 2048 was 2^-11.7).
    """
    sums = 2.0**-11 if tensor_cores and case.qdtype == "float8_e4m3fn" else 1e-5
    return _OUTPUT_ERROR[case.out_dtype] * np.abs(want) + sums * magnitude + 1e-6
