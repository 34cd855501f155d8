"""Canonical arrays <-> the arrays that kernels read. Every layout keeps N as the first axis.

canonical: qweight [N, K] int8 | uint8 | float8_e4m3fn, scale [N, G], [N, 1] or [1, 1], zero like scale or None.
sm90: see `pallas_kernels.a16.layout`. uint8 weights are stored with their top bit flipped (u - 128 as int8, in an
array that stays uint8), uint8 zeros beside them likewise.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.a16 import fragments, tables
from pallas_kernels.a16 import layout as sm90
from pallas_kernels.w8a16.choice import parse
from pallas_kernels.w8a16.choice import preferred_layout as preferred_layout

Arrays = tuple[jax.Array, jax.Array, jax.Array | None]


def _flip(a: jax.Array) -> jax.Array:
    return a ^ 128 if a.dtype == jnp.uint8 else a


@functools.partial(jax.jit, static_argnums=(3, 4))
def to_layout(qweight: jax.Array, scale: jax.Array, zero: jax.Array | None, layout: str, group_size: int) -> Arrays:
    """Canonical (qweight, scale, zero) -> the same three in `layout`.

    Raises ValueError for a layout that does not fit the weight: take it from `preferred_layout`.
    """
    if parse(layout) is None:
        return qweight, scale, zero
    n, k = qweight.shape
    sm90.check("w8a16_matmul", layout, n, k, group_size)
    rows, columns = sm90.padded_shape(n, k, group_size)
    groups = sm90.groups_of(columns, k, group_size)
    packed = fragments.pack8(tables.pad(_flip(qweight), rows, columns))
    return (
        packed,
        tables.pack_scale(scale, rows, groups, False),
        None if zero is None else tables.pack_table(_flip(zero), rows, groups),
    )


@functools.partial(jax.jit, static_argnums=(3, 4))
def from_layout(qweight: jax.Array, scale: jax.Array, zero: jax.Array | None, layout: str, group_size: int) -> Arrays:
    """The bit-exact inverse of `to_layout`."""
    found = parse(layout)
    if found is None:
        return qweight, scale, zero
    canonical = fragments.unpack8(qweight)
    n, k = found.n or canonical.shape[0], found.k or canonical.shape[1]
    groups = sm90.groups_of(k, k, group_size)
    return (
        _flip(canonical[:n, :k]),
        tables.unpack_scale(scale, n, groups),
        None if zero is None else _flip(tables.unpack_table(zero, n, groups)),
    )
