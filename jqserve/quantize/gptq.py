"""GPTQ (Frantar et al., arXiv:2210.17323): columns are rounded one after the other, and the error of each is made up
for in those that follow, weighted by the inverse of the input's second moment H.

Arrays are transposed here, [K, N]: a column of W is then contiguous. Rows of W do not interact, so Linears of one input
are solved as one matrix.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from jqserve.quantize.compiled import compiled
from jqserve.quantize.grid import Grid
from jqserve.quantize.on_grid import decode, encode, scales_of, span_of

HIGHEST = lax.Precision.HIGHEST
#: Columns whose errors are applied to the rest of the matrix at once; the paper's lazy batch.
BLOCK = 128


def damped(hessian: jax.Array, damp: float) -> jax.Array:
    """H [K, K] with features that were never active given the mean of the others, plus damp times the mean on the
    diagonal."""
    diagonal = jnp.diagonal(hessian)
    alive = diagonal > 0
    mean = jnp.sum(diagonal) / jnp.maximum(jnp.sum(alive), 1)
    mean = jnp.where(mean > 0, mean, 1.0)
    return hessian + jnp.diag(jnp.where(alive, 0.0, mean) + damp * mean)


@functools.partial(compiled, donate_argnums=0)
def inverse_factor(hessian: jax.Array, damp: float) -> jax.Array:
    """U, upper triangular, with U^T U = (damped H)^-1; NaN where that is not positive definite in float32.

    One factorization instead of the usual three steps: with J the reversal of the axis and J H J = L L^T,
    U = J L^-1 J.
    """
    lower = jnp.linalg.cholesky(damped(hessian, damp)[::-1, ::-1])
    eye = jnp.eye(hessian.shape[0], dtype=hessian.dtype)
    return lax.linalg.triangular_solve(lower, eye, left_side=True, lower=True)[::-1, ::-1]


def block_size(k: int, columns: int) -> int:
    """The largest block that divides a group of `columns`, up to BLOCK."""
    return next(size for size in range(min(BLOCK, columns), 0, -1) if columns % size == 0 and k % size == 0)


@functools.partial(compiled, static_argnums=0)
def solve(grid: Grid, weight: jax.Array, factor: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """weight float32 [K, N], factor [K, K] of `inverse_factor`, both in the order of work ->
    (codes uint8 [K, N], scale [G, N], zero [G, N]). Scales are found when a group is reached, from what the errors
    before it made of its columns."""
    k, n = weight.shape
    columns = grid.extent(n, k)[1]
    block = block_size(k, columns)

    def group(index: jax.Array, state: tuple) -> tuple:
        rest, codes, scales, zeros = state
        members = lax.dynamic_slice(rest, (index * columns, 0), (columns, n))
        scale, zero = (found[:, 0] for found in scales_of(*span_of(members.T, (1, columns)), grid))
        scales, zeros = scales.at[index].set(scale), zeros.at[index].set(zero)

        def step(i: jax.Array, inner: tuple) -> tuple:
            rest, codes = inner
            at = index * columns + i * block
            shared = jnp.broadcast_to(scale, (block, n)), jnp.broadcast_to(zero, (block, n))
            return _block(grid, rest, codes, factor, at, block, *shared)

        rest, codes = lax.fori_loop(0, columns // block, step, (rest, codes))
        return rest, codes, scales, zeros

    groups = k // columns
    empty = jnp.zeros((k, n), jnp.uint8), jnp.zeros((groups, n)), jnp.zeros((groups, n))
    return lax.fori_loop(0, groups, group, (weight, *empty))[1:]


@functools.partial(compiled, static_argnums=0)
def solve_static(
    grid: Grid, weight: jax.Array, factor: jax.Array, scale: jax.Array, zero: jax.Array, member: jax.Array
) -> jax.Array:
    """The same with scales [G, N] known beforehand; member int32 [K]: the group of each column in the order of work.
    Returns codes uint8 [K, N]."""
    k, n = weight.shape
    block = block_size(k, k)

    def step(i: jax.Array, state: tuple) -> tuple:
        own = lax.dynamic_slice(member, (i * block,), (block,))
        rest, codes = state
        return _block(grid, rest, codes, factor, i * block, block, scale[own], zero[own])

    return lax.fori_loop(0, k // block, step, (weight, jnp.zeros((k, n), jnp.uint8)))[1]


def _block(
    grid: Grid,
    rest: jax.Array,
    codes: jax.Array,
    factor: jax.Array,
    at: jax.Array,
    block: int,
    scale: jax.Array,
    zero: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Rounds columns at .. at + block and applies their errors to all that follow. scale, zero [block, n]."""
    k, n = rest.shape
    own = lax.dynamic_slice(rest, (at, 0), (block, n))
    rows = lax.dynamic_slice(factor, (at, 0), (block, k))
    corner = lax.dynamic_slice(rows, (0, at), (block, block))

    def column(j: jax.Array, state: tuple) -> tuple:
        own, errors, found = state
        code = encode(own[j], scale[j], zero[j], grid)
        error = (own[j] - decode(code, scale[j], zero[j])) / corner[j, j]
        own = own - corner[j][:, None] * error[None, :]  # corner[j] is zero before j
        return own, errors.at[j].set(error), found.at[j].set(code)

    empty = jnp.zeros((block, n)), jnp.zeros((block, n), jnp.uint8)
    _, errors, found = lax.fori_loop(0, block, column, (own, *empty))
    later = jnp.where(jnp.arange(k)[None, :] >= at + block, rows, 0.0)
    rest = rest - lax.dot_general(later, errors, (((0,), (0,)), ((), ())), precision=HIGHEST)
    return rest, lax.dynamic_update_slice(codes, found, (at, 0))
