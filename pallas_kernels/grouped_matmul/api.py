"""Public op: rows sorted by expert times one weight per expert."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.grouped_matmul import reference


def grouped_matmul(
    x: jax.Array,
    weight: jax.Array,
    group_sizes: jax.Array,
    *,
    scale: jax.Array | None = None,
    zero: jax.Array | None = None,
    x_scale: jax.Array | None = None,
    group_size: int = -1,
    out_dtype: jax.typing.DTypeLike | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """y[t,n] = sum_k x[t,k] * W[e(t),n,k] where e(t) is the expert whose run of rows holds t.

    Args:
      x: [T, K], rows sorted by expert: expert e owns the rows [sum(group_sizes[:e]), sum(group_sizes[:e+1])).
        bfloat16/float16/float32, or int8/float8_e4m3fn with x_scale.
      weight: [E, N, K] float, int8 or float8_e4m3fn; or uint8 [E, N, K/2]: unsigned 4-bit, low nibble = even k.
      group_sizes: [E] int32, sum <= T. Rows past the sum give zeros (they are padding).
      scale: [E, N, G] or [E, 1, 1] float, or 128x128 blocks [E, ceil(N/128), ceil(K/128)] with group_size 128;
        needed unless weight is float. W = (q - zero) * scale.
      zero: [E, N, G] or None (0; 8 for 4-bit).
      x_scale: float32 [T, 1] or [T, ceil(K/128)]; needed when x is int8 or fp8.
      group_size: K elements under one scale, -1 = K.
      out_dtype: None = x.dtype, or bfloat16 when x is quantized.

    Returns: [T, N]. Raises ValueError for shapes or dtypes outside the above.
    """
    packed = weight.dtype == jnp.uint8
    if x.ndim != 2 or weight.ndim != 3 or weight.shape[2] * (2 if packed else 1) != x.shape[1]:
        raise ValueError(f"grouped_matmul: want x [T, K] and weight [E, N, K], got {x.shape} and {weight.shape}")
    experts = weight.shape[0]
    if group_sizes.shape != (experts,) or not jnp.issubdtype(group_sizes.dtype, jnp.integer):
        raise ValueError(f"grouped_matmul: group_sizes must be int32 ({experts},), got {group_sizes.shape}")
    quantized = not jnp.issubdtype(weight.dtype, jnp.floating) or weight.dtype.itemsize == 1
    if quantized and scale is None:
        raise ValueError(f"grouped_matmul: a {weight.dtype} weight needs a scale")
    if scale is not None and (scale.ndim != 3 or scale.shape[0] != experts):
        raise ValueError(f"grouped_matmul: scale must be [E, N, G], got {scale.shape}")
    if x.dtype.itemsize == 1 and x_scale is None:
        raise ValueError(f"grouped_matmul: x of {x.dtype} needs an x_scale")
    if out_dtype is None:
        out_dtype = jnp.bfloat16 if x.dtype.itemsize == 1 else x.dtype
    return dispatch.call(
        "grouped_matmul",
        implementation,
        x,
        weight,
        group_sizes,
        scale=scale,
        zero=zero,
        x_scale=x_scale,
        group_size=group_size,
        out_dtype=out_dtype,
    )


dispatch.register("grouped_matmul", [dispatch.Implementation("xla", reference.grouped_matmul)])
