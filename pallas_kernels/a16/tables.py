"""Scales, zeros and offsets [N, G] <-> the tables of the "sm90" layout (see `layout`), and padding."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.a16 import fragments
from pallas_kernels.a16.layout import scale_shape, table_shape


def pad(a: jax.Array, rows: int, columns: int) -> jax.Array:
    """Zeros after the last row and column."""
    if a.shape == (rows, columns):
        return a
    return jnp.pad(a, ((0, rows - a.shape[0]), (0, columns - a.shape[1])))


def pack_table(a: jax.Array, rows: int, groups: int) -> jax.Array:
    """[N, G] -> `table_shape`."""
    return _packed(a, table_shape(a.shape, rows, groups))


def unpack_table(a: jax.Array, rows: int, groups: int) -> jax.Array:
    """The inverse of `pack_table`, padding cut off."""
    if a.shape == (1, 1):
        return a
    return fragments.unpack_groups(a)[:rows, :groups]


def pack_scale(scale: jax.Array, rows: int, groups: int, has_offset: bool) -> jax.Array:
    """[N, G] -> `scale_shape`."""
    return _packed(scale, scale_shape(scale.shape, rows, groups, has_offset))


def unpack_scale(scale: jax.Array, rows: int, groups: int) -> jax.Array:
    if scale.ndim == 2:
        return scale if scale.shape == (1, 1) else scale[:rows]
    return unpack_table(scale, rows, groups)


def _packed(a: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    if len(shape) == 2:
        return a if a.shape == shape else pad(a, *shape)
    tiles, groups, *_ = shape
    return fragments.pack_groups(pad(a, tiles * fragments.ROWS, groups))
