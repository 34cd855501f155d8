"""How a group's scale is found, and values rounded to a `Grid`. Array code, traced or not."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jqserve.quantize.grid import FP8_MAX, Grid


def rounded(x: Any, dtype: str) -> jax.Array:
    """float32 values rounded to `dtype` and back. The barrier keeps XLA from dropping the pair of conversions, which it
    may do (xla_allow_excess_precision); reduce_precision would flush float16's denormals."""
    if dtype == "float32":
        return jnp.asarray(x, jnp.float32)
    return jax.lax.optimization_barrier(jnp.asarray(x, jnp.float32).astype(dtype)).astype(jnp.float32)


def kept(x: jax.Array) -> jax.Array:
    """`x`, computed as written: XLA would turn 1 / (a / b) into b / a, one rounding less."""
    return jax.lax.optimization_barrier(x)


def scales_of(low: jax.Array, high: jax.Array, grid: Grid) -> tuple[jax.Array, jax.Array]:
    """(scale, zero) float32 of groups whose values span low .. high; zero is in codes, 0 for float8.

    Symmetric: absmax / (levels / 2), the whole range is used, as GPTQModel and compressed-tensors do; float8:
    absmax / 448. Asymmetric: (high - low) / levels with 0 in range and zero = round(-low / scale). A group of zeros
    gets scale 1.
    """
    low, high = jnp.minimum(low, 0.0), jnp.maximum(high, 0.0)
    span = jnp.maximum(-low, high)
    if grid.kind == "float8":
        scale = rounded(span / FP8_MAX, grid.native)
    elif grid.symmetric:
        scale = rounded(span / (grid.levels / 2), grid.native)
    else:
        scale = rounded(rounded(high - low, grid.native) / grid.levels, grid.native)
    scale = rounded(scale, grid.scale_dtype)
    scale = jnp.where(scale > 0, scale, 1.0)
    if grid.kind == "float8":
        return scale, jnp.zeros_like(scale)
    if grid.symmetric:
        return scale, jnp.full_like(scale, grid.middle)
    signed = rounded(-grid.middle - rounded(low / scale, grid.native), grid.native)
    zero = jnp.clip(jnp.round(signed) + grid.middle, 0, grid.levels)
    if grid.min_zero:  # the range loses a step below, and must still reach `high`
        moved = rounded(jnp.maximum(scale, high / (grid.levels - grid.min_zero)), grid.scale_dtype)
        scale = jnp.where(zero < grid.min_zero, moved, scale)
        zero = jnp.maximum(zero, grid.min_zero)
    return scale, zero


def encode(value: jax.Array, scale: jax.Array, zero: jax.Array, grid: Grid) -> jax.Array:
    """float32 values -> codes (uint8, or float8_e4m3fn), scale and zero broadcast to them."""
    ratio = rounded(value / scale, grid.native)
    if grid.kind == "float8":
        return to_float8(ratio)
    signed = rounded(ratio + (zero - grid.middle), grid.native)
    return jnp.clip(jnp.round(signed) + grid.middle, 0, grid.levels).astype(jnp.uint8)


def to_float8(x: jax.Array) -> jax.Array:
    """float32 -> e4m3fn, nearest even; clamped first, since the type has no infinity and what passes 448 is NaN."""
    return jnp.clip(x, -FP8_MAX, FP8_MAX).astype(jnp.float8_e4m3fn)


def decode(code: jax.Array, scale: jax.Array, zero: jax.Array) -> jax.Array:
    """Codes -> float32 values."""
    return (code.astype(jnp.float32) - zero) * scale


def spread(table: jax.Array, extent: tuple[int, int], n: int, k: int) -> jax.Array:
    """A table of a value a group -> [n, k]."""
    rows, columns = extent
    if rows > 1:
        table = jnp.repeat(table, rows, axis=0)[:n]
    return jnp.repeat(table, columns, axis=1)[:, :k] if columns > 1 else table


def span_of(weight: jax.Array, extent: tuple[int, int]) -> tuple[jax.Array, jax.Array]:
    """Smallest and largest value of each group of [N, K], as tables [ceil(N / rows), ceil(K / columns)]."""
    rows, columns = extent
    n, k = weight.shape
    padded = jnp.pad(weight, ((0, -n % rows), (0, -k % columns)))  # zeros do not widen a range that holds zero
    tiles = padded.reshape(-(-n // rows), rows, -(-k // columns), columns)
    return tiles.min(axis=(1, 3)), tiles.max(axis=(1, 3))
