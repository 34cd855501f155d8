"""Cases of paged attention shared by tests, bench and tuner, and the pools they run on."""

from __future__ import annotations

import dataclasses
from typing import Any

import ml_dtypes
import numpy as np


@dataclasses.dataclass(frozen=True)
class Case:
    """One problem. `lens` are kv_len of the rows (decode) or (q_start, q_len) of the tiles (prefill)."""

    name: str
    heads: int
    kv_heads: int
    head_dim: int
    page_size: int
    lens: tuple[Any, ...]
    q_tile: int = 0  # 0: decode
    dtype: str = "bfloat16"
    kv_dtype: str = "bfloat16"
    window: int | None = None
    soft_cap: float | None = None
    scaled: bool = False  # per-head k_scale and v_scale


_DECODE = (
    Case("llama8b", 32, 8, 128, 16, (0, 1, 17, 64, 200, 333)),
    Case("page32", 32, 8, 128, 32, (5, 0, 257, 96)),
    Case("page64", 8, 2, 128, 64, (64, 65, 63, 1, 300)),
    Case("mha", 4, 4, 64, 16, (33, 128)),
    Case("mqa", 8, 1, 96, 16, (40, 7)),
    Case("head256", 8, 4, 256, 16, (50, 129)),
    Case("gqa7", 28, 4, 128, 16, (77, 1, 160)),
    Case("window", 8, 2, 128, 16, (10, 64, 65, 300), window=64),
    Case("window1", 4, 2, 64, 16, (10, 33), window=1),
    Case("softcap", 8, 2, 128, 16, (10, 300), soft_cap=20.0),
    Case("fp8", 32, 8, 128, 16, (0, 16, 250), kv_dtype="float8_e4m3fn", scaled=True),
    Case("fp8_page64", 8, 2, 128, 64, (100, 250), kv_dtype="float8_e4m3fn", scaled=True, window=70),
    Case("f32", 4, 2, 64, 16, (3, 70), dtype="float32", kv_dtype="float32"),
    Case("f16", 4, 2, 64, 16, (3, 70), dtype="float16", kv_dtype="float16"),
)
_PREFILL = (
    Case("one_tile", 8, 2, 128, 16, ((0, 128),), q_tile=128),
    Case("chunks", 8, 2, 128, 16, ((0, 128), (128, 128), (256, 37), (0, 0), (77, 128)), q_tile=128),
    # Chunks that start at, before and far behind the edges of blocks of 128, 160 and 176 keys, some of them unmasked.
    Case("edges", 2, 1, 128, 16, ((352, 128), (479, 40), (700, 20)), q_tile=128),
    Case("page64", 8, 2, 128, 64, ((0, 128), (130, 100)), q_tile=128),
    Case("mha64", 4, 4, 64, 32, ((0, 64), (64, 64), (0, 1)), q_tile=128),
    Case("head256", 4, 2, 256, 16, ((0, 128), (128, 60)), q_tile=128),
    Case("window", 8, 2, 128, 16, ((0, 128), (128, 128), (300, 5)), q_tile=128, window=96),
    Case("softcap", 8, 2, 128, 16, ((0, 128), (90, 128)), q_tile=128, soft_cap=15.0),
    Case("fp8", 8, 2, 128, 32, ((0, 128), (128, 70)), q_tile=128, kv_dtype="float8_e4m3fn", scaled=True),
    Case("tq16", 8, 2, 128, 16, ((0, 16), (16, 9), (40, 16)), q_tile=16),
    Case("f32", 4, 2, 64, 16, ((0, 16), (20, 12)), q_tile=16, dtype="float32", kv_dtype="float32"),
)
DECODE_CASES = {c.name: c for c in _DECODE}
PREFILL_CASES = {c.name: c for c in _PREFILL}


def make(case: Case, seed: int = 0, *, poison: bool = True) -> dict[str, np.ndarray]:
    """Arrays of a case: q, k_pages, v_pages, page_table, the lengths and scales; and dense k, v per row (float32).

    Pages are handed out in random order; with `poison`, whatever no row owns (the trash page, the tail of a last
    page, table entries past the end) is NaN or names a NaN page.
    """
    rng = np.random.default_rng(seed)
    rows = len(case.lens)
    lens = np.array([sum(x) if case.q_tile else x for x in case.lens])
    ps = case.page_size
    pages_max = max(1, -(-int(lens.max()) // ps)) + 2
    owned = int(sum(-(-n // ps) for n in lens))
    pool = owned + 3
    kv_type = np.dtype(getattr(ml_dtypes, case.kv_dtype, None) or case.kv_dtype)
    q_type = np.dtype(getattr(ml_dtypes, case.dtype, None) or case.dtype)
    shape = (pool, case.kv_heads, ps, case.head_dim)
    fill = np.nan if poison else 0.0
    k_pages, v_pages = np.full(shape, fill, np.float32), np.full(shape, fill, np.float32)
    free = list(rng.permutation(np.arange(1, owned + 1)))
    table = np.where(rng.random((rows, pages_max)) < 0.5, 0, pool - 1).astype(np.int32)
    dense = []
    for r, n in enumerate(lens):
        kv = rng.standard_normal((2, case.kv_heads, n, case.head_dim)).astype(np.float32)
        kv = kv.astype(kv_type).astype(np.float32)
        dense.append(kv)
        for i in range(0, n, ps):
            page = free.pop()
            table[r, i // ps] = page
            k_pages[page, :, : min(ps, n - i)] = kv[0, :, i : i + ps]
            v_pages[page, :, : min(ps, n - i)] = kv[1, :, i : i + ps]
    q_shape = (rows, case.q_tile, case.heads, case.head_dim) if case.q_tile else (rows, case.heads, case.head_dim)
    out: dict[str, Any] = {
        "q": (2 * rng.standard_normal(q_shape).astype(np.float32)).astype(q_type),
        "k_pages": k_pages.astype(kv_type),
        "v_pages": v_pages.astype(kv_type),
        "page_table": table,
        "lens": np.array(case.lens, np.int32),
        "dense": dense,
        "k_scale": None,
        "v_scale": None,
    }
    if case.scaled:
        out["k_scale"] = rng.uniform(0.2, 1.5, case.kv_heads).astype(np.float32)
        out["v_scale"] = rng.uniform(0.2, 1.5, case.kv_heads).astype(np.float32)
    return out


def dense_attention(case: Case, data: dict[str, Any], sm_scale: float) -> np.ndarray:
    """The same in float64 numpy, one row and one query at a time, without pages."""
    q = data["q"].astype(np.float64)
    out = np.zeros(q.shape, np.float64)
    group = case.heads // case.kv_heads
    k_scale = np.ones(case.kv_heads) if data["k_scale"] is None else data["k_scale"]
    v_scale = np.ones(case.kv_heads) if data["v_scale"] is None else data["v_scale"]
    for r, (k, v) in enumerate(x.astype(np.float64) for x in data["dense"]):
        entry = case.lens[r]
        start, count = entry if case.q_tile else (entry - 1, int(entry > 0))
        for i in range(count):
            end = start + i + 1
            begin = 0 if case.window is None else max(0, end - case.window)
            for h in range(case.heads):
                g = h // group
                row = q[r, i, h] if case.q_tile else q[r, h]
                s = k[g, begin:end] @ row * sm_scale * k_scale[g]
                if case.soft_cap is not None:
                    s = case.soft_cap * np.tanh(s / case.soft_cap)
                w = np.exp(s - s.max())
                o = (w / w.sum()) @ v[g, begin:end] * v_scale[g]
                if case.q_tile:
                    out[r, i, h] = o
                else:
                    out[r, h] = o
    return out
