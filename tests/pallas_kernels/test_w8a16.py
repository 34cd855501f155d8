"""w8a16: the XLA reference against numpy."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.w8a16.api import w8a16_matmul


@pytest.mark.parametrize("per", ["group", "channel", "tensor"])
@pytest.mark.parametrize("dtype", ["int8", "uint8", "uint8 zero", "float8_e4m3fn"])
def test_reference_is_the_formula(dtype: str, per: str) -> None:
    rng, m, n, k, group = np.random.default_rng(0), 3, 24, 200, 64
    name, _, has_zero = dtype.partition(" ")
    shape = {"group": (n, 4), "channel": (n, 1), "tensor": (1, 1)}[per]
    low, high = {"int8": (-128, 128), "uint8": (0, 256)}.get(name, (-16, 17))  # small integers are exact in fp8
    q, x = rng.integers(low, high, (n, k)), rng.standard_normal((m, k)).astype(np.float32)
    scale = rng.standard_normal(shape).astype(np.float32)
    zero = rng.integers(0, 256, shape) if has_zero else np.full(shape, 128 if name == "uint8" else 0)
    columns = np.arange(k) // group if per == "group" else np.zeros(k, int)
    w = (q - zero[:, columns]) * scale[:, columns].astype(np.float64)
    y = w8a16_matmul(
        jnp.asarray(x),
        jnp.asarray(q, jnp.float32).astype(name),
        jnp.asarray(scale),
        jnp.asarray(zero, jnp.uint8) if has_zero else None,
        group_size=group,
    )
    # float32 sums of k products: far inside 1e-5 of the sum of magnitudes.
    np.testing.assert_array_less(np.abs(y - x @ w.T), 1e-5 * (np.abs(x) @ np.abs(w.T)) + 1e-6)
