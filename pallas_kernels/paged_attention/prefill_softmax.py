"""The softmax of one block of scores, in the registers that wgmma leaves them in.

A lane holds, of two rows (r and r + 8), every fourth pair of columns. Row values (maximum, sum) are kept as arrays in
wgmma's row layout; sums differ between the four lanes of a row until the end.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, scf, vector
from jaxlib.mlir.dialects import math as mlir_math

from pallas_kernels.paged_attention.prefill_problem import ROWS, Problem
from pallas_kernels.paged_attention.simt import Mlir, Reg

LOG2E = math.log2(math.e)
# The running maximum may lag behind the true one by 8: weights then reach 2^8, which changes neither their relative
# rounding nor the result, and the sums need rescaling in few blocks only. (FlashAttention-4's observation.)
LAG = 8.0
LOWEST = -1e30  # start of the running maximum: finite, so that a row without a visible key yet gives exp2(-inf) = 0


class Softmax:
    """`scale` multiplies the scores (with a soft cap: in front of it), otherwise in units of log2."""

    def __init__(self, ops: Mlir, p: Problem, thread: Reg, scale: Reg):
        self.ops, self.p, self.thread, self.scale = ops, p, thread, scale

    def __call__(self, s: Any, limit: Reg, peak: Any, total: Any, masked: bool) -> tuple[Any, ...]:
        """(maximum, factor of earlier sums, whether it is not 1, weights, sum in this lane's columns).

        `limit`: the last key that row 0 sees.
        """
        ops, p = self.ops, self.p
        factor = self.scale
        if p.soft_cap:
            s = s._pointwise(functools.partial(capped, ops, p.soft_cap, factor))
            factor = ops.const_f32(1.0)
        if masked:
            s = self._masked(s, limit)
        new, alpha, grown = self._maximum(s, factor, peak)
        minus = (new * -1.0).broadcast_in_dim((ROWS, p.config.block_kv), (0,), fa.WGMMA_LAYOUT)

        def shifted(x: ir.Value, m: ir.Value) -> ir.Value:
            return mlir_math.fma(x, vector.broadcast(x.type, factor.value), m)

        weights = s._pointwise(shifted, minus).exp2(approx=True)
        sums = row_array([tree(row, lambda x, y: x + y) for row in lane_rows(weights)], total)
        return new, alpha, grown, weights, total * alpha + sums

    def _masked(self, s: Any, limit: Reg) -> Any:
        """-inf where row r may not see column c: c - r > limit, or with a window c - r <= limit - window.

        A lane's elements differ from its first by constants, so each costs a comparison with an immediate and a select.
        """
        ops, p = self.ops, self.p
        lane, warp = self.thread & 31, (self.thread >> 5) & 3
        first = limit + (warp << 4) + (lane >> 2) - ((lane & 3) << 1)
        lowest = ops.const_f32(-math.inf)
        registers = s.registers.copy()
        for at, register in np.ndenumerate(s.registers):
            group, half = at[1], at[4]
            for e in range(2):
                column = 8 * (group - half) + e  # the other half's rows are 8 further down
                seen = first >= column
                if p.window is not None:
                    seen = ops.both(seen, first < column + p.window)
                value = Reg(vector.extract(register, dynamic_position=[], static_position=[e]))
                register = vector.insert(
                    ops.select(seen, value, lowest).value, register, dynamic_position=[], static_position=[e]
                )
            registers[at] = register
        return fa.FragmentedArray(_registers=registers, _layout=s.layout, _is_signed=s.is_signed)

    def _maximum(self, s: Any, factor: Reg, peak: Any) -> tuple[Any, Any, Reg]:
        """(maximum, factor of what was summed before, whether any of this warp's changed), in units of log2.

        The maximum follows a row's largest score only when that has grown by more than 2^LAG, which after a sequence's
        first block is rare: then the four lanes of a row need not even tell each other theirs.
        """
        ops = self.ops
        lane_high = [tree(row, ops.max) * factor for row in lane_rows(s)]
        old = [scalar(r) for r in peak.registers.flat]
        above = [was + LAG < high for was, high in zip(old, lane_high, strict=True)]
        grown = ops.any_lane(ops.either(*above))
        branch = scf.IfOp(grown.value, [ops.f32] * 4, has_else=True)
        with ir.InsertionPoint(branch.then_block):
            new, alpha = [], []
            for was, high in zip(old, lane_high, strict=True):
                for distance in (1, 2):
                    high = ops.max(high, ops.shuffle_xor(high, distance))
                new.append(ops.select(was + LAG < high, high, was))
                alpha.append(ops.exp2(was - new[-1]))
            scf.yield_([r.value for r in new + alpha])
        with ir.InsertionPoint(branch.else_block):
            scf.yield_([*(r.value for r in old), *[arith.constant(ops.f32, 1.0)] * 2])
        results = [Reg(r) for r in branch.results]
        return row_array(results[:2], peak), row_array(results[2:], peak), grown


def scalar(register: ir.Value) -> Reg:
    return Reg(vector.extract(register, dynamic_position=[], static_position=[0]))


def lane_rows(x: Any) -> list[list[Reg]]:
    """The elements that a lane holds of its two rows (r and r + 8) of an array in wgmma's layout."""
    rows = []
    for half in range(2):
        registers = x.registers[0, :, 0, 0, half].flat
        rows.append(
            [Reg(vector.extract(r, dynamic_position=[], static_position=[e])) for r in registers for e in range(2)]
        )
    return rows


def row_array(rows: list[Reg], like: Any) -> Any:
    """One value a row. Where the four lanes of a row hold different ones, only elementwise use is defined."""
    registers = np.empty(2, dtype=object)
    registers[:] = [vector.broadcast(old.type, r.value) for old, r in zip(like.registers.flat, rows, strict=True)]
    return fa.FragmentedArray(
        _registers=registers.reshape(like.registers.shape), _layout=like.layout, _is_signed=like.is_signed
    )


def tree(values: list[Reg], op: Callable[[Reg, Reg], Reg]) -> Reg:
    while len(values) > 1:
        half = len(values) // 2
        values = [op(x, y) for x, y in zip(values[:half], values[half:])] + values[2 * half :]
    return values[0]


def capped(ops: Mlir, cap: float, factor: Reg, x: ir.Value) -> ir.Value:
    """c tanh(x factor / c) = c - 2c / (1 + exp(2 x factor / c)), in units of log2."""
    out = x
    for e in range(ir.VectorType(x.type).shape[0]):
        v = Reg(vector.extract(x, dynamic_position=[], static_position=[e])) * factor
        r = ops.reciprocal(ops.exp2(v * (2 * LOG2E / cap)) + 1.0)
        v = ops.fma(r, ops.const_f32(-2 * cap * LOG2E), ops.const_f32(cap * LOG2E))
        out = vector.insert(v.value, out, dynamic_position=[], static_position=[e])
    return out
