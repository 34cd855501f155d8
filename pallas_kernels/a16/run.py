"""From an op's arguments in the "sm90" layout to one of the kernels: pads x, completes tables, asks `choice`."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.a16 import choice, decode_sm90, fragments, held_sm90, wgmma_sm90
from pallas_kernels.a16 import layout as layouts
from pallas_kernels.a16.problem import Problem


@dataclasses.dataclass(frozen=True)
class Prepared:
    """Arrays as the kernels take them, and what is static about the product."""

    op: str
    x: jax.Array
    arrays: list[jax.Array]  # weight, scale and, where present, zero and offset
    problem: Problem
    n: int  # columns of the result before padding


def prepare(
    op: str,
    x: jax.Array,
    qweight: jax.Array,
    scale: jax.Array,
    zero: jax.Array | None,
    offset: jax.Array | None,
    perm: jax.Array | None,
    group_size: int,
    layout: str,
    four_bit: bool,
) -> Prepared:
    """Raises NotImplementedError with the reason when no kernel of this package takes the arguments."""
    problem = choice.problem_of(op, x, qweight, scale, zero, offset, group_size, layout, four_bit)
    found = layouts.parse(op, layout)
    k = x.shape[1]
    if offset is not None and offset.dtype != scale.dtype:
        offset = offset.astype(scale.dtype)
    if perm is not None:
        x = jnp.take(x, perm, axis=1, unique_indices=True, mode="clip")
    if problem.k != k:
        x = jnp.pad(x, ((0, 0), (0, problem.k - k)))
    arrays = [qweight, scale if problem.scales_in_epilogue else _complete(scale, problem)]
    arrays += [_complete(a, problem) for a in (zero, offset) if a is not None]
    return Prepared(op, x, arrays, problem, (found and found.n) or problem.n)


def _complete(table: jax.Array, problem: Problem) -> jax.Array:
    """A [1, 1], [N, 1] or one-group table for every row and group. Rare: one zero beside group scales, say."""
    if table.ndim == 2:
        table = fragments.pack_groups(jnp.broadcast_to(table, (problem.n, 1)))
    return jnp.broadcast_to(table, (table.shape[0], problem.groups, 8, 2))


_held = jax.jit(held_sm90.matmul, static_argnums=0)
_decode = jax.jit(decode_sm90.matmul, static_argnums=0)
_wgmma = jax.jit(wgmma_sm90.matmul, static_argnums=0)


def held(p: Prepared) -> jax.Array:
    """Small M, many rows of W. Raises NotImplementedError where another is better, or for what it cannot take."""
    return _held(choice.held(p.op, p.problem), p.x, *p.arrays)[:, : p.n]


def decode(p: Prepared) -> jax.Array:
    """Small M. Raises NotImplementedError where the wgmma kernel is the better one, or for shapes it cannot take."""
    return _decode(choice.decode(p.op, p.problem), p.x, *p.arrays)[:, : p.n]


def wgmma(p: Prepared) -> jax.Array:
    """Any M. Raises NotImplementedError for shapes it cannot take."""
    return _wgmma(choice.wgmma(p.op, p.problem), p.x, *p.arrays)[:, : p.n]


KERNELS = (held, decode, wgmma)  # in the order of `choice.candidates`
