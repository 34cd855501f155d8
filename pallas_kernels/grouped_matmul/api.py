"""Public op: rows sorted by expert times one weight per expert."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.grouped_matmul import reference

BLOCK = 128  # DeepSeek's block size along N and K
FLOATS = (jnp.bfloat16, jnp.float16, jnp.float32)
QDTYPES = (jnp.int8, jnp.float8_e4m3fn)


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
      scale: [E, N, G], [E, N, 1] or [E, 1, 1] float, or 128x128 blocks [E, ceil(N/128), ceil(K/128)] with
        group_size 128; needed unless weight is float. W = (q - zero) * scale.
      zero: [E, N, G] or None (0; 8 for 4-bit).
      x_scale: float32 [T, 1] or [T, ceil(K/128)]; needed when x is int8 or fp8.
      group_size: K elements under one scale, -1 = K.
      out_dtype: None = x.dtype, or bfloat16 when x is quantized.

    Returns: [T, N]. Raises ValueError for shapes or dtypes outside the above.
    """
    _check(x, weight, group_sizes, scale, zero, x_scale, group_size)
    if out_dtype is None:
        out_dtype = jnp.bfloat16 if x.dtype in QDTYPES else x.dtype
    if jnp.dtype(out_dtype) not in FLOATS:
        raise ValueError(f"grouped_matmul: out_dtype must be bfloat16, float16 or float32, got {out_dtype}")
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


def _check(x, weight, group_sizes, scale, zero, x_scale, group_size) -> None:
    packed = weight.dtype == jnp.uint8
    if x.ndim != 2 or weight.ndim != 3 or weight.shape[2] * (2 if packed else 1) != x.shape[1]:
        raise ValueError(f"grouped_matmul: want x [T, K] and weight [E, N, K], got {x.shape} and {weight.shape}")
    if x.dtype not in (*FLOATS, *QDTYPES) or not (packed or weight.dtype in (*FLOATS, *QDTYPES)):
        raise ValueError(
            "grouped_matmul: x must be a 16- or 32-bit float, int8 or float8_e4m3fn, weight one of these or uint8, got "
            f"{x.dtype} and {weight.dtype}"
        )
    (tokens, k), (experts, n, _) = x.shape, weight.shape
    if group_sizes.shape != (experts,) or not jnp.issubdtype(group_sizes.dtype, jnp.integer):
        raise ValueError(f"grouped_matmul: group_sizes must be int32 ({experts},), got {group_sizes.shape}")
    if group_size != -1 and group_size < 1:
        raise ValueError(f"grouped_matmul: group_size must be positive, or -1 for K, got {group_size}")
    if scale is None and weight.dtype not in FLOATS:
        raise ValueError(f"grouped_matmul: a {weight.dtype} weight needs a scale")
    grid = (experts, n, 1 if group_size == -1 else -(-k // group_size))
    blocks = ((experts, -(-n // BLOCK), -(-k // BLOCK)),) if group_size == BLOCK else ()
    wanted = {"scale": (scale, (grid, (experts, n, 1), (experts, 1, 1), *blocks)), "zero": (zero, (grid,))}
    for name, (a, shapes) in wanted.items():
        if a is not None and a.shape not in shapes:
            raise ValueError(f"grouped_matmul: {name} must be {' or '.join(map(str, shapes))}, got {a.shape}")
    if scale is not None and not jnp.issubdtype(scale.dtype, jnp.floating):
        raise ValueError(f"grouped_matmul: scale must be a float dtype, got {scale.dtype}")
    if x_scale is None and x.dtype in QDTYPES:
        raise ValueError(f"grouped_matmul: x of {x.dtype} needs an x_scale")
    if x_scale is not None:
        shapes = ((tokens, 1), (tokens, -(-k // BLOCK)))
        if x_scale.shape not in shapes or x_scale.dtype != jnp.float32:
            found = f"{x_scale.dtype} {x_scale.shape}"
            raise ValueError(f"grouped_matmul: x_scale must be float32 {shapes[0]} or {shapes[1]}, got {found}")


dispatch.register("grouped_matmul", [dispatch.Implementation("xla", reference.grouped_matmul)])
