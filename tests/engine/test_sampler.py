"""The sampler against plain numpy that sorts."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jqserve.engine import sampler, variant
from jqserve.engine.request import EngineRequest, SamplingParams
from jqserve.engine.sequence import Sequence
from jqserve.engine.slots import SlotTable
from jqserve.ops.device import use_device
from pallas_kernels.dispatch import KNOWN_DEVICES
from pallas_kernels.sample import reference

VOCAB = 37
ROWS = 256  # everything is padded to it, so that one program serves all tests
jitted = jax.jit(sampler.sample)


@jax.jit
def kept(x: Any, *cuts: Any) -> Any:
    return x >= reference.threshold(x, *cuts)[:, None]


@jax.jit
def kept_as_on_a_gpu(x: Any, *cuts: Any) -> Any:
    """Several bits of the threshold a pass, and no conditionals."""
    with use_device(KNOWN_DEVICES["h200"]):
        return x >= reference.threshold(x, *cuts)[:, None]


def sample(x: np.ndarray, params: sampler.RowParams) -> sampler.Sampled:
    rows = len(x)
    fill = ROWS - rows
    padded = jax.tree.map(lambda a: np.concatenate([a, np.repeat(np.asarray(a)[:1], fill, 0)]), params)
    out = jitted(np.concatenate([x, np.repeat(x[:1], fill, 0)]), padded)
    return jax.tree.map(lambda a: np.asarray(a)[:rows], out)


def logits(rows: int, seed: int = 0, scale: float = 2.0) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=(rows, VOCAB)) * scale).astype(np.float32)


def row_params(
    params: list[SamplingParams],
    position: int | list[int] = 5,
    generated: np.ndarray | None = None,
    prompted: np.ndarray | None = None,
    prompt_length: int = 3,
) -> sampler.RowParams:
    """Through the slot table, as the engine does it; row i has slot i."""
    table = SlotTable(len(params))
    for slot, p in enumerate(params):
        request = EngineRequest(slot, (1,) * prompt_length, p)
        seq = Sequence(request, slot, 99, list(request.prompt), frozenset(p.stop_token_ids), slot=slot)
        table.set(seq)
    rows = len(params)
    counts = np.zeros((rows + 1, VOCAB), np.int16)
    seen = np.zeros((rows + 1, VOCAB), bool)
    counts[:rows] = 0 if generated is None else generated
    seen[:rows] = False if prompted is None else prompted
    at = jnp.broadcast_to(jnp.asarray(position, jnp.int32), (rows,))
    return table.on_device().rows(jnp.arange(rows), at, jnp.asarray(counts), jnp.asarray(seen))


def reference_kept(scaled: np.ndarray, top_k: int, top_p: float, min_p: float) -> np.ndarray:
    """Hugging Face's order: top-k, then top-p of what is left, then min-p."""
    order = np.argsort(-scaled, kind="stable")
    keep = np.ones(len(scaled), bool)
    if top_k:
        keep[order[top_k:]] = False
    weight = np.where(keep, np.exp(scaled.astype(np.float64) - scaled.max()), 0)
    if top_p < 1:
        mass = np.cumsum(weight[order]) / weight.sum()
        keep[order[np.searchsorted(mass, top_p) + 1 :]] = False
    return keep & (np.exp(scaled.astype(np.float64) - scaled.max()) >= min_p)


@pytest.mark.parametrize("keep", [kept, kept_as_on_a_gpu])
@pytest.mark.parametrize("seed", range(4))
def test_kept_tokens_equal_those_of_a_sort(seed: int, keep: Any) -> None:
    cases = [
        (0, 1.0, 0.0), (1, 1.0, 0.0), (5, 1.0, 0.0), (36, 1.0, 0.0), (37, 1.0, 0.0), (1000, 1.0, 0.0), (0, 0.9, 0.0),
        (0, 0.5, 0.0), (0, 0.01, 0.0), (0, 0.999, 0.0), (0, 1.0, 0.1), (0, 1.0, 1.0), (7, 0.8, 0.0), (20, 0.95, 0.05),
    ]  # fmt: skip
    x = logits(len(cases), seed)
    k, p, m = (np.array(column) for column in zip(*cases))
    got = np.asarray(keep(x, k.astype(np.int32), p.astype(np.float32), m.astype(np.float32)))
    for i, case in enumerate(cases):
        expected = reference_kept(x[i], int(case[0]), case[1], case[2])
        assert (got[i] == expected).all(), (case, got[i].sum(), expected.sum())


def test_a_large_vocabulary() -> None:
    """Many columns, their tail not a whole part, both ways; the sort decides."""
    x = (np.random.default_rng(3).normal(size=(4, 5000)) * 3).astype(np.float32)
    k, p = np.array([0, 40, 0, 3000], np.int32), np.array([0.9, 1.0, 0.5, 0.95], np.float32)
    a, b = (np.asarray(f(x, k, p, np.zeros(4, np.float32))) for f in (kept, kept_as_on_a_gpu))
    for i in range(4):
        expected = reference_kept(x[i], int(k[i]), float(p[i]), 0.0)
        assert (a[i] == expected).all() and (b[i] == expected).all()


def test_ties_at_the_threshold_are_all_kept() -> None:
    x = np.full((1, VOCAB), -3.0, np.float32)
    x[0, [4, 9, 30]] = 1.5
    got = np.asarray(kept(x, np.array([2], np.int32), np.ones(1, np.float32), np.zeros(1, np.float32)))
    assert np.flatnonzero(got[0]).tolist() == [4, 9, 30]


@pytest.mark.parametrize("values", [[-1.0, -2.0, -3.0], [0.0, -0.0, -1e-30], [1e30, -1e30, 0.0], [-np.inf, 0.0, 1.0]])
def test_the_integer_order_is_the_float_order(values: list[float]) -> None:
    x = np.array([values], np.float32)
    order = np.asarray(reference.sortable(jnp.asarray(x)))[0]
    for i, a in enumerate(values):
        for j, b in enumerate(values):
            assert (order[i] < order[j]) == (a < b)


def test_greedy_rows_are_argmax_and_do_not_mind_their_neighbours() -> None:
    x = logits(3)
    params = [SamplingParams(temperature=0), SamplingParams(seed=1), SamplingParams(temperature=0, top_k=3, top_p=0.1)]
    out = sample(x, row_params(params))
    assert np.asarray(out.tokens)[[0, 2]].tolist() == x.argmax(-1)[[0, 2]].tolist()
    assert np.asarray(sampler.greedy(jnp.asarray(x)).tokens).tolist() == x.argmax(-1).tolist()


def test_a_draw_depends_on_seed_and_position_only() -> None:
    row = logits(1)
    p = SamplingParams(temperature=1.5, seed=(5 << 32) + 11)
    alone = int(sample(row, row_params([p], position=9)).tokens[0])
    others = [SamplingParams(temperature=0.5 + i, seed=i, top_k=i, presence_penalty=0.1) for i in range(7)]
    x = np.concatenate([logits(7, 1), row])
    assert int(sample(x, row_params([*others, p], position=[*range(7), 9])).tokens[7]) == alone
    same = np.repeat(row, 64, 0)
    by_position = np.asarray(sample(same, row_params([p] * 64, position=list(range(64)))).tokens)
    seeds = [SamplingParams(temperature=1.5, seed=s << 32) for s in range(64)]
    by_seed = np.asarray(sample(same, row_params(seeds)).tokens)
    assert len(set(by_position.tolist())) > 5 and len(set(by_seed.tolist())) > 5


@pytest.mark.parametrize(
    ("extra", "temperature"), [({}, 1.0), ({"top_k": 5}, 0.7), ({"top_p": 0.6, "min_p": 0.02}, 1.3)]
)
def test_draws_follow_the_distribution(extra: dict[str, Any], temperature: float) -> None:
    """Pearson's chi-square over 4,096 positions; the bound is its 0.9999 quantile, the seed is fixed."""
    draws = 4096
    x = logits(1, 3, scale=1.0)
    p = SamplingParams(temperature=temperature, seed=42, **extra)
    tokens = []
    for start in range(0, draws, ROWS):
        params = row_params([p] * ROWS, position=list(range(start, start + ROWS)))
        tokens.append(sample(np.repeat(x, ROWS, 0), params).tokens)
    scaled = x[0].astype(np.float64) / temperature
    keep = reference_kept(scaled.astype(np.float32), p.top_k, p.top_p, p.min_p)
    probability = np.where(keep, np.exp(scaled), 0)
    probability /= probability.sum()
    counts = np.bincount(np.concatenate(tokens), minlength=VOCAB)
    assert counts[~keep].sum() == 0
    expected = probability[keep] * draws
    chi = ((counts[keep] - expected) ** 2 / expected).sum()
    freedom = keep.sum() - 1
    bound = freedom * (1 - 2 / (9 * freedom) + 3.719 * np.sqrt(2 / (9 * freedom))) ** 3  # Wilson-Hilferty
    assert chi < bound


def test_penalties() -> None:
    x = logits(1)
    generated = np.zeros((1, VOCAB), np.int16)
    generated[0, [3, 4]] = [1, 4]
    prompted = np.zeros((1, VOCAB), bool)
    prompted[0, [4, 8]] = True
    p = SamplingParams(temperature=0, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.25)
    expected = x[0].copy()
    for token in (3, 4, 8):
        expected[token] = expected[token] / 1.3 if expected[token] > 0 else expected[token] * 1.3
    expected[3] -= 0.5 + 0.25
    expected[4] -= 0.5 + 4 * 0.25
    got = np.asarray(sampler.penalised(jnp.asarray(x), row_params([p], 5, generated, prompted)))[0]
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_logit_bias_and_the_ban_on_stop_ids() -> None:
    x = np.zeros((3, VOCAB), np.float32)
    bias = ((3, 4.0), (7, -100.0))
    banned = SamplingParams(temperature=0, logit_bias=bias, min_new_tokens=2, stop_token_ids=(3, 9))
    params = row_params([SamplingParams(temperature=0, logit_bias=bias), banned, banned], position=[3, 4, 5])
    got = np.asarray(sampler.biased(jnp.asarray(x), params))
    assert got[0, 3] == 4 and got[0, 7] == -100 and np.count_nonzero(got[0]) == 2
    assert got[1, 3] == -np.inf and got[1, 9] == -np.inf and got[1, 7] == -100  # second token of the answer
    assert (got[2] == got[0]).all()  # the third may stop
    assert np.asarray(sample(x, params).tokens).tolist() == [3, 0, 3]


def test_logprobs_are_those_after_penalties_and_before_temperature() -> None:
    x = logits(2)
    params = [
        SamplingParams(temperature=0.3, seed=1, logprobs=5, logit_bias=((6, 3.0),)),
        SamplingParams(temperature=0),
    ]
    out = sample(x, row_params(params))
    biased = x[0].astype(np.float64)
    biased[6] += 3
    logprobs = biased - np.log(np.exp(biased).sum())
    token = int(out.tokens[0])
    assert float(out.logprob[0]) == pytest.approx(logprobs[token], abs=1e-5)
    best = np.argsort(-logprobs)[:20]
    assert np.asarray(out.top_ids[0]).tolist() == best.tolist()
    np.testing.assert_allclose(out.top[0], logprobs[best], atol=1e-5)


def test_nan_is_told_and_not_sampled() -> None:
    x = logits(2)
    x[0, 5] = np.nan
    params = [SamplingParams(temperature=1.0, seed=1), SamplingParams(temperature=1.0, seed=1)]
    tokens = np.asarray(sample(x, row_params(params)).tokens)
    assert tokens[0] == -1 and tokens[1] >= 0
    assert int(sampler.greedy(jnp.asarray(x)).tokens[0]) == -1


def test_a_slot_forgets_the_biases_of_its_last_sequence() -> None:
    table = SlotTable(1)
    for bias in (((3, 4.0),), ()):
        request = EngineRequest(0, (1,), SamplingParams(logit_bias=bias))
        table.set(Sequence(request, 0, 9, [1], frozenset(), slot=0))
    assert (np.asarray(table.on_device().bias_ids) >= VOCAB).all()


def test_the_plain_sampler_gives_what_the_full_one_gives_where_nothing_else_is_asked() -> None:
    x = logits(6)
    x[5, 7] = np.nan
    temperatures = (0.0, 0.3, 1.0, 1.0, 2.0, 1.0)
    params = [SamplingParams(temperature=t, seed=11 + i) for i, t in enumerate(temperatures)]
    rows = row_params(params, position=[3, 4, 5, 6, 7, 8])
    full = sampler.sample(jnp.asarray(x), rows, scored=False)
    plain = sampler.sample(jnp.asarray(x), rows, scored=False, plain=True)
    assert plain.tokens.tolist() == full.tokens.tolist() and plain.tokens[5] == -1
    assert plain.logprob is not None and full.logprob is not None
    np.testing.assert_allclose(plain.logprob[:5], full.logprob[:5], atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, "greedy"),
        ({"logprobs": 0}, "plain"),
        ({"temperature": 0.7}, "plain"),
        ({"temperature": 0.7, "top_k": -1}, "plain"),
        ({"temperature": 0.7, "top_p": 0.9}, "sample"),
        ({"temperature": 0.7, "top_k": 40}, "sample"),
        ({"temperature": 0.7, "min_p": 0.1}, "sample"),
        ({"top_p": 0.9}, "greedy"),
        ({"presence_penalty": 0.1}, "sample"),
        ({"frequency_penalty": 0.1}, "sample"),
        ({"repetition_penalty": 1.1}, "sample"),
        ({"logit_bias": {5: 1.0}}, "sample"),
        ({"min_new_tokens": 2}, "sample"),
        ({"temperature": 0.7, "logprobs": 3}, "scored"),
    ],
)
def test_the_sampler_that_a_request_needs(fields: dict[str, Any], expected: str) -> None:
    assert variant.needed(SamplingParams(**({"temperature": 0.0} | fields))) == expected
