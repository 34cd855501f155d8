"""XLA implementation of w4a16_matmul: runs anywhere; in float32 on the CPU it is the oracle of the tests."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.w4a16 import layout as layouts

_NT = (((1,), (1,)), ((), ()))  # contract the last axis of both operands


def unpack(qweight: jax.Array) -> jax.Array:
    """[N, K/2] uint8 -> [N, K] uint8 of nibbles; the low nibble is the even k."""
    n, half = qweight.shape
    return jnp.stack([qweight & 15, qweight >> 4], axis=-1).reshape(n, 2 * half)


def dequantize(
    qweight: jax.Array,
    scale: jax.Array,
    zero: jax.Array | None,
    offset: jax.Array | None,
    group_size: int,
    dtype: jax.typing.DTypeLike,
) -> jax.Array:
    """Canonical arrays -> W [N, K] in `dtype`: (u - zero) * scale, or (u - 8) * scale + offset.

    Computed in float32 and rounded once; XLA fuses it into one pass that writes only `dtype`.
    """
    n, k = qweight.shape[0], 2 * qweight.shape[1]
    group = k if group_size == -1 else group_size
    groups = -(-k // group)

    def per_element(a: jax.Array) -> jax.Array:
        a = jnp.broadcast_to(a, (n, groups)).astype(jnp.float32)
        return jnp.broadcast_to(a[:, :, None], (n, groups, group)).reshape(n, groups * group)[:, :k]

    u = unpack(qweight).astype(jnp.float32)
    value = (u - (8.0 if zero is None else per_element(zero))) * per_element(scale)
    if offset is not None:
        value = value + per_element(offset)
    return value.astype(dtype)


@functools.partial(jax.jit, static_argnames=("group_size", "layout"))
def w4a16_matmul(
    x: jax.Array,
    qweight: jax.Array,
    scale: jax.Array,
    zero: jax.Array | None = None,
    *,
    offset: jax.Array | None = None,
    perm: jax.Array | None = None,
    group_size: int,
    layout: str = "canonical",
) -> jax.Array:
    """See `api.w4a16_matmul`. W is materialised once, in x's dtype; sums are in float32."""
    if perm is not None:
        # XLA's CPU backend sums in bfloat16 where it fuses the gather into the product: 2 % off at K = 4,096.
        x = lax.optimization_barrier(jnp.take(x, perm, axis=1))
    qweight, scale, zero, offset = layouts.from_layout(qweight, scale, zero, offset, layout, group_size)
    w = dequantize(qweight, scale, zero, offset, group_size, x.dtype)
    # The result dtype is asked of the dot itself: a float32 result would be written and read once more on the GPU.
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return lax.dot_general(x, w, _NT, precision=precision, preferred_element_type=x.dtype)
