"""grouped_matmul: the XLA reference against a loop over experts in float64."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import grouped_matmul

GROUPS = ([3, 0, 5, 2], [10, 0, 0, 0], [2, 2, 2, 2], [0, 0, 0, 0])


@pytest.mark.parametrize("sizes", GROUPS, ids=str)
@pytest.mark.parametrize("kind", ["bfloat16", "int8", "uint4", "fp8_block"])
def test_against_loop(kind, sizes):
    rng = np.random.default_rng(0)
    rows, experts, n, k = 10, 4, 256, 128
    x = jnp.asarray(rng.normal(size=(rows, k)), jnp.float32)
    options = {}
    if kind == "bfloat16":
        weight = jnp.asarray(rng.normal(size=(experts, n, k)), jnp.bfloat16)
        wide = np.asarray(weight).astype(np.float64)
    elif kind == "int8":
        weight = jnp.asarray(rng.integers(-127, 128, size=(experts, n, k)), jnp.int8)
        options["scale"] = jnp.asarray(rng.uniform(0.5, 1, size=(experts, n, 1)), jnp.float32)
        wide = np.asarray(weight).astype(np.float64) * np.asarray(options["scale"])
    elif kind == "fp8_block":
        weight = jnp.asarray(rng.normal(size=(experts, n, k)), jnp.float8_e4m3fn)
        scale = rng.uniform(0.5, 1, size=(experts, 2, 1)).astype(np.float32)
        options |= dict(scale=jnp.asarray(scale), group_size=128)
        wide = np.asarray(weight).astype(np.float64) * np.repeat(scale, 128, axis=1)
    else:
        u = rng.integers(0, 16, size=(experts, n, k)).astype(np.uint8)
        weight = jnp.asarray(u[..., ::2] | (u[..., 1::2] << 4))
        scale = rng.uniform(0.5, 1, size=(experts, n, k // 32)).astype(np.float32)
        zero = rng.integers(0, 16, size=scale.shape).astype(np.uint8)
        options |= dict(scale=jnp.asarray(scale), zero=jnp.asarray(zero), group_size=32)
        wide = (u - np.repeat(zero, 32, 2).astype(np.float64)) * np.repeat(scale, 32, 2)
    got = np.asarray(grouped_matmul(x, weight, jnp.asarray(sizes, jnp.int32), **options))
    expert = np.repeat(np.arange(experts), sizes)
    want = np.zeros((rows, n))
    for row, e in enumerate(expert):
        want[row] = wide[e] @ np.asarray(x[row]).astype(np.float64)
    # float32 sums of 128 products.
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * max(np.abs(want).max(), 1))


def test_wrong_arguments_are_named():
    x, w, sizes = jnp.ones((4, 8)), jnp.ones((2, 16, 8)), jnp.asarray([2, 2], jnp.int32)
    with pytest.raises(ValueError, match="weight \\[E, N, K\\]"):
        grouped_matmul(x, w[:, :, :4], sizes)
    with pytest.raises(ValueError, match="needs a scale"):
        grouped_matmul(x, w.astype(jnp.int8), sizes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale": jnp.ones((2, 255, 2))}, "scale must be"),  # was read as 255 blocks of 128 rows
        ({"scale": jnp.ones((2, 256, 3))}, "scale must be"),  # a group too many: was cut off
        ({"scale": jnp.ones((2, 256, 2)), "group_size": -1}, "scale must be"),
        ({"scale": jnp.ones((2, 2, 2)), "group_size": 64}, "scale must be"),  # blocks are of 128
        ({"scale": jnp.ones((2, 256, 2), jnp.int32)}, "float dtype"),
        ({"zero": jnp.ones((2, 256, 3), jnp.int8)}, "zero must be"),
        ({"x_scale": jnp.ones((4, 3))}, "x_scale must be float32"),
        ({"group_size": 0}, "group_size must be"),
        ({"x": jnp.ones((4, 256), jnp.int32)}, "x must be"),
        ({"weight": jnp.ones((2, 256, 256), jnp.int32)}, "weight one of these"),
        ({"out_dtype": jnp.int32}, "out_dtype must be"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(change, message):
    given = dict(
        x=jnp.ones((4, 256)),
        weight=jnp.ones((2, 256, 256), jnp.int8),
        group_sizes=jnp.asarray([2, 2], jnp.int32),
        scale=jnp.ones((2, 256, 2)),
        group_size=128,
    )
    assert grouped_matmul(**given).shape == (4, 256)
    with pytest.raises(ValueError, match=message):
        grouped_matmul(**{**given, **change})
