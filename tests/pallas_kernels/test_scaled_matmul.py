"""scaled_matmul: every implementation against float64 arithmetic on the dequantized operands."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels import scaled_matmul
from pallas_kernels.scaled_matmul.cases import CASES, Case

# Relative to the largest output: one rounding to the output type (2^-9 for bf16, 2^-12 for fp16), or float32 sums.
OUTPUT_ERROR = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 1e-5}


def make(case: Case, seed: int = 0):
    rng = np.random.default_rng(seed)
    dtype = ml_dtypes.float8_e4m3fn if case.qdtype == "float8_e4m3fn" else np.int8

    def values(shape):
        x = rng.normal(size=shape) * (40 if dtype is np.int8 else 100)
        limit = 127 if dtype is np.int8 else 448
        return np.clip(np.round(x) if dtype is np.int8 else x, -limit, limit).astype(dtype)

    m, n, k = case.m, case.n, case.k
    kb, nb = -(-k // 128), -(-n // 128)
    x_shape = {"row": (m, 1), "tensor": (1, 1), "block": (m, kb), "mixed": (m, 1)}[case.scales]
    w_shape = {"row": (n, 1), "tensor": (1, 1), "block": (nb, kb), "mixed": (nb, kb)}[case.scales]
    # Scales over two decades so that a scale applied to the wrong row, column or block shows.
    scale = lambda shape: (10.0 ** rng.uniform(-4, -2, size=shape)).astype(np.float32)  # noqa: E731
    bias = rng.normal(size=n).astype(np.float32) if case.bias else None
    return values((m, k)), values((n, k)), scale(x_shape), scale(w_shape), bias


def expected(xq, wq, x_scale, w_scale, bias):
    """float64 result, and sum |x||w| for error bounds."""
    m, k = xq.shape
    n = wq.shape[0]

    def expand(scale, rows):
        if scale.shape[0] not in (1, rows):
            scale = np.repeat(scale, 128, axis=0)[:rows]
        return scale if scale.shape[1] == 1 else np.repeat(scale, 128, axis=1)[:, :k]

    x = xq.astype(np.float64) * expand(x_scale, m)
    w = wq.astype(np.float64) * expand(w_scale, n)
    y = x @ w.T
    return (y if bias is None else y + bias), np.abs(x) @ np.abs(w).T


def check(case: Case, out, operands):
    want, magnitude = expected(*operands)
    got = np.asarray(out).astype(np.float64)
    assert got.shape == want.shape and out.dtype == jnp.dtype(case.out_dtype)
    error = np.abs(got - want)
    # A float32 sum of K exact products errs by well under 1e-5 of sum|x||w|; then one rounding to the output type.
    bound = OUTPUT_ERROR[case.out_dtype] * np.abs(want) + 1e-5 * magnitude + 1e-6
    assert (error <= bound).all(), f"{case}: worst error/bound {np.max(error / bound):.3g}"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference(case):
    operands = make(case)
    out = scaled_matmul(*map(as_jax, operands), out_dtype=case.out_dtype, implementation="xla")
    check(case, out, operands)


def as_jax(a):
    return None if a is None else jnp.asarray(a)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(xq=(4, 128)), "want xq"),
        (dict(x_scale=(4, 3)), "x_scale must be"),
        (dict(w_scale=(3, 1)), "w_scale must be"),
        (dict(bias=(7,)), "bias must be"),
    ],
)
def test_wrong_shapes_are_named(change, message):
    shapes = dict(xq=(4, 256), wq=(256, 256), x_scale=(4, 1), w_scale=(256, 1), bias=(256,)) | change
    quantized = lambda name: jnp.zeros(shapes[name], jnp.int8)  # noqa: E731
    floats = lambda name: jnp.ones(shapes[name], jnp.float32)  # noqa: E731
    with pytest.raises(ValueError, match=message):
        scaled_matmul(quantized("xq"), quantized("wq"), floats("x_scale"), floats("w_scale"), floats("bias"))


def test_nan_and_inf_stay_in_their_row():
    case = Case(4, 256, 256)
    xq, wq, x_scale, w_scale, _ = make(case)
    xq[1, 7] = np.nan
    x_scale[2] = np.inf
    out = np.asarray(scaled_matmul(*map(as_jax, (xq, wq, x_scale, w_scale)), out_dtype=jnp.float32))
    assert np.isnan(out[1]).all() and not np.isfinite(out[2]).any() and np.isfinite(out[[0, 3]]).all()


def test_jit_and_grad_free_trace():
    case = CASES[0]
    xq, wq, x_scale, w_scale, _ = map(as_jax, make(case))
    shape = jax.eval_shape(scaled_matmul, xq, wq, x_scale, w_scale)
    assert shape.shape == (case.m, case.n) and shape.dtype == jnp.bfloat16
