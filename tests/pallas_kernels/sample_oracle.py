"""What `sample` must give, by a sort in float64; for the tests and the bench."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np

from pallas_kernels.sample import reference
from pallas_kernels.sample.cases import Case, logits

#: Sums of up to 128k weights in float32, and the hardware's exponential of arguments up to 20 nats (2e-6).
MASS_ERROR = 3e-6


def arguments(case: Case, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed + 100)
    return {
        "logits": logits(case, seed)[None],
        "temperature": np.array([case.temperature], np.float32),
        "top_k": np.array([case.top_k], np.int32),
        "top_p": np.array([case.top_p], np.float32),
        "min_p": np.array([case.min_p], np.float32),
        "seed": rng.integers(0, 2**32, (1, 2), dtype=np.uint32),
        "position": np.array([seed + 17], np.int32),
    }


def kept(x: np.ndarray, case: Case, slack: float) -> np.ndarray:
    """By a sort, in float64; top_p moved by `slack`."""
    order = np.argsort(-x, kind="stable")
    sorted_x = x[order].astype(np.float64)
    keep = np.ones(len(x), bool)
    if 0 < case.top_k < len(x):
        keep = x >= sorted_x[case.top_k - 1]
    weight = np.where(keep[order], np.exp(sorted_x - sorted_x[0]), 0)
    if case.top_p < 1:
        above = np.searchsorted(-sorted_x, -x.astype(np.float64), side="left")  # how many are larger
        mass = np.concatenate([[0], np.cumsum(weight)])[above] / weight.sum()
        keep &= (mass < np.float64(np.float32(case.top_p)) + slack) | (x == x.max())
    if case.min_p > 0:
        keep &= x >= x.max() + np.log(max(np.float32(case.min_p), np.float32(1e-30)), dtype=np.float32) - slack * 10
    return keep


@functools.cache
def gumbel_of(vocabulary: int) -> Any:
    return jax.jit(lambda seed, position: reference.gumbel(seed, position, vocabulary))


def check(case: Case, given: dict[str, np.ndarray], token: int, total: float, threshold: float) -> None:
    row = given["logits"][0]
    if np.isnan(row).any():
        assert token == -1
        return
    top = row.max()
    if np.isfinite(top):
        expected = float(top) + np.log(np.exp(row.astype(np.float64) - top).sum())
        assert abs(total - expected) <= 3e-6 + 1e-6 * abs(expected)
    else:
        assert total == top
    if case.temperature < reference.LEAST_TEMPERATURE or not np.isfinite(top):
        assert token == row.argmax()
        return
    x = row / np.float32(case.temperature)
    got = x >= threshold
    least, most = (kept(x, case, slack) & (row > -1e31) for slack in (-MASS_ERROR, MASS_ERROR))
    assert (least <= got).all() and (got & (row > -1e31) <= most).all()
    scores = x + np.asarray(gumbel_of(len(row))(given["seed"][0], given["position"][0]))
    best = np.where(got, scores, -np.inf).max()
    assert got[token] and scores[token] >= best - 1e-6 * max(1, abs(best))  # the logarithm's last bits
