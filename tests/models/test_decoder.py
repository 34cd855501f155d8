"""The paged path against the full path: any cut of sequences into chunks and decodes gives the same logits."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jqserve.models.build import build, split
from jqserve.models.decoder import Layer
from jqserve.ops.attention import AttentionMetadata
from tests.models.tiny import FP8_STATIC, FP8_TOKEN, INT8_TOKEN, TINY, Scheme, random_params

PAGE = 8
# float32 sums in another order: 1e-6 relative each, a few layers deep, logits of size about 10.
TOLERANCE = 2e-4
# The same 1e-6 now and then moves a quantized activation by one step: 1/255 (int8) or 1/16 (fp8) of one input.
QUANTIZED_TOLERANCE = 2e-2

VARIANTS = {
    "dense": (TINY, Scheme(), True),
    "unfused": (TINY, Scheme(), False),
    "untied": (dataclasses.replace(TINY, tied_embeddings=False), Scheme(), True),
    "bias": (dataclasses.replace(TINY, qkv_bias=True, o_bias=True, mlp_bias=True), Scheme(), True),
    "qk_norm": (dataclasses.replace(TINY, qk_norm=True), Scheme(), True),
    "window": (dataclasses.replace(TINY, sliding_windows=(5, None)), Scheme(), True),
    "uint4": (TINY, Scheme("uint4"), True),
    "uint4_zero_perm": (TINY, Scheme("uint4", zero="int", perm=True), False),
    "fp8_token": (TINY, Scheme("float8_e4m3fn", (1, -1), activation=FP8_TOKEN), True),
    "int8_token": (TINY, Scheme("int8", (1, -1), activation=INT8_TOKEN), False),
    "fp8_static": (TINY, Scheme("float8_e4m3fn", (-1, -1), activation=FP8_STATIC), True),
}


class PagedRun:
    """Feeds sequences to a Decoder's paged path by hand, with scattered pages, and collects logits per position."""

    def __init__(self, decoder, sequences: list[list[int]], pages_each: int, tile: int) -> None:
        config, self.decoder = decoder.config, decoder
        structure, self.leaves = split(decoder)
        total = 1 + pages_each * len(sequences)
        shape = (total, config.kv_heads, PAGE, config.head_dim)
        # Rubbish, not zeros: whatever is read beyond a sequence's length must not matter.
        self.kv = tuple((jnp.full(shape, 50.0), jnp.full(shape, -50.0)) for _ in range(config.layers))
        order = np.random.default_rng(1).permutation(np.arange(1, total))
        self.tables = order.reshape(len(sequences), pages_each).astype(np.int32)
        self.sequences, self.tile = sequences, tile
        self.done = [0] * len(sequences)
        self.logits: list[list[np.ndarray]] = [[] for _ in sequences]

        @jax.jit
        def step(leaves, tokens, positions, kv, meta):
            model = structure.merge(leaves)
            hidden, kv = model(tokens, positions, kv, meta)
            return model.logits(hidden), kv

        self.step = step

    def run(self, decodes: list[int | None], tiles: list[tuple[int, int] | None]) -> None:
        """decodes: the sequence of each decode row (None = padding); tiles: (sequence, rows) of each tile."""
        rows: list[tuple[int, int] | None] = []  # (sequence, position) or padding
        for s in decodes:
            rows.append(None if s is None else (s, self.done[s]))
        starts = [0 if t is None else self.done[t[0]] for t in tiles]
        for tile, start in zip(tiles, starts):
            for i in range(self.tile):
                rows.append((tile[0], start + i) if tile and i < tile[1] else None)
        trash = np.zeros(self.tables.shape[1], np.int32)
        tokens = [0 if r is None else self.sequences[r[0]][r[1]] for r in rows]
        slots = [0 if r is None else int(self.tables[r[0]][r[1] // PAGE]) * PAGE + r[1] % PAGE for r in rows]
        meta = AttentionMetadata(
            kv_slots=np.array(slots, np.int32),
            decode_table=np.array([trash if s is None else self.tables[s] for s in decodes]).reshape(-1, len(trash)),
            decode_len=np.array([0 if s is None else self.done[s] + 1 for s in decodes], np.int32),
            tile_table=np.array([trash if t is None else self.tables[t[0]] for t in tiles]).reshape(-1, len(trash)),
            tile_start=np.array(starts, np.int32),
            tile_len=np.array([0 if t is None else t[1] for t in tiles], np.int32),
        )
        positions = np.array([0 if r is None else r[1] for r in rows], np.int32)
        meta = jax.tree.map(jnp.asarray, meta)
        logits, self.kv = self.step(self.leaves, jnp.array(tokens, jnp.int32), positions, self.kv, meta)
        assert np.isfinite(logits).all()
        for row, r in enumerate(rows):
            if r is not None:
                self.logits[r[0]].append(np.asarray(logits[row]))
                self.done[r[0]] += 1


def check(run: PagedRun, config, tolerance: float) -> None:
    structure, leaves = split(run.decoder)
    full = jax.jit(lambda leaves, tokens: structure.merge(leaves).full(tokens))
    longest = max(len(s) for s in run.sequences)
    padded = jnp.array([s + [0] * (longest - len(s)) for s in run.sequences])
    for got, expected in zip(run.logits, np.asarray(full(leaves, padded))):
        assert len(got) > 12
        np.testing.assert_allclose(np.array(got), expected[: len(got)], atol=tolerance * np.abs(expected).max())


def start(name: str) -> PagedRun:
    config, scheme, fused = VARIANTS[name]
    rng = np.random.default_rng(0)
    sequences = [rng.integers(0, config.vocab_size, n).tolist() for n in (21, 13)]
    return PagedRun(build(config, random_params(config, scheme, fused=fused)), sequences, pages_each=3, tile=6)


@pytest.mark.parametrize("name", VARIANTS)
def test_paged_equals_full(name: str) -> None:
    """All steps have one shape (two decode rows, two tiles), so that each variant compiles twice in all."""
    run = start(name)
    run.run([None, None], [(0, 6), (1, 4)])  # chunks of two sequences, one of them ragged
    run.run([None, 1], [(0, 6), None])  # decode mixed with a chunk; the second tile is padding
    while min(len(s) - d for s, d in zip(run.sequences, run.done)) > 0:
        run.run([1, 0], [None, None])
    config, scheme, _ = VARIANTS[name]
    check(run, config, TOLERANCE if scheme.activation.kind == "none" else QUANTIZED_TOLERANCE)


@pytest.mark.parametrize("name", ["dense", "qk_norm"])
def test_fp8_pages_hold_what_the_scales_say(name: str) -> None:
    """Paged in float8 with a scale for keys and values of each layer, against the full path's fake quantization."""
    config, scheme, fused = VARIANTS[name]
    params = random_params(config, scheme, fused=fused)
    for i, layer in enumerate(params["layers"].values()):
        layer["attn"] |= {"k_scale": jnp.float32(0.02 + 0.01 * i), "v_scale": jnp.float32(0.005)}
    rng = np.random.default_rng(0)
    sequences = [rng.integers(0, config.vocab_size, 18).tolist()]
    run = PagedRun(build(config, params), sequences, pages_each=3, tile=6)
    run.kv = jax.tree.map(lambda pages: pages.astype(jnp.float8_e4m3fn), run.kv)
    run.run([], [(0, 6)])
    while run.done[0] < 18:
        run.run([0], [])
    check(run, config, QUANTIZED_TOLERANCE)
    for layer in params["layers"].values():
        del layer["attn"]["k_scale"], layer["attn"]["v_scale"]
    without = jax.jit(build(config, params).full)(jnp.array(sequences))[0]
    # If the scales were not heeded in the full path, the check above would have compared with this.
    assert np.abs(np.array(run.logits[0]) - without).max() > 2 * QUANTIZED_TOLERANCE * np.abs(without).max()


def test_steps_of_only_tiles_or_only_decodes() -> None:
    run = start("dense")
    run.run([], [(0, 6), (1, 6)])
    run.run([], [(0, 5), None])
    while min(len(s) - d for s, d in zip(run.sequences, run.done)) > 0:
        run.run([1, None, 0], [])
    check(run, TINY, TOLERANCE)


def test_identical_layers_are_traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six layers with alternating windows: one of each kind."""
    config = dataclasses.replace(TINY, layers=6, sliding_windows=(5, None) * 3, max_position=251)
    structure, leaves = split(build(config, random_params(config)))
    calls: list[int] = []
    original = Layer.__call__
    monkeypatch.setattr(Layer, "__call__", lambda self, *a, **k: calls.append(1) or original(self, *a, **k))
    jax.jit(lambda leaves, tokens: structure.merge(leaves).full(tokens)).lower(leaves, jnp.zeros(9, jnp.int32))
    assert len(calls) == 2


def test_leaves_are_the_packed_arrays() -> None:
    """split adds nothing and copies nothing: the leaves are the arrays of the tree."""
    params = random_params(TINY, Scheme("uint4", zero="int"))
    _, leaves = split(build(TINY, params))
    assert {id(leaf) for leaf in leaves} == {id(leaf) for leaf in jax.tree.leaves(params)}
