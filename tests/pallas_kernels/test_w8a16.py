"""w8a16: the XLA reference against numpy."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import KNOWN_DEVICES, use_device
from pallas_kernels.a16 import fragments, run
from pallas_kernels.w8a16 import layout as layouts
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


def test_act_order_in_bfloat16_sums_in_float32() -> None:
    rng, (m, n, k) = np.random.default_rng(0), (8, 64, 4096)
    x, perm = jnp.asarray(rng.standard_normal((m, k)), jnp.bfloat16), rng.permutation(k)
    q, scale = rng.integers(-127, 128, (n, k), dtype=np.int8), jnp.full((n, k // 128), 0.125, jnp.bfloat16)
    y = w8a16_matmul(x, jnp.asarray(q), scale, perm=jnp.asarray(perm), group_size=128)
    want = np.asarray(x, np.float64)[:, perm] @ (q.astype(float) * 0.125).T
    assert np.linalg.norm(np.asarray(y, np.float64) - want) < 0.003 * np.linalg.norm(
        want
    )  # the result's rounding alone


@pytest.mark.parametrize("zeros", ["group", "channel", "tensor"])
@pytest.mark.parametrize("scales", ["group", "channel", "tensor"])
def test_kernels_get_a_scale_and_a_zero_for_every_group(scales: str, zeros: str) -> None:
    """Of a padded weight, whichever of the two tables the api lets have fewer entries."""
    rng, n, k, group = np.random.default_rng(0), 100, 200, 64
    shapes = {"group": (n, 4), "channel": (n, 1), "tensor": (1, 1)}
    scale = rng.standard_normal(shapes[scales]).astype(np.float32)
    zero = rng.integers(0, 256, shapes[zeros]).astype(np.uint8)
    arrays = (jnp.zeros((n, k), jnp.uint8), jnp.asarray(scale), jnp.asarray(zero))
    h200 = KNOWN_DEVICES["h200"]
    layout = layouts.preferred_layout(n, k, group, "int", h200)
    with use_device(h200):
        packed = layouts.to_layout(*arrays, layout, group)
        p = run.prepare(
            "w8a16_matmul", jnp.zeros((3, k), jnp.bfloat16), *packed, None, None, group, layout, four_bit=False
        )
    _, found_scale, found_zero = p.arrays
    seen = np.asarray(found_scale if found_scale.ndim == 2 else fragments.unpack_groups(found_scale))
    np.testing.assert_array_equal(*np.broadcast_arrays(seen[:n, :4], scale))
    unpacked = np.asarray(fragments.unpack_groups(found_zero))[:n, :4] ^ 128
    np.testing.assert_array_equal(*np.broadcast_arrays(unpacked, zero))
