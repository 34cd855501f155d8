"""XLA implementation of grouped_matmul: dequantize, then lax.ragged_dot."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.dispatch import current_device


def dequantize(weight: jax.Array, scale: jax.Array | None, zero: jax.Array | None, group_size: int) -> jax.Array:
    """[E, N, K] float32 from any weight that `api.grouped_matmul` takes."""
    if weight.dtype == jnp.uint8:
        nibbles = jnp.stack([weight & 0xF, weight >> 4], axis=-1)
        weight = nibbles.reshape(*weight.shape[:2], -1)
        zero = jnp.asarray(8, jnp.float32) if zero is None else zero
    _, n, k = weight.shape
    value = weight.astype(jnp.float32)

    def expand(per_group):
        per_group = jnp.asarray(per_group, jnp.float32)
        if per_group.ndim == 0:
            return per_group
        if per_group.shape[1] not in (1, n):
            per_group = jnp.repeat(per_group, 128, axis=1)[:, :n]
        if per_group.shape[2] != 1:
            per_group = jnp.repeat(per_group, group_size, axis=2)[:, :, :k]
        return per_group

    if zero is not None:
        value = value - expand(zero)
    return value if scale is None else value * expand(scale)


def grouped_matmul(
    x: jax.Array, weight: jax.Array, group_sizes: jax.Array, *, scale, zero, x_scale, group_size: int, out_dtype
) -> jax.Array:
    """See `api.grouped_matmul`. Operands are float32 on the CPU (the oracle) and bf16 on a GPU."""
    on_gpu = current_device().platform == "cuda"
    dtype = jnp.bfloat16 if on_gpu else jnp.float32
    value = x.astype(jnp.float32)
    if x_scale is not None:
        value = value * (x_scale if x_scale.shape[1] == 1 else jnp.repeat(x_scale, 128, axis=1)[:, : x.shape[1]])
    w = dequantize(weight, scale, zero, group_size).astype(dtype).swapaxes(1, 2)
    out = lax.ragged_dot(
        value.astype(dtype),
        w,
        group_sizes.astype(jnp.int32),
        preferred_element_type=jnp.float32,
        precision=None if on_gpu else lax.Precision.HIGHEST,
    )
    # ragged_dot leaves the rows past the last group unspecified on some backends.
    inside = jnp.arange(x.shape[0])[:, None] < group_sizes.sum()
    return jnp.where(inside, out, 0).astype(out_dtype)
