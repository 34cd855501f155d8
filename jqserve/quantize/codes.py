"""`Codes`: a quantized weight before a format gives it its bits."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jqserve.quantize.compiled import compiled
from jqserve.quantize.grid import FP8_MAX, Grid, storage
from jqserve.quantize.on_grid import decode, encode, kept, scales_of, span_of, spread, to_float8


@dataclasses.dataclass(frozen=True)
class Codes:
    """W [N, K], quantized: W = (values - zero) * scale, all on the host.

    values       uint8 [N, K], or float8_e4m3fn [N, K]; columns in their original order
    scale        of grid.scale_dtype, a value a group: [ceil(N / rows), ceil(K / columns)]
    zero         uint8 of the scale's shape, or None: grid.middle (int), 0 (float8)
    group_index  int32 [K], the group of each column, or None: k // columns
    """

    grid: Grid
    values: np.ndarray
    scale: np.ndarray
    zero: np.ndarray | None = None
    group_index: np.ndarray | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape[0], self.values.shape[1]

    def rows(self, begin: int, end: int) -> Codes:
        """The rows begin..end alone, for grids whose scales belong to one row."""
        if self.grid.group[0] != 1:
            raise ValueError("scales are shared between rows")
        zero = None if self.zero is None else self.zero[begin:end]
        return dataclasses.replace(self, values=self.values[begin:end], scale=self.scale[begin:end], zero=zero)

    def on_device(self) -> jax.Array:
        """Dequantized, float32 [N, K]."""
        zero = np.float32(0 if self.grid.kind == "float8" else self.grid.middle) if self.zero is None else self.zero
        return _dequantize(self.grid, self.values, self.scale, zero, self.group_index)

    def dequantize(self) -> np.ndarray:
        """float32 [N, K], on the host."""
        return np.asarray(self.on_device())


@functools.partial(compiled, static_argnums=0)
def _dequantize(grid: Grid, values: Any, scale: Any, zero: Any, group_index: Any) -> jax.Array:
    n, k = values.shape
    scale, zero = scale.astype(jnp.float32), jnp.broadcast_to(jnp.asarray(zero, jnp.float32), scale.shape)
    if group_index is not None:
        return decode(values, scale[:, group_index], zero[:, group_index])
    extent = grid.extent(n, k)
    return decode(values, spread(scale, extent, n, k), spread(zero, extent, n, k))


def round_to_nearest(weight: Any, grid: Grid) -> Codes:
    """W [N, K] of any float dtype -> each value at its nearest code."""
    values, scale, zero = _nearest(grid, jnp.asarray(weight))
    return of_device(grid, values, scale, zero)


def of_device(grid: Grid, values: Any, scale: Any, zero: Any, group_index: Any = None) -> Codes:
    """Codes from device arrays: float32 scale and zero become what the grid stores."""
    keep_zero = grid.kind == "int" and not grid.symmetric
    return Codes(
        grid,
        np.asarray(values),
        np.asarray(scale).astype(storage(grid.scale_dtype)),
        np.asarray(zero).astype(np.uint8) if keep_zero else None,
        None if group_index is None else np.asarray(group_index, np.int32),
    )


@functools.partial(compiled, static_argnums=0)
def _nearest(grid: Grid, weight: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    n, k = weight.shape
    wide, extent = weight.astype(jnp.float32), grid.extent(n, k)
    low, high = span_of(wide, extent)
    if grid.reciprocal:
        span = jnp.maximum(-low, high)
        up = kept(jnp.where(span > 0, kept(1.0 / span) * FP8_MAX, 1.0))  # as torch computes 448 / absmax
        return to_float8(wide * spread(up, extent, n, k)), 1.0 / up, jnp.zeros_like(up)
    scale, zero = scales_of(low, high, grid)
    values = encode(wide, spread(scale, extent, n, k), spread(zero, extent, n, k), grid)
    return values, scale, zero
