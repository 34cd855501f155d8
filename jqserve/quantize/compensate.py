"""GPTQ around its solver: the order of columns, groups, damping that holds, and what to do where nothing does."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jqserve.quantize.codes import Codes, of_device, round_to_nearest
from jqserve.quantize.gptq import inverse_factor, solve, solve_static
from jqserve.quantize.grid import Grid
from jqserve.quantize.host import Kept, fetch
from jqserve.quantize.on_grid import scales_of, span_of


@dataclasses.dataclass(frozen=True)
class Order:
    """act_order: columns with large inputs first. static_groups: groups and their scales are those of the original
    order, found before anything is rounded."""

    act_order: bool = False
    static_groups: bool = False


def quantize(weight: jax.Array, hessian: Kept, grid: Grid, damp: float, order: Order) -> tuple[Codes, str]:
    """weight float32 [N, K], hessian float32 [K, K] on the host -> (codes, a note or "").

    When the damped Hessian is not positive definite in float32 the damping is raised tenfold, as often as it takes;
    from 1 on the weight is rounded to nearest, and the note says so.
    """
    n, k = weight.shape
    fresh = fetch(hessian)
    diagonal = np.asarray(jnp.diagonal(fresh))
    dead = int((diagonal <= 0).sum())
    note = f"{dead} of {k} input features were never active" if dead else ""
    if dead == k:
        return round_to_nearest(weight, grid), "no input was ever active: rounded to nearest"
    perm = np.argsort(-diagonal, kind="stable").astype(np.int32) if order.act_order else None
    tried = damp
    while True:
        factor = inverse_factor(fresh if perm is None else fresh[perm][:, perm], tried)
        del fresh  # donated, or in the way of the solver
        if bool(jnp.isfinite(factor).all()):
            break
        tried *= 10
        if tried >= 1:
            return round_to_nearest(weight, grid), "the Hessian is singular at any damping: rounded to nearest"
        fresh = fetch(hessian)
    if tried != damp:
        note = f"{note}; damping raised to {tried:g}".lstrip("; ")
    columns = grid.extent(n, k)[1]
    if perm is None:
        values, scale, zero = solve(grid, weight.T, factor)
        return of_device(grid, values.T, scale.T, zero.T), note
    back = np.argsort(perm)
    if order.static_groups:
        scale, zero = scales_of(*span_of(weight, (1, columns)), grid)
        values = solve_static(grid, weight.T[perm], factor, scale.T, zero.T, perm // columns)
        return of_device(grid, values[back].T, scale, zero), note
    values, scale, zero = solve(grid, weight.T[perm], factor)
    index = None if columns == k else (back // columns).astype(np.int32)
    return of_device(grid, values[back].T, scale.T, zero.T, index), note
