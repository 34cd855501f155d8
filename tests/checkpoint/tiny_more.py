"""Makers, as in `tiny`, for blocks of fp8, bitsandbytes, torchao and Marlin's layout: loops from the formats' words."""

from __future__ import annotations

import json
from typing import Any

import ml_dtypes
import numpy as np

from tests.checkpoint.tiny import Maker, Tensors, dense

NF4 = [-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.091050036, 0.0]
NF4 += [0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0]
FP4 = [0.0, 1 / 192, 2 / 3, 1.0, 1 / 3, 1 / 2, 1 / 6, 1 / 4]
TABLES = {"nf4": np.array(NF4, np.float32), "fp4": np.array(FP4 + [-v for v in FP4], np.float32)}


def blocks(name: str = "weight_scale_inv", dtype: Any = np.float32) -> Maker:
    """float8 with a scale for each 128x128 block, the last ones partial."""

    def make(rng: np.random.Generator, n: int, k: int) -> tuple[Tensors, np.ndarray]:
        q = rng.normal(0, 100, (n, k)).clip(-448, 448).astype(ml_dtypes.float8_e4m3fn)
        exponent = rng.integers(-12, -8, (-(-n // 128), -(-k // 128)))
        s = (2.0**exponent * (1 if dtype == ml_dtypes.float8_e8m0fnu else 1.25)).astype(dtype)
        wide = np.array(
            [[float(s[i // 128, j // 128]) for j in range(k)] for i in range(n)], np.float32
        )  # n // 128, whatever the grid
        return {"weight": q, name: s}, q.astype(np.float32) * wide

    return make


def bnb4(kind: str = "nf4", double: bool = False) -> Maker:
    def make(rng: np.random.Generator, n: int, k: int) -> tuple[Tensors, np.ndarray]:
        codes = rng.integers(0, 16, (n, k)).astype(np.uint8)
        flat = codes.reshape(-1)
        blocks_ = n * k // 64
        state: dict[str, Any] = {"quant_type": kind, "blocksize": 64, "dtype": "bfloat16", "shape": [n, k]}
        tensors: Tensors = {"weight": ((flat[0::2] << 4) | flat[1::2]).reshape(-1, 1)}
        absmax = rng.uniform(0.05, 0.2, blocks_).astype(np.float32)
        tensors["weight.absmax"] = absmax
        if double:
            table = np.linspace(-1, 1, 256).astype(np.float32)
            small, large = rng.integers(0, 256, blocks_).astype(np.uint8), np.full(-(-blocks_ // 256), 0.04, np.float32)
            absmax = np.array([table[v] * large[i // 256] + np.float32(0.1) for i, v in enumerate(small)], np.float32)
            tensors |= {"weight.absmax": small, "weight.nested_absmax": large, "weight.nested_quant_map": table}
            state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.1}
        tensors["weight.quant_map"] = TABLES[kind]
        tensors[f"weight.quant_state.bitsandbytes__{kind}"] = np.frombuffer(json.dumps(state).encode(), np.uint8)
        value = TABLES[kind][flat] * absmax.repeat(64)
        return tensors, value.reshape(n, k)

    return make


def bnb8(rng: np.random.Generator, n: int, k: int) -> tuple[Tensors, np.ndarray]:
    q, row = rng.integers(-127, 128, (n, k)).astype(np.int8), rng.uniform(0.05, 0.2, n).astype(np.float32)
    tensors = {"weight": q, "SCB": row, "weight_format": np.zeros((), np.uint8)}
    return tensors, q.astype(np.float32) * (row * np.float32(1 / 127))[:, None]


def torchao8(kind: str = "int8", tensor: bool = False) -> Maker:
    def make(rng: np.random.Generator, n: int, k: int) -> tuple[Tensors, np.ndarray]:
        q: np.ndarray = rng.integers(-128, 128, (n, k)).astype(np.int8)
        if kind == "fp8":
            q = rng.normal(0, 100, (n, k)).clip(-448, 448).astype(ml_dtypes.float8_e4m3fn)
        s = rng.uniform(1e-4, 1e-3, (1, 1) if tensor else (n, 1)).astype(np.float32)
        tensors = {"_weight_qdata": q, "_weight_scale": s}
        if kind == "int8":
            tensors["_weight_zero_point"] = np.zeros(s.shape, np.int8)
        return tensors, q.astype(np.float32) * s

    return make


def torchao4(group: int = 64) -> Maker:
    """Signed nibbles, the low one first; W = q * scale + zero; scales [G, N]. A K that no group fits stays dense."""

    def make(rng: np.random.Generator, n: int, k: int) -> tuple[Tensors, np.ndarray]:
        if k % group:
            return dense(rng, n, k)
        q = rng.integers(-8, 8, (n, k))
        s, z = (rng.uniform(0.001, 0.02, (k // group, n)).astype(ml_dtypes.bfloat16) for _ in range(2))
        nibbles = (q & 15).astype(np.uint8)
        packed = (nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)).view(np.int8)
        wide = [x.astype(np.float32).T.repeat(group, 1) for x in (s, z)]
        return {"_weight_qdata": packed, "_weight_scale": s, "_weight_zero_point": z}, q * wide[0] + wide[1]

    return make


def marlin(group: int = 128) -> Maker:
    """One word at a time: the eight values of lane i, tile column by tile column."""

    def make(rng: np.random.Generator, n: int, k: int) -> tuple[Tensors, np.ndarray]:
        size = k if group == -1 else group
        q = rng.integers(0, 16, (k, n))
        s = rng.uniform(0.001, 0.02, (k // size, n)).astype(np.float16)
        words = np.zeros((k // 16, n * 2), np.uint64)
        for kt in range(k // 16):
            at = 0
            for four in range(n // 64):
                for lane in range(32):
                    for tile in range(4):
                        column, row = 64 * four + 16 * tile + lane // 4, 16 * kt + 2 * (lane % 4)
                        eight = [q[row + r, column + c] for c in (0, 8) for r in (0, 1, 8, 9)]
                        for nibble, which in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
                            words[kt, at] |= np.uint64(int(eight[which]) << (4 * nibble))
                        at += 1
        order = [i + 8 * j for i in range(8) for j in range(8)]
        if size == k:
            order = [2 * i + j for i in range(4) for j in (0, 1, 8, 9, 16, 17, 24, 25)]
        permuted = s.reshape(-1, len(order))[:, order].reshape(s.shape)
        value = (q - 8).astype(np.float32) * s.astype(np.float32)[np.arange(k) // size]
        return {"B": words.astype(np.uint32).view(np.int32), "s": permuted}, value.T

    return make


def torchao(kind: str, **data: Any) -> dict[str, Any]:
    chosen = {"_type": kind, "_data": data, "_version": 2}
    return {"quant_method": "torchao", "quant_type": {"default": chosen}, "modules_to_not_convert": None}


def bnb(**fields: Any) -> dict[str, Any]:
    return {"quant_method": "bitsandbytes", "llm_int8_skip_modules": None, "bnb_4bit_quant_storage": "uint8", **fields}
