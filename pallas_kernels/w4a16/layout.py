"""Canonical arrays <-> the arrays that kernels read. Every layout keeps N as the first axis.

canonical: qweight uint8 [N, K/2] (low nibble = even k), scale [N, G], zero uint8 [N, G] or None, offset [N, G] or None.
sm90: see `pallas_kernels.a16.layout`.
"""

from __future__ import annotations

import functools

import jax

from pallas_kernels.a16 import fragments, tables
from pallas_kernels.a16 import layout as sm90
from pallas_kernels.w4a16.choice import parse
from pallas_kernels.w4a16.choice import preferred_layout as preferred_layout

Arrays = tuple[jax.Array, jax.Array, jax.Array | None, jax.Array | None]


@functools.partial(jax.jit, static_argnums=(4, 5))
def to_layout(
    qweight: jax.Array,
    scale: jax.Array,
    zero: jax.Array | None,
    offset: jax.Array | None,
    layout: str,
    group_size: int,
) -> Arrays:
    """Canonical (qweight, scale, zero, offset) -> the same four in `layout`.

    Raises ValueError for a layout that does not fit the weight: take it from `preferred_layout`.
    """
    if parse(layout) is None:
        return qweight, scale, zero, offset
    n, k = qweight.shape[0], 2 * qweight.shape[1]
    sm90.check("w4a16_matmul", layout, n, k, group_size)
    rows, columns = sm90.padded_shape(n, k, group_size)
    groups = sm90.groups_of(columns, k, group_size)
    packed = fragments.pack4(tables.pad(qweight, rows, columns // 2))
    return (
        packed,
        tables.pack_scale(scale, rows, groups, offset is not None),
        None if zero is None else tables.pack_table(zero, rows, groups),
        None if offset is None else tables.pack_table(offset, rows, groups),
    )


@functools.partial(jax.jit, static_argnums=(4, 5))
def from_layout(
    qweight: jax.Array,
    scale: jax.Array,
    zero: jax.Array | None,
    offset: jax.Array | None,
    layout: str,
    group_size: int,
) -> Arrays:
    """The bit-exact inverse of `to_layout`."""
    found = parse(layout)
    if found is None:
        return qweight, scale, zero, offset
    canonical = fragments.unpack4(qweight)
    n, k = found.n or canonical.shape[0], found.k or 2 * canonical.shape[1]
    groups = sm90.groups_of(k, k, group_size)
    return (
        canonical[:n, : k // 2],
        tables.unpack_scale(scale, n, groups),
        None if zero is None else tables.unpack_table(zero, n, groups),
        None if offset is None else tables.unpack_table(offset, n, groups),
    )
