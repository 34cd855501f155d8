"""quantize_rows, rms_norm_quantize, silu_mul_quantize against numpy float64."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import quantize_rows, rms_norm_quantize, silu_mul_quantize
from pallas_kernels.quantize.cases import CASES, Case

IMPLEMENTATIONS = ["xla"]


def make(case: Case, seed: int = 0):
    rng = np.random.default_rng(seed)
    width = 2 * case.k if case.op == "silu_mul_quantize" else case.k
    x = rng.normal(size=(case.m, width)) * 10.0 ** rng.uniform(-2, 2, size=(case.m, 1))
    return jnp.asarray(x, case.dtype)


def run(case: Case, x, implementation):
    """(xq, scale, new_residual or None, the float64 values that were to be quantized)."""
    common = dict(block=case.block, divisor=case.divisor, implementation=implementation)
    wide = np.asarray(x).astype(np.float64)
    if case.op == "quantize_rows":
        return *quantize_rows(x, case.qdtype, **common), None, wide
    if case.op == "silu_mul_quantize":
        gate, up = np.split(wide, 2, axis=1)
        return *silu_mul_quantize(x, qdtype=case.qdtype, **common), None, gate / (1 + np.exp(-gate)) * up
    rng = np.random.default_rng(1)
    weight = jnp.asarray(rng.normal(size=case.k) + 1, case.dtype)
    residual = jnp.asarray(rng.normal(size=x.shape), case.dtype) if case.op == "residual_rms_norm_quantize" else None
    out = rms_norm_quantize(x, weight, residual, eps=1e-5, qdtype=case.qdtype, **common)
    if residual is not None:
        wide = np.asarray((x.astype(jnp.float32) + residual.astype(jnp.float32)).astype(case.dtype)).astype(np.float64)
    np.testing.assert_array_equal(np.asarray(out[2]).astype(np.float64), wide)
    normed = wide / np.sqrt(np.mean(wide**2, axis=1, keepdims=True) + 1e-5) * np.asarray(weight).astype(np.float64)
    return *out, normed


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_float64(case, implementation):
    xq, scale, _, want = run(case, make(case), implementation)
    assert xq.dtype == jnp.dtype(case.qdtype) and scale.dtype == jnp.float32
    check_quantized(case, np.asarray(xq).astype(np.float64), np.asarray(scale).astype(np.float64), want)


def check_quantized(case: Case, xq, scale, want):
    m, k = want.shape
    block = case.block or max(k, 1)
    blocks = -(-k // block)
    assert xq.shape == (m, k) and scale.shape == (m, blocks)
    padded = np.zeros((m, blocks * block))
    padded[:, :k] = np.abs(want)
    absmax = padded.reshape(m, blocks, block).max(axis=2) if m else padded.reshape(0, blocks)
    np.testing.assert_allclose(scale, np.where(absmax == 0, 1, absmax / case.divisor), rtol=1e-5)
    expanded = np.repeat(scale, block, axis=1)[:, :k]
    steps = np.abs(xq * expanded - want) / expanded
    if case.qdtype == "int8":
        # Half a step of rounding plus 1e-4 for float32 on the way; divisor 127.5 clamps 127.5 to 127.
        assert (steps <= 0.5 + 1e-2 * (case.op != "quantize_rows") + 1e-4).all(), steps.max()
    else:
        # e4m3 has 3 mantissa bits: half an ulp is 2^-4 of the value; below 2^-6 the step is 2^-9.
        assert (steps <= np.maximum(np.abs(want / expanded) * (2.0**-4 + 1e-4), 2.0**-10 * 1.01)).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("qdtype, divisor", [("int8", 127.0), ("float8_e4m3fn", 448.0)])
def test_extremes(qdtype, divisor, implementation):
    x = np.ones((6, 256), np.float32)
    x[0] = 0
    x[1, 3] = np.nan
    x[2, 5] = np.inf
    x[3] = 1e-30
    x[4] = 1e30
    xq, scale = quantize_rows(jnp.asarray(x), qdtype, divisor=divisor, implementation=implementation)
    with np.errstate(invalid="ignore"):
        back = np.asarray(xq).astype(np.float32) * np.asarray(scale)
    assert scale[0, 0] == 1 and (back[0] == 0).all()
    assert np.isnan(back[1]).any() and np.isnan(np.asarray(scale)[1]).all()
    assert not np.isfinite(back[2]).all() and np.isinf(np.asarray(scale)[2]).all()
    np.testing.assert_allclose(back[3:], x[3:], rtol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_static_scale_clamps(implementation):
    x = jnp.asarray([[1.0, -300.0, 300.0, 0.5]])
    xq, scale = quantize_rows(x, "int8", divisor=127, static_scale=jnp.float32(0.5), implementation=implementation)
    assert scale.shape == (1, 1) and np.asarray(xq).tolist() == [[2, -128, 127, 1]]
    xq, _ = quantize_rows(x, jnp.float8_e4m3fn, divisor=448, static_scale=0.5, implementation=implementation)
    assert np.asarray(xq).astype(np.float32).tolist() == [[2, -448, 448, 1]]


def test_wrong_arguments_are_named():
    x = jnp.ones((2, 8))
    with pytest.raises(ValueError, match="qdtype must be"):
        quantize_rows(x, "int4", divisor=7)
    with pytest.raises(ValueError, match="takes no block"):
        quantize_rows(x, "int8", block=4, divisor=127, static_scale=1.0)
    with pytest.raises(ValueError, match="weight must be"):
        rms_norm_quantize(x, jnp.ones(4), eps=1e-5, qdtype="int8", divisor=127)
    with pytest.raises(ValueError, match="2F"):
        silu_mul_quantize(jnp.ones((2, 7)), qdtype="int8", divisor=127)
