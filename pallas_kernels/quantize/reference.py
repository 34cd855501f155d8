"""XLA implementation of the quantization ops: runs anywhere, the oracle of the tests."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.ahead import Ahead

FP8_MAX = 448.0  # largest finite float8_e4m3fn


def row_scale(y: jax.Array, block: int | None, divisor: float) -> jax.Array:
    """float32 [M, K] -> [M, 1] or [M, ceil(K/block)]: max|y| / divisor, 1 where that is 0."""
    m, k = y.shape
    block = block or max(k, 1)
    blocks = -(-k // block)
    magnitude = jnp.pad(jnp.abs(y), ((0, 0), (0, blocks * block - k))).reshape(m, blocks, block)
    absmax = jnp.max(magnitude, axis=-1, initial=0.0)
    scale = divide(absmax, jnp.broadcast_to(jnp.float32(divisor), absmax.shape))
    return jnp.where(scale == 0, 1.0, scale)


def divide(a: jax.Array, b: jax.Array) -> jax.Array:
    """a / b, rounded once; a and b of one shape, 0 / b = 0.

    XLA turns a division by a constant or by a broadcast into a multiplication by its rounded inverse. For int8 with
    divisor 127.5 that is not a matter of taste: a row's -absmax / scale is -127.5 up to a rounding, and falls on the
    side of -127 instead of -128 in 85 % of rows rather than 14 %. A divisor that depends on `a` is left alone.
    """
    return a / jnp.where(a == 0, 1.0, b)


def cast_scaled(y: jax.Array, scale: jax.Array, qdtype: jax.typing.DTypeLike) -> jax.Array:
    """clamp(y / scale) in qdtype; y float32 [M, K], scale [M or 1, 1] or [M, ceil(K/block)] already expanded to K."""
    y = divide(y, jnp.broadcast_to(scale, y.shape))
    if jnp.dtype(qdtype) == jnp.int8:
        return jnp.clip(jnp.round(y), -128, 127).astype(jnp.int8)
    return jnp.clip(y, -FP8_MAX, FP8_MAX).astype(qdtype)


def _quantize(y, qdtype, block, divisor):
    scale = row_scale(y, block, divisor)
    expanded = scale if block is None else jnp.repeat(scale, block, axis=1)[:, : y.shape[1]]
    return cast_scaled(y, expanded, qdtype), scale


def quantize_rows(
    x: jax.Array, qdtype, *, block: int | None = None, divisor: float, static_scale: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """See `api.quantize_rows`."""
    y = x.astype(jnp.float32)
    if static_scale is not None:
        return cast_scaled(y, static_scale, qdtype), static_scale
    return _quantize(y, qdtype, block, divisor)


def _add(x: jax.Array, residual: jax.Array) -> jax.Array:
    """x + residual, rounded to their dtype also where XLA would keep the float32 sum for its next use (on a GPU the
    scales then differed by up to 0.4 % from those of the stored sum)."""
    total = x.astype(jnp.float32) + residual.astype(jnp.float32)
    info = jnp.finfo(x.dtype)
    return jax.lax.reduce_precision(total, info.nexp, info.nmant).astype(x.dtype)


def rms_norm_quantize(
    x: jax.Array,
    weight: jax.Array,
    residual: jax.Array | None = None,
    *,
    eps: float,
    qdtype,
    block: int | None = None,
    divisor: float,
    ahead: Ahead | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `api.rms_norm_quantize`; `ahead` changes nothing."""
    if residual is not None:
        x = _add(x, residual)
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps) * weight.astype(jnp.float32)
    return *_quantize(y, qdtype, block, divisor), x


def silu_mul_quantize(
    gate_up: jax.Array, *, qdtype, block: int | None = None, divisor: float, ahead: Ahead | None = None
) -> tuple[jax.Array, jax.Array]:
    """See `api.silu_mul_quantize`; `ahead` changes nothing."""
    gate, up = jnp.split(gate_up.astype(jnp.float32), 2, axis=-1)
    return _quantize(jax.nn.silu(gate) * up, qdtype, block, divisor)
