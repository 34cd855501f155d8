"""The parts of an item whose blocks of keys several CTAs share: told through global memory, combined by the last.

A part is what a consumer warpgroup holds behind its blocks: accumulators not yet divided by the sum of weights, the
rows' maxima (in units of log2) and the lanes' sums. Threads exchange with their equals, 16 bytes at a time, so that no
layout is needed: `partial` is [CTAs, 2 warpgroups, Dh / 8 + 1, 128 threads, 4] float32. `flags` [CTAs, 2] int32 are
zero before and after each launch: whoever has read a part takes its flag down.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import scf, vector

from pallas_kernels.paged_attention.prefill_problem import CONSUMERS, Problem
from pallas_kernels.paged_attention.prefill_softmax import row_array, scalar
from pallas_kernels.paged_attention.prefill_walk import Item, part_before
from pallas_kernels.paged_attention.simt import Mlir, Reg


def factors(ops: Mlir, mine: Reg, theirs: Reg) -> tuple[Reg, Reg, Reg]:
    """(maximum of both, what this part is multiplied by, what the other is); maxima in units of log2, finite."""
    peak = ops.max(mine, theirs)
    return peak, ops.exp2(mine - peak), ops.exp2(theirs - peak)


class Combine:
    """Of one consumer warpgroup."""

    def __init__(self, ops: Mlir, p: Problem, thread: Reg, warpgroup: Reg):
        self.ops, self.p, self.lane, self.warpgroup = ops, p, thread & 127, warpgroup

    def _places(self, cta: Reg) -> tuple[Reg, Reg]:
        """Byte offsets: of this thread in the part of `cta`, of its flag."""
        slot = cta * CONSUMERS + self.warpgroup
        return slot * (self.p.partial_rows * 128 * 16) + (self.lane << 4), slot << 2

    def tell(self, out: Any, peak: Any, total: Any) -> None:
        ops = self.ops
        base, flag = self._places(ops.special("ctaid.x", again=True))
        values = [
            Reg(vector.extract(register, dynamic_position=[], static_position=[e]))
            for register in out.registers.flat
            for e in range(2)
        ]
        values += [scalar(r) for x in (peak, total) for r in x.registers.flat]
        for i in range(0, len(values), 4):
            ops.store_global4("partial", base + 512 * i, values[i : i + 4])
        utils.warpgroup_barrier()  # the flag's release covers what the others have written before it
        ops.when(self.lane.equals(0), lambda: ops.store_release("flags", flag, ops.const_i32(1)))

    def __call__(self, work: Item, out: Any, peak: Any, total: Any) -> list[Any]:
        """[out, peak, total] with the `work.before` parts of other CTAs."""

        def one(i: ir.Value, carry: list[Any]) -> list[Any]:
            cta, there = part_before(self.ops, self.p, work, Reg(i))
            flat = [r for x in carry for r in x.registers.flat]
            branch = scf.IfOp(there.value, [r.type for r in flat], has_else=True)
            with ir.InsertionPoint(branch.then_block):
                scf.yield_([r for x in self._with(cta, *carry) for r in x.registers.flat])
            with ir.InsertionPoint(branch.else_block):
                scf.yield_(flat)
            return _like(carry, list(branch.results))

        return utils.fori(work.before.value, [out, peak, total])(one).results

    def _with(self, cta: Reg, out: Any, peak: Any, total: Any) -> list[Any]:
        ops = self.ops
        base, flag = self._places(cta)
        ops.wait_acquire("flags", flag)
        count = 2 * out.registers.size
        theirs = [v for i in range(0, count + 4, 4) for v in ops.load_global4("partial", base + 512 * i)]
        utils.warpgroup_barrier()  # all have seen the flag
        ops.when(self.lane.equals(0), lambda: ops.store_release("flags", flag, ops.const_i32(0)))
        both = [factors(ops, scalar(m), t) for m, t in zip(peak.registers.flat, theirs[count : count + 2], strict=True)]
        sums = [
            ops.fma(scalar(t), a, other * b)
            for t, other, (_, a, b) in zip(total.registers.flat, theirs[count + 2 :], both, strict=True)
        ]
        registers = out.registers.copy()
        for n, (at, register) in enumerate(np.ndenumerate(out.registers)):
            _, a, b = both[at[4]]  # the lower 8 rows or the upper
            for e in range(2):
                value = Reg(vector.extract(register, dynamic_position=[], static_position=[e]))
                value = ops.fma(value, a, theirs[2 * n + e] * b)
                register = vector.insert(value.value, register, dynamic_position=[], static_position=[e])
            registers[at] = register
        combined = fa.FragmentedArray(_registers=registers, _layout=out.layout, _is_signed=out.is_signed)
        return [combined, row_array([m for m, _, _ in both], peak), row_array(sums, total)]


def _like(arrays: list[Any], flat: list[ir.Value]) -> list[Any]:
    """Arrays of the same layouts from their registers, one after another."""
    out, at = [], 0
    for x in arrays:
        registers = np.empty(x.registers.size, dtype=object)
        registers[:] = flat[at : at + registers.size]
        at += registers.size
        registers = registers.reshape(x.registers.shape)
        out.append(fa.FragmentedArray(_registers=registers, _layout=x.layout, _is_signed=x.is_signed))
    return out
