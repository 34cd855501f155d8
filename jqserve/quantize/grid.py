"""`Grid`: the values that a weight may take, and how a group's scale is found. Array code, traced or not."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jqserve.errors import UnsupportedError

FP8_MAX = 448.0
Kind = Literal["int", "float8"]


@dataclasses.dataclass(frozen=True)
class Grid:
    """How one Linear's weight W [N, K] is stored.

    kind         int: unsigned codes 0 .. 2^bits - 1 around a zero point; float8: e4m3fn, +-448
    bits         2 to 8; 8 for float8
    symmetric    the zero point is 2^(bits - 1) everywhere, and none is stored
    group        (rows, columns) that share a scale; 0 stands for all of them: (1, 128) groups, (1, 0) per channel,
                 (0, 0) per tensor, (128, 128) blocks
    scale_dtype  what scales are stored in; they are rounded to it before a value is, so that the error of the rounding
                 is compensated like any other
    native       float dtype whose roundings the arithmetic follows step by step, or "float32". LLM Compressor computes
                 scale and x / scale in the dtype of the weight: its bytes can only be met that way
    reciprocal   values are multiplied by 448 / absmax, and the scale is that number's inverse, as in transformers' fp8
    min_zero     smallest zero point. 1 where a file stores zero - 1 (GPTQ v1): readers disagree about a stored -1
    """

    kind: Kind
    bits: int
    symmetric: bool
    group: tuple[int, int]
    scale_dtype: str = "float32"
    native: str = "float32"
    reciprocal: bool = False
    min_zero: int = 0

    @property
    def levels(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    @property
    def middle(self) -> int:
        """The zero point of a symmetric grid."""
        return 1 << (self.bits - 1)

    def extent(self, n: int, k: int) -> tuple[int, int]:
        """`group` with its zeros resolved for a weight of [n, k]."""
        return self.group[0] or n, self.group[1] or k

    def check(self, where: str, n: int, k: int) -> None:
        """Raises UnsupportedError when K is no multiple of the group: no format here stores a ragged last group."""
        _, columns = self.extent(n, k)
        if self.group[0] == 1 and k % columns:
            fitting = [size for size in (128, 64, 32) if k % size == 0]
            advice = f"--group-size {fitting[0]}" if fitting else "--group-size -1 (one scale a channel)"
            raise UnsupportedError(
                f"{where}: {k} in features are not a multiple of the group size {columns}; use {advice}, or --ignore "
                f"{where}"
            )


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


def storage(dtype: str) -> Any:
    """The numpy dtype of a scale dtype's name."""
    return np.dtype(getattr(ml_dtypes, dtype, dtype))
