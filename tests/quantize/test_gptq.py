"""GPTQ's solver against a float64 transcription of the paper's algorithm, and against rounding to nearest."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from jqserve.quantize.compensate import Order, quantize
from jqserve.quantize.gptq import inverse_factor, solve
from jqserve.quantize.grid import Grid

K, N = 64, 24


def problem(seed: int = 0, dead: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(W [N, K], H [K, K]) with strongly correlated inputs, as those of real layers are."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(K, K)) * (0.1 + rng.exponential(size=K))[None, :]
    x = rng.normal(size=(4096, K)) @ mixing.T
    if dead:
        x[:, :dead] = 0
    return rng.normal(0, 0.05, (N, K)).astype(np.float32), (x.T @ x / len(x)).astype(np.float32)


def paper(w: np.ndarray, h: np.ndarray, bits: int, group: int, symmetric: bool, damp: float) -> np.ndarray:
    """Section 3.3 of arXiv:2210.17323, one column at a time in float64: after rounding a column its error goes to the
    later ones by the inverse Hessian, from which the column is then eliminated."""
    w, levels = w.astype(np.float64).copy(), (1 << bits) - 1
    inverse = np.linalg.inv(h.astype(np.float64) + damp * np.diag(h).mean() * np.eye(len(h)))
    out = np.zeros_like(w)
    scale = zero = np.zeros(0)
    for k in range(w.shape[1]):
        if k % group == 0:
            part = w[:, k : k + group]
            low, high = np.minimum(part.min(1), 0), np.maximum(part.max(1), 0)
            if symmetric:
                scale, zero = 2 * np.maximum(-low, high) / levels, np.full(len(w), (levels + 1) / 2)
            else:
                scale = (high - low) / levels
                zero = np.round(-low / scale)
        code = np.clip(np.round(w[:, k] / scale) + zero, 0, levels)
        out[:, k] = (code - zero) * scale
        error = (w[:, k] - out[:, k]) / inverse[k, k]
        w[:, k:] -= np.outer(error, inverse[k, k:])
        inverse -= np.outer(inverse[:, k], inverse[k]) / inverse[k, k]
    return out


def loss(w: np.ndarray, other: np.ndarray, h: np.ndarray) -> float:
    return float((((w - other) @ h) * (w - other)).sum())


@pytest.mark.parametrize(
    ("bits", "group", "symmetric"), [(4, 16, True), (4, 16, False), (3, 0, True), (8, 0, True), (4, 64, False)]
)
def test_same_as_the_paper(bits: int, group: int, symmetric: bool) -> None:
    w, h = problem()
    expected = paper(w, h, bits, group or K, symmetric, 0.01)
    codes, note = quantize(jnp.asarray(w), h, Grid("int", bits, symmetric, (1, group)), 0.01, Order())
    # float32 against float64: values on the edge between two codes may fall on either side, and then differ onward
    same = np.isclose(codes.dequantize(), expected, atol=1e-6, rtol=1e-4)
    assert note == ""
    assert same.mean() > 0.97
    assert loss(w, codes.dequantize(), h) == pytest.approx(loss(w, expected, h), rel=0.02)


def test_the_factor_is_that_of_the_inverse() -> None:
    _, h = problem(1)
    factor = np.asarray(inverse_factor(jnp.asarray(h), 0.01), np.float64)
    assert np.allclose(factor, np.triu(factor))
    inverse = np.linalg.inv(h.astype(np.float64) + 0.01 * np.diag(h).mean() * np.eye(K))
    assert np.abs(factor.T @ factor - inverse).max() < 1e-4 * np.abs(inverse).max()


@pytest.mark.parametrize("order", [Order(), Order(True), Order(True, True)], ids=["plain", "act-order", "static"])
def test_better_than_rounding(order: Order) -> None:
    w, h = problem(2)
    grid = Grid("int", 3, False, (1, 16))
    compensated, _ = quantize(jnp.asarray(w), h, grid, 0.01, order)
    rounded, _ = quantize(jnp.asarray(w), np.eye(K, dtype=np.float32), grid, 0.01, Order())
    assert loss(w, compensated.dequantize(), h) < 0.6 * loss(w, rounded.dequantize(), h)


def test_groups_follow_the_order() -> None:
    w, h = problem(3)
    grid = Grid("int", 4, False, (1, 16))
    codes, _ = quantize(jnp.asarray(w), h, grid, 0.01, Order(True))
    perm = np.argsort(-np.diagonal(h), kind="stable")
    assert codes.group_index is not None
    assert np.array_equal(codes.group_index[perm], np.arange(K) // 16)
    static, _ = quantize(jnp.asarray(w), h, grid, 0.01, Order(True, True))
    assert static.group_index is None


def test_features_that_were_never_active_are_rounded_to_nearest() -> None:
    w, h = problem(4, dead=5)
    grid = Grid("int", 4, True, (1, 0))
    codes, note = quantize(jnp.asarray(w), h, grid, 0.01, Order())
    assert note == f"5 of {K} input features were never active"
    step = codes.scale.astype(np.float32)
    assert (np.abs(codes.dequantize() - w)[:, :5] <= step / 2 + 1e-6).all()


def test_no_activity_at_all_is_said() -> None:
    w, h = problem(5)
    _, note = quantize(jnp.asarray(w), np.zeros_like(h), Grid("int", 4, True, (1, 16)), 0.01, Order())
    assert note == "no input was ever active: rounded to nearest"


def test_constant_activations_raise_the_damping() -> None:
    """One direction only: float32 cannot factor it at a hair of damping, and the note says what was done."""
    w, _ = problem(6)
    x = np.random.default_rng(0).normal(size=K).astype(np.float32) * 100
    codes, note = quantize(jnp.asarray(w), np.outer(x, x), Grid("int", 4, True, (1, 16)), 1e-9, Order())
    assert note.startswith("damping raised to")
    assert np.isfinite(codes.dequantize()).all()


def test_an_all_zero_weight_stays_zero() -> None:
    _, h = problem(7)
    codes, _ = quantize(jnp.zeros((N, K)), h, Grid("int", 4, False, (1, 16)), 0.01, Order())
    assert not codes.dequantize().any()


def test_v1_zero_points_never_are_zero() -> None:
    """A stored zero - 1 of -1 is read in two ways by different engines: the range gives way instead."""
    _, h = problem(8)
    w = np.abs(problem(8)[0]) + 0.01
    grid = Grid("int", 4, False, (1, 16), min_zero=1)
    codes, _ = quantize(jnp.asarray(w), h, grid, 0.01, Order())
    assert codes.zero is not None and codes.zero.min() == 1
    first = solve(grid, jnp.asarray(w.T), jnp.eye(K))  # no compensation: the plain rounding error
    left = (np.asarray(first[0], np.float32) - np.repeat(first[2], 16, 0)) * np.repeat(first[1], 16, 0)
    assert (np.abs(left.T - w) <= np.repeat(np.asarray(first[1]), 16, 0).T / 2 + 1e-6).all()
