"""XLA implementation of w8a16_matmul: runs anywhere; in float32 on the CPU it is the oracle of the tests."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.w8a16 import layout as layouts

_NT = (((1,), (1,)), ((), ()))  # contract the last axis of both operands


def dequantize(
    qweight: jax.Array,
    scale: jax.Array,
    zero: jax.Array | None,
    group_size: int,
    dtype: jax.typing.DTypeLike,
) -> jax.Array:
    """Canonical arrays -> W [N, K] in `dtype`: (q - zero) * scale, computed in float32 and rounded once."""
    k = qweight.shape[1]
    group = k if group_size == -1 else group_size

    def per_element(a: jax.Array) -> jax.Array:
        a = a.astype(jnp.float32)
        if a.shape[1] == 1:
            return a
        rows, groups = a.shape
        return jnp.broadcast_to(a[:, :, None], (rows, groups, group)).reshape(rows, groups * group)[:, :k]

    q = qweight.astype(jnp.float32)
    if zero is not None:
        q = q - per_element(zero)
    elif qweight.dtype == jnp.uint8:
        q = q - 128.0
    return (q * per_element(scale)).astype(dtype)


@functools.partial(jax.jit, static_argnames=("group_size", "layout"))
def w8a16_matmul(
    x: jax.Array,
    qweight: jax.Array,
    scale: jax.Array,
    zero: jax.Array | None = None,
    *,
    perm: jax.Array | None = None,
    group_size: int,
    layout: str = "canonical",
) -> jax.Array:
    """See `api.w8a16_matmul`. W is materialised once, in x's dtype; sums are in float32."""
    if perm is not None:
        # XLA's CPU backend sums in bfloat16 where it fuses the gather into the product: 2 % off at K = 4,096.
        x = lax.optimization_barrier(jnp.take(x, perm, axis=1))
    qweight, scale, zero = layouts.from_layout(qweight, scale, zero, layout, group_size)
    w = dequantize(qweight, scale, zero, group_size, x.dtype)
    # The result dtype is asked of the dot itself: a float32 result would be written and read once more on the GPU.
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return lax.dot_general(x, w, _NT, precision=precision, preferred_element_type=x.dtype)
