"""Paged attention: the XLA reference against dense numpy; the kernels are held to the reference in the same table."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels.paged_attention import (
    decode_attention,
    decode_warp,
    mosaic_decode_sm90,
    prefill_attention,
    reference,
    write_kv,
)
from pallas_kernels.paged_attention.cases import DECODE_CASES, PREFILL_CASES, Case, dense_attention, make
from pallas_kernels.paged_attention.config import DecodeConfig, decode_heuristic
from pallas_kernels.paged_attention.simt_numpy import Numpy, _lanes
from tests.pallas_kernels.aot import compile_for_h200

# The reference works in float32 and rounds once, to q's dtype: half an ulp of the output plus ~S * 2^-24.
ROUNDING = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 5e-6}


@functools.cache
def compiled(op: Any, chunk_bytes: int, **static: Any) -> Any:
    """The op as one XLA program (op by op it would be forty); `chunk_bytes` is what the reference was traced with.

    Compiled without LLVM's optimizations, which cost more here than they save: 11 CPU seconds for all cases, not 16.
    """
    return jax.jit(functools.partial(op, **static), compiler_options={"xla_backend_optimization_level": 0})


def run(case: Case, data: dict, implementation: str | None = None) -> np.ndarray:
    """The op on a case, as float32 numpy."""
    static = dict(
        sm_scale=case.head_dim**-0.5, window=case.window, soft_cap=case.soft_cap, implementation=implementation
    )
    lens = (data["lens"][:, 0], data["lens"][:, 1]) if case.q_tile else (data["lens"],)
    op = compiled(prefill_attention if case.q_tile else decode_attention, reference._CHUNK_BYTES, **static)
    arrays = (data[name] for name in ("q", "k_pages", "v_pages", "page_table"))
    return np.asarray(op(*arrays, *lens, k_scale=data["k_scale"], v_scale=data["v_scale"]).astype(jnp.float32))


@pytest.mark.parametrize(
    "case", [*DECODE_CASES.values(), *PREFILL_CASES.values()], ids=lambda c: f"{c.name}-{c.q_tile}"
)
def test_reference_matches_dense(case):
    data = make(case)
    out = run(case, data, "xla")
    assert np.isfinite(out).all()  # every unused slot of the pool is NaN
    want = dense_attention(case, data, case.head_dim**-0.5)
    np.testing.assert_allclose(out, want, rtol=ROUNDING[case.dtype], atol=1e-5)


def test_padding_rows_are_zero():
    case = DECODE_CASES["llama8b"]
    assert (run(case, make(case), "xla")[0] == 0).all()
    case = PREFILL_CASES["chunks"]
    out = run(case, make(case), "xla")
    assert (out[2, 37:] == 0).all() and (out[3] == 0).all()


def test_a_row_does_not_depend_on_its_neighbours():
    case = DECODE_CASES["llama8b"]
    data = make(case)
    alone = {**data, "q": data["q"][4:5], "page_table": data["page_table"][4:5], "lens": data["lens"][4:5]}
    np.testing.assert_array_equal(run(case, alone, "xla")[0], run(case, data, "xla")[4])


def test_nan_of_one_row_stays_there():
    case = DECODE_CASES["llama8b"]
    data = make(case)
    want = run(case, data, "xla")
    data["v_pages"][data["page_table"][4, 0], :, 0, 0] = np.nan
    out = run(case, data, "xla")
    assert np.isnan(out[4, :, 0]).all()
    np.testing.assert_array_equal(np.delete(out, 4, 0), np.delete(want, 4, 0))


def test_chunked_map_gives_the_same(monkeypatch):
    for case in (DECODE_CASES["llama8b"], PREFILL_CASES["chunks"]):
        data = make(case)
        want = run(case, data, "xla")
        monkeypatch.setattr(reference, "_CHUNK_BYTES", 2 * 2**20)
        np.testing.assert_allclose(run(case, data, "xla"), want, rtol=2.0**-7, atol=1e-5)
        monkeypatch.undo()


def test_prefill_of_one_query_is_decode():
    case = DECODE_CASES["softcap"]
    data = make(case)
    lens = data["lens"]
    args = [data[n] for n in ("k_pages", "v_pages", "page_table")]
    static = dict(sm_scale=0.1, soft_cap=20.0, implementation="xla")
    prefill, decode = (compiled(op, reference._CHUNK_BYTES, **static) for op in (prefill_attention, decode_attention))
    one = prefill(data["q"][:, None], *args, lens - 1, np.ones_like(lens))[:, 0]
    np.testing.assert_array_equal(one, decode(data["q"], *args, lens))


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "float8_e4m3fn"])
def test_write_kv(kv_dtype):
    rng = np.random.default_rng(0)
    pages = jnp.asarray(rng.standard_normal((5, 2, 16, 64)), kv_dtype)
    k, v = rng.standard_normal((2, 6, 2, 64)).astype(np.float32)
    k[0, 0, 0] = 1e6  # clamps in fp8
    slots = np.array([17, 79, 48, 5, 33, 5], np.int32)  # 5 twice: padding, in the trash page
    k_scale = np.array([0.5, 2.0], np.float32) if kv_dtype != "bfloat16" else None
    new_k, new_v = jax.jit(write_kv)(pages, pages, jnp.asarray(k), jnp.asarray(v), jnp.asarray(slots), k_scale=k_scale)
    want_k, want_v = np.array(pages, np.float32), np.array(pages, np.float32)
    for t, slot in enumerate(slots):
        stored = k[t] / k_scale[:, None] if k_scale is not None else k[t]
        if kv_dtype != "bfloat16":
            stored = np.clip(stored, -448, 448)
        want_k[slot // 16, :, slot % 16] = np.asarray(jnp.asarray(stored, kv_dtype), np.float32)
        want_v[slot // 16, :, slot % 16] = np.asarray(jnp.asarray(v[t], kv_dtype), np.float32)
    np.testing.assert_array_equal(np.asarray(new_k, np.float32)[1:], want_k[1:])
    np.testing.assert_array_equal(np.asarray(new_v, np.float32)[1:], want_v[1:])
    assert np.isfinite(np.asarray(new_k, np.float32)).all()


def test_write_kv_is_in_place_and_does_not_transpose_the_pool():
    pool = jax.ShapeDtypeStruct((64, 8, 16, 128), jnp.bfloat16)
    kv = jax.ShapeDtypeStruct((4, 8, 128), jnp.bfloat16)
    slots = jax.ShapeDtypeStruct((4,), jnp.int32)
    compiled = jax.jit(write_kv, donate_argnums=(0, 1)).lower(pool, pool, kv, kv, slots).compile()
    assert compiled.memory_analysis().alias_size_in_bytes >= 2 * 64 * 8 * 16 * 128 * 2
    assert "transpose(" not in compiled.as_text()


def test_errors():
    pages = jnp.zeros((4, 2, 16, 64), jnp.bfloat16)
    q, table, lens = jnp.zeros((3, 4, 64), jnp.bfloat16), jnp.zeros((3, 2), jnp.int32), jnp.zeros(3, jnp.int32)
    for bad, message in (
        (dict(q=q[:, :3]), "no multiple of 2"),
        (dict(q=q[..., :32]), "head dim 32"),
        (dict(page_table=table[:2]), "page_table"),
        (dict(kv_len=lens[:2]), "kv_len"),
        (dict(v_pages=pages[:, :1]), "k_pages and v_pages"),
        (dict(window=0), "window"),
        (dict(soft_cap=0.0), "soft_cap"),
        (dict(k_scale=jnp.ones(3)), "k_scale"),
        (dict(implementation="none"), "no implementation"),
    ):
        args = dict(q=q, k_pages=pages, v_pages=pages, page_table=table, kv_len=lens, sm_scale=1.0) | bad
        with pytest.raises(ValueError, match=message):
            decode_attention(**args)


def test_empty_batch():
    pages = jnp.zeros((4, 2, 16, 64), jnp.bfloat16)
    out = decode_attention(
        jnp.zeros((0, 4, 64), jnp.bfloat16), pages, pages, jnp.zeros((0, 2), jnp.int32), jnp.zeros(0, jnp.int32),
        sm_scale=1.0, implementation="xla",
    )  # fmt: skip
    assert out.shape == (0, 4, 64)


# The decode kernel's warp program, executed lane by lane in numpy (its instructions are beyond Mosaic's interpreter).
# Weights are rounded to 16 bits before they multiply the values: half an ulp of bf16 (2^-9) or f16 of the output's
# scale, then the output's own rounding.
EMULATED = {
    "mha": DecodeConfig(4, 2, 1),
    "mqa": DecodeConfig(4, 3, 2),
    "window": DecodeConfig(4, 3, 2),
    "window1": DecodeConfig(4, 3, 4),
    "softcap": DecodeConfig(8, 2, 1),
    "fp8_page64": DecodeConfig(4, 6, 2),
    "f16": DecodeConfig(4, 3, 1),
}


def emulate_decode(case: Case, data: dict, config: DecodeConfig) -> np.ndarray:
    p = mosaic_decode_sm90.problem(
        data["q"], data["k_pages"], data["page_table"], config, sm_scale=case.head_dim**-0.5, window=case.window,
        soft_cap=case.soft_cap, k_scaled=case.scaled, v_scaled=case.scaled,
    )  # fmt: skip
    out = np.full(data["q"].shape, 99, data["q"].dtype)
    names = ("q", "k_pages", "v_pages", "page_table", "k_scale", "v_scale")
    buffers = {n: data[n] for n in names} | {"kv_len": data["lens"], "out": out}
    lane = _lanes(np.arange(32), np.int64)
    for index in range(len(case.lens) * p.kv_heads * p.parts):
        item = _lanes(index, np.int64)
        shared = [np.full(p.smem_bytes, 0xFF, np.uint8) for _ in range(p.split)]
        warps = [
            (Numpy(buffers, shared, r), _lanes(r, np.int64), _lanes(w, np.int64))
            for r in range(p.split)
            for w in range(p.warps)
        ]
        for ops, rank, warp in warps:
            decode_warp.stream(ops, p, item, rank, warp, lane)
        for ops, _, warp in warps:
            decode_warp.merge_warps(ops, p, item, warp * 32 + lane)
        for ops, rank, warp in warps if p.split > 1 else ():
            decode_warp.merge_cluster(ops, p, item, rank, warp * 32 + lane)
    return out.astype(np.float32)


@pytest.mark.parametrize("name", EMULATED)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # casts of lanes whose row is masked
def test_decode_warp_program(name):
    case = DECODE_CASES[name]
    data = make(case)
    want = dense_attention(case, data, case.head_dim**-0.5)
    got = emulate_decode(case, data, EMULATED[name])
    np.testing.assert_allclose(got, want, atol=2 * ROUNDING[case.dtype] * np.abs(want).max())


@pytest.mark.parametrize("config", [DecodeConfig(4, 2, 1), DecodeConfig(4, 2, 2)], ids=str)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_a_short_ring_still_holds_every_warps_output(config):
    """Two stages of fp8 pages are 256 bytes less than 16 heads' outputs: the tuner may try them, and may have found
    them the fastest for a model of fewer heads, whose measured config is this one's too."""
    case = Case("wide", 16, 1, 128, 16, (70, 200), kv_dtype="float8_e4m3fn", scaled=True)
    data = make(case)
    want = dense_attention(case, data, case.head_dim**-0.5)
    got = emulate_decode(case, data, config)
    np.testing.assert_allclose(got, want, atol=2 * ROUNDING[case.dtype] * np.abs(want).max())


@pytest.mark.parametrize("op", ["decode_attention", "prefill_attention"])
@pytest.mark.parametrize("kv", [jnp.bfloat16, jnp.float8_e4m3fn])
@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 160, 192, 224, 256])
def test_head_dims_of_the_kernels(op, kv, head_dim):
    """As README's "Which kernel runs" has it."""
    S = jax.ShapeDtypeStruct
    pages, table, lens = S((9, 2, 16, head_dim), kv), S((3, 4), jnp.int32), S((3,), jnp.int32)
    decode = op == "decode_attention"
    q = S((3, 8, head_dim) if decode else (3, 128, 8, head_dim), jnp.bfloat16)
    arrays = (q, pages, pages, table, lens) if decode else (q, pages, pages, table, lens, lens)
    choice = pallas_kernels.explain(op, *arrays, sm_scale=0.1, device=pallas_kernels.KNOWN_DEVICES["h200"])
    too_large = not decode and kv == jnp.float8_e4m3fn and head_dim > 224
    assert choice.chosen == ("xla" if too_large else "mosaic_sm90"), choice
    assert not too_large or "shared memory" in choice.refused[0][1]


# registers: two CTAs of 128 threads an SM allow 255; 168 would still allow three.
COMPILED = {
    "bf16": (dict(), dict(), 168),
    "fp8": (dict(kv=jnp.float8_e4m3fn), dict(k_scale=0.5, v_scale=0.5), 168),
    "window_softcap": (dict(), dict(window=512, soft_cap=50.0), 168),
    "head256": (dict(head_dim=256), dict(), 224),
    "split8": (dict(rows=1), dict(), 168),
}


@pytest.mark.parametrize("name", COMPILED)
def test_decode_compiles_for_h200_without_spills(name):
    shape, kwargs, registers = COMPILED[name]
    s = dict(rows=128, heads=32, kv_heads=8, head_dim=128, page=16, kv=jnp.bfloat16) | shape
    S = jax.ShapeDtypeStruct
    pages = S((1000, s["kv_heads"], s["page"], s["head_dim"]), s["kv"])
    args = (
        S((s["rows"], s["heads"], s["head_dim"]), jnp.bfloat16),
        pages,
        pages,
        S((s["rows"], 64), jnp.int32),
        S((s["rows"],), jnp.int32),
    )
    compiled = compile_for_h200(
        lambda *a: decode_attention(*a, sm_scale=0.1, implementation="mosaic_sm90", **kwargs), *args
    )
    steps = s["head_dim"] // 16 * max(1, s["heads"] // s["kv_heads"] // 8)
    assert compiled.spill_bytes == 0 and compiled.stack_bytes == 0
    assert compiled.registers <= registers
    assert compiled.count("mma.sync.aligned") == 2 * steps  # K Q^T and V^T P^T of one tile: the loop is not unrolled
    assert (".reqnctapercluster 8" in compiled.ptx) == (name == "split8")


def test_decode_kernel_says_what_it_does_not_take():
    case = DECODE_CASES["f32"]
    data = {k: jnp.asarray(v) if isinstance(v, np.ndarray) else v for k, v in make(case).items()}
    args = (data["q"], data["k_pages"], data["v_pages"], data["page_table"], data["lens"])
    choice = pallas_kernels.explain(
        "decode_attention", *args, sm_scale=1.0, device=pallas_kernels.KNOWN_DEVICES["h200"]
    )
    assert choice.chosen == "xla" and "float32" in choice.refused[0][1]
    choice = pallas_kernels.explain(
        "decode_attention", *args, sm_scale=1.0, device=pallas_kernels.KNOWN_DEVICES["a100"]
    )
    assert choice.chosen == "xla" and "Hopper" in choice.refused[0][1]


@pytest.mark.parametrize("items", [1, 8, 64, 100, 128, 512, 4096])
@pytest.mark.parametrize("row_bytes", [64, 128, 192, 256, 512])
def test_decode_heuristic_fits(items, row_bytes):
    for tokens in (16, 1024, 8192, 131072):
        config = decode_heuristic(items, tokens, row_bytes, 132)
        assert config.warps * config.stages * 32 * (-(-row_bytes // 128) * 128) <= 200 * 1024
        assert config.stages >= 2 and config.split in (1, 2, 4, 8)


# 240 registers a consumer thread (setmaxnreg); ptxas reports the launch's 168 for all three warpgroups. What spills are
# registers of the list of items, outside the loops over blocks (the report names each up to four times).
PREFILL_COMPILED = {
    "head128": (dict(), dict(), 0),
    "head256": (dict(head_dim=256), dict(), 0),
    "window": (dict(), dict(window=96), 0),
    "fp8": (dict(kv=jnp.float8_e4m3fn), dict(k_scale=0.5, v_scale=0.5, soft_cap=30.0), 256),
}


@pytest.mark.parametrize("name", PREFILL_COMPILED)
def test_prefill_compiles_for_h200(name):
    shape, kwargs, spill = PREFILL_COMPILED[name]
    s = dict(tiles=4, heads=32, kv_heads=8, head_dim=128, page=16, kv=jnp.bfloat16) | shape
    S = jax.ShapeDtypeStruct
    pages = S((1000, s["kv_heads"], s["page"], s["head_dim"]), s["kv"])
    q = S((s["tiles"], 128, s["heads"], s["head_dim"]), jnp.bfloat16)
    ints = [S((s["tiles"], 64), jnp.int32), S((s["tiles"],), jnp.int32), S((s["tiles"],), jnp.int32)]
    op = lambda *a: prefill_attention(*a, sm_scale=0.1, implementation="mosaic_sm90", **kwargs)  # noqa: E731
    compiled = compile_for_h200(op, q, pages, pages, *ints)
    assert compiled.registers <= 168 and compiled.spill_bytes <= spill
    # first block: Q K^T; one or two loops: Q K^T and P V; last block: P V. 16 of the inner dimension each.
    loops, block = 1 if "window" in kwargs else 2, 64 if s["head_dim"] > 128 else 128
    assert compiled.count("wgmma.mma_async") == (loops + 1) * (s["head_dim"] // 16 + block // 16)
