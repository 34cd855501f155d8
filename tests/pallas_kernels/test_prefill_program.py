"""The prefill kernel's parts in numpy: its pages, who walks over which blocks of keys, how shares are combined."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.paged_attention import (
    mosaic_prefill_sm90,
    prefill_combine,
    prefill_load,
    prefill_softmax,
    prefill_walk,
)
from pallas_kernels.paged_attention.config import PrefillConfig
from pallas_kernels.paged_attention.prefill_problem import Problem
from pallas_kernels.paged_attention.simt_numpy import Numpy, _lanes
from tests.pallas_kernels.aot import compile_for_h200


@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_converted_fp8_pages_lie_where_wgmma_reads(head_dim):
    """A block's 16-byte chunks of fp8, as the converting threads place their two halves, against the swizzle's rule."""
    p = prefill_problem(head_dim)
    block = 32
    out = np.full(block * head_dim * 2, 255, np.uint8)
    ops = Numpy({}, [out], 0)
    for start in range(0, block * head_dim // 16, 32):
        chunk = _lanes(np.arange(32) + start, np.int64)
        first, second, swap = prefill_load.destination(ops, p, chunk)
        for lane in range(32):
            halves = [2 * chunk[lane], 2 * chunk[lane] + 1]  # numbered as 16-byte chunks of float16
            for at, half in zip((first[lane], second[lane]), reversed(halves) if swap[lane] else halves):
                out[at : at + 16] = np.frombuffer(np.int64(half).tobytes() * 2, np.uint8)
        for eight in range(0, 32, 8):  # every eight threads hit 32 different banks
            for at in (first, second):
                assert len(set((at[eight : eight + 8] // 16 % 8).tolist())) == 8 or head_dim % 128
    swizzled = out.view(np.int64)[::2].reshape(block // 8, head_dim // p.columns, 8, p.columns // 8)
    for row in range(block):
        for c in range(head_dim // 8):
            within, tile = c % (p.columns // 8), c // (p.columns // 8)
            mask = row % 8 if p.swizzle == 128 else row % 8 // 2
            assert swizzled[row // 8, tile, row % 8, within ^ mask] == row * (head_dim // 8) + c


def prefill_problem(head_dim: int, **changes) -> Problem:
    given = dict(
        tiles=3, queries=256, heads=8, kv_heads=2, head_dim=head_dim, pages=100, page_size=16, table_width=8,
        sm_scale=1.0, window=None, soft_cap=None, k_scaled=False, v_scaled=False, fp8="e4m3", blocks=5,
        config=PrefillConfig(),
    )  # fmt: skip
    return Problem(**(given | changes))


@pytest.mark.parametrize("blocks", [1, 5, 7, 16, 48])
def test_every_item_has_one_cta(blocks, monkeypatch):
    p = prefill_problem(128, blocks=blocks)
    seen = []
    for cta in range(blocks):
        ops = Numpy({}, [np.zeros(1, np.uint8)], 0)
        monkeypatch.setattr(ops, "special", lambda name, cta=cta, again=False: _lanes(cta, np.int64), raising=False)
        for n in range(int(prefill_walk.items_of_cta(ops, p)[0])):
            seen.append(tuple(int(x[0]) for x in prefill_walk.place(ops, p, _lanes(n, np.int64))))
    assert sorted(seen) == [(t, q, h) for t in range(3) for q in (0, 128) for h in range(8)]


def walk(p: Problem, cta: int, lens: np.ndarray, monkeypatch) -> list[Any]:
    """This CTA's items in order, each with its parts in front: [(item, [(CTA, whether it has blocks)])] as integers."""
    buffers = {"q_start": lens[:, 0].astype(np.int32), "q_len": lens[:, 1].astype(np.int32)}
    ops = Numpy(buffers, [np.zeros(1, np.uint8)], 0)
    monkeypatch.setattr(ops, "special", lambda name, again=False: _lanes(cta, np.int64), raising=False)
    out = []
    for n in range(int(prefill_walk.items_of_cta(ops, p)[0])):
        at = _lanes(n, np.int64)
        item = prefill_walk.item(ops, p, at, *(x.astype(np.int64) for x in prefill_walk.lengths(ops, p, at)))
        parts = [
            tuple(int(x[0]) for x in prefill_walk.part_before(ops, p, item, _lanes(i, np.int64)))
            for i in range(int(item.before[0]))
        ]
        out.append(({f.name: int(getattr(item, f.name)[0]) for f in dataclasses.fields(item)}, parts))
    return out


@pytest.mark.parametrize("blocks", [5, 7, 31, 47, 132])
def test_split_round_shares_every_block_once(blocks, monkeypatch):
    """48 items of 0 to 9 blocks: each block of each item in one part, parts in the order of the CTAs, one that ends."""
    p = prefill_problem(128, blocks=blocks, config=PrefillConfig(split_last=True))
    lens = np.array([(0, 256), (900, 200), (50, 0)])
    told: dict[Any, list[Any]] = {}
    for cta in range(blocks):
        entries = walk(p, cta, lens, monkeypatch)
        assert sum(not item["ends"] for item, _ in entries) <= 1  # one place for a part
        assert [item["ends"] for item, _ in entries[p.items // blocks :]] in ([0], [1], [0, 1])  # tells, then waits
        for item, parts in entries:
            told.setdefault((item["tile"], item["first"], item["head"]), []).append((cta, item, parts))
    assert len(told) == p.items
    for (tile, first, _), entries in told.items():
        live = min(max(lens[tile, 1] - first, 0), 128)
        total = -(-(lens[tile, 0] + first + live) // 128) if live else 0
        covered = [b for _, item, _ in entries for b in range(item["first_block"], item["first_block"] + item["count"])]
        assert covered == list(range(total))
        *others, (last, item, parts) = entries
        assert item["ends"] and not any(other["ends"] for _, other, _ in others)
        assert item["count"] >= min(total, 1)  # who stores has a block, if there is one
        assert parts == [(cta, other["count"] > 0) for cta, other, _ in others]
        assert [cta for cta, _ in parts] == list(range(last - len(parts), last))


@pytest.mark.parametrize("kind", ["full", "causal"])
def test_split_round_is_even(kind, monkeypatch):
    """The acceptance shape: 1,024 items of 32 blocks over 132 CTAs, 7 rounds and 24 or 25 blocks, not 8."""
    changes = dict(tiles=32, queries=128, heads=32, kv_heads=8, table_width=256, fp8=None, blocks=132)
    p = prefill_problem(128, **changes, config=PrefillConfig(split_last=True))
    lens = np.array([(128 * t if kind == "causal" else 4096 - 128, 128) for t in range(32)])
    counts = [sum(item["count"] for item, _ in walk(p, cta, lens, monkeypatch)) for cta in range(0, 132, 7)]
    assert set(counts) <= {7 * 32 + 24, 7 * 32 + 25} if kind == "full" else {127, 128, 129}


def test_combined_parts_give_the_softmax_of_all():
    """Parts as consumers tell them, one without a visible key for some rows, through `factors`."""
    rng = np.random.default_rng(0)
    ops = Numpy({}, [np.zeros(1, np.uint8)], 0)
    s, v = 30 * rng.standard_normal((32, 96)).astype(np.float32), rng.standard_normal((96, 4))
    s[::3, 32:64] = -np.inf
    states = []
    for at in (0, 32, 64):
        part = s[:, at : at + 32]
        # The running maximum may lag behind the largest score by up to 8.
        peak = np.maximum(part.max(1) - rng.uniform(0, prefill_softmax.LAG, 32), prefill_softmax.LOWEST)
        weights = np.exp2(part - peak[:, None].astype(np.float32))
        states.append((_lanes(peak, np.float32), weights @ v[at : at + 32], weights.sum(1)))
    peak, out, total = states[2]
    for theirs, more, sums in states[:2]:
        peak, a, b = prefill_combine.factors(ops, peak, theirs)
        out, total = out * a[:, None] + more * b[:, None], total * a + sums * b
    weights = np.exp2(s - s.max(1, keepdims=True))
    want = weights @ v / weights.sum(1, keepdims=True)
    np.testing.assert_allclose(out / np.asarray(total)[:, None], want, rtol=2e-5, atol=2e-5)


SPLIT = PrefillConfig(split_last=True)
OTHER_ORDERS = (
    (PrefillConfig(early_keys=True), {}),
    (SPLIT, {}),
    (dataclasses.replace(SPLIT, early_keys=True), {}),
    (SPLIT, dict(window=96)),
    (SPLIT, dict(soft_cap=15.0)),
    (dataclasses.replace(SPLIT, stages=3), {}),  # no place of its own for the result
)


@pytest.mark.parametrize("config, options", OTHER_ORDERS, ids=str)
def test_other_orders_compile(config, options):
    """Nothing spills, no wgmma waits for the one before, one kernel (and the flags' zeros, once a program)."""
    S = jax.ShapeDtypeStruct
    pages, few = S((1024, 8, 16, 128), jnp.bfloat16), S((32,), jnp.int32)
    call = functools.partial(mosaic_prefill_sm90.prefill_attention, sm_scale=0.1, config=config, **options)
    chain = lambda q, *rest: call(call(q, *rest), *rest)  # noqa: E731
    compiled = compile_for_h200(
        chain, S((32, 128, 32, 128), jnp.bfloat16), pages, pages, S((32, 256), jnp.int32), few, few
    )
    assert compiled.spill_bytes == 0 and compiled.registers <= 168 and "serialized" not in compiled.report
    assert compiled.hlo.count("custom-call(") == 2 and compiled.hlo.count("fusion(") <= config.split_last  # two calls
    assert compiled.count("ld.acquire.gpu") == compiled.count("nanosleep") == 2 * config.split_last
    assert compiled.count("st.release.gpu") == 4 * config.split_last
