"""Device code that loads scales in float32: of one row from global memory, of a group from a stage's table."""

from __future__ import annotations

from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from pallas_kernels.a16 import ptx
from pallas_kernels.a16.problem import Problem
from pallas_kernels.a16.ptx import Int


def load_row_scale(problem: Problem, s_ref: ir.Value, n: Int) -> ir.Value:
    """The float32 scale of row n from the [N, 1] or [1, 1] array."""
    size = 4 if problem.scale_dtype == "f32" else 2
    types = {"f32": ir.F32Type, "bf16": ir.BF16Type, "f16": ir.F16Type}
    index = Int.of(0) if problem.one_scale else n
    address = ptx.offset(ptx.global_address(s_ref), (index * size).i64())
    value = llvm.load(types[problem.scale_dtype].get(), llvm.inttoptr(llvm.PointerType.get(1), address))
    return value if size == 4 else arith.extf(ir.F32Type.get(), value)


def row_pair(problem: Problem, table: Int, group: Int | int, lane: Int) -> tuple[ir.Value, ir.Value]:
    """The float32 scales of rows g and g + 8 (g = lane / 4)."""
    at = table + (lane // 4) * (problem.scale_record // 8)
    at = at + group * problem.scale_record
    if problem.scale_dtype == "f32":
        low, high = ptx.load_shared(at, 2)
        return ptx.bits_to_f32(low), ptx.bits_to_f32(high)
    (word,) = ptx.load_shared(at, 1)
    if problem.scale_dtype == "f16":
        return ptx.half_to_f32(word, False), ptx.half_to_f32(word, True)
    return ptx.bits_to_f32(word << 16), ptx.bits_to_f32(word & 0xFFFF0000)
