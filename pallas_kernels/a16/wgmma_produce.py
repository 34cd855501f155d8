"""The wgmma kernel's producer: one warp that streams x, weights and tables into the stages, and what both sides share.

The whole loop runs in the lane that elect.sync names, and copies a stage's weights, and its x, as one box each: 36
instructions a stage. Predicated on lane 0 instead, ptxas does not know that the predicate holds in one lane alone and
makes each copy a loop over lanes: 137 instructions for a stage of 64 columns of int8, 231 for one of 128; gate_up at
M = 64 took 42.5 us in place of 36.4 (8 bits, H200).
"""

from __future__ import annotations

from collections.abc import Sequence

from jax.experimental.mosaic import gpu as mosaic_gpu
from jax.experimental.mosaic.gpu import utils as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, memref

from pallas_kernels.a16 import ptx
from pallas_kernels.a16.ptx import Int
from pallas_kernels.a16.stored import BLOCK_BYTES, ROWS
from pallas_kernels.a16.wgmma_plan import CHUNK, Plan


class Block:
    """Thread coordinates and the addresses in shared memory: stages (1024-aligned), outputs, barriers."""

    def __init__(self, plan: Plan, smem: ir.Value):
        c = plan.config
        self.tid = ptx.special("%tid.x")
        self.warp = Int(mgpu.warp_idx(sync=True))
        self.lane = self.tid & 31
        self.leader = self.lane.eq(0)
        # Which part of a stage's columns is this warpgroup's, which of its rows, and their first group of scales.
        self.plan = plan
        self.k_group = self.warp // (4 * c.row_groups) if c.k_groups > 1 else Int.of(0)
        self.row_warp = self.warp % (4 * c.row_groups) if c.k_groups > 1 else self.warp
        self.first_group = self.k_group * plan.group_step // plan.group if c.k_groups > 1 else 0
        self.rank = ptx.special("%cluster_ctarank") if c.split > 1 else Int.of(0)  # along K
        self.cluster = ptx.special("%ctaid.x") // c.split
        self.smem = smem
        self.stages = ptx.shared_address(smem)
        self.out = self.stages + (0 if plan.one_round else plan.stages * plan.stage_bytes)
        self.full = self.stages + -(-plan.data_bytes // 16) * 16
        self.empty = self.full + 8 * plan.stages
        self.ready = self.empty + 8 * plan.stages  # all blocks' sums are written

    def part(self, at: Int, size: int) -> Int:
        """Where this warpgroup's columns begin in `size` bytes of all of a stage's."""
        groups = self.plan.config.k_groups
        return at + self.k_group * (size // groups) if groups > 1 else at


def coordinates(plan: Plan, b: Block, i: Int) -> tuple[Int, Int, Int]:
    """(row tile of W, row tile of x, part of K) of the i'th tile: neighbours share the weights."""
    tile = b.cluster + i * plan.clusters
    part = tile % plan.config.parts if plan.config.parts > 1 else b.rank
    tile = tile // plan.config.parts
    return tile // plan.m_tiles, tile % plan.m_tiles, part


def next_stage(stage: Int, phase: Int, stages: int) -> tuple[Int, Int]:
    wrap = (stage + 1).eq(stages)
    return ptx.select(wrap, 0, stage + 1), ptx.select(wrap, phase ^ 1, phase)


def produce(plan: Plan, ctx, b: Block, tile_count: Int, x_ref, w_ref, tables: Sequence[ir.Value]) -> None:
    """All stages of all tiles of this block. For the producer warp; x_ref and w_ref as `views` makes them."""
    with ptx.when(ptx.elect()):
        _loop(_Copies(plan, ctx, b), tile_count, x_ref, w_ref, tables)
    ptx.syncwarp()


def views(plan: Plan, x, weight):
    """x [M, K] and the packed weight [N/16, B] as the copies slice them: wide boxes have a third axis."""
    return x.reshape(plan.m, plan.k // 64, 64), weight.reshape(weight.shape[0], -1, CHUNK)


class _Copies:
    """Copies into one block's stages, by the one lane that runs."""

    def __init__(self, plan: Plan, ctx, b: Block):
        self.plan, self.ctx, self.b = plan, ctx, b
        self.element = ir.BF16Type.get() if plan.x_dtype == "bf16" else ir.F16Type.get()
        self.pointer = ir.Type.parse("!llvm.ptr<3>")
        self.index = ir.IndexType.get()

    def _copy(self, ref, shape: Sequence[int], kind: ir.Type, at: Int, slices: Sequence[object], barrier: Int, **more):
        target = ir.MemRefType.get(shape, kind, memory_space=mgpu.smem())
        self.ctx.async_copy(
            src_ref=ref,
            dst_ref=memref.view(target, self.b.smem, arith.index_cast(self.index, at.value), []),
            gmem_slice=tuple(slices),
            barrier=mgpu.BarrierRef(llvm.inttoptr(self.pointer, barrier.value), mgpu.c(0, ptx.i32_type()), None, 1),
            arrive=False,
            predicate=None,
            **more,
        )

    def _range(self, start: Int, size: int):
        return mgpu.ds(arith.index_cast(self.index, start.value), size)

    def x(self, x_ref, at: Int, row: Int, k0: Int, barrier: Int) -> None:
        """[m_tile, k_step] of x to [k_step/64][m_tile][64] in the 128-byte swizzle."""
        c = self.plan.config
        parts = c.k_step // 64
        box = (self._range(row, c.m_tile), self._range(k0 // 64, parts), mgpu.ds(0, 64))
        turned = mosaic_gpu.TransposeTransform((1, 0, 2))
        shape = (parts, c.m_tile, 64)
        self._copy(x_ref, shape, self.element, at, box, barrier, swizzle=128, gmem_transform=(turned,))

    def weights(self, w_ref, at: Int, row: Int, column: Int, barrier: Int) -> Int:
        """[row_tiles] pieces from byte `column` of a row, to [row tile][piece]; returns the offset behind them."""
        plan = self.plan
        kind = ir.MemRefType(w_ref.type).element_type
        chunks = plan.piece // CHUNK
        box = (self._range(row, plan.row_tiles), self._range(column // CHUNK, chunks), mgpu.ds(0, CHUNK))
        self._copy(w_ref, (plan.row_tiles, chunks, CHUNK), kind, at, box, barrier)
        return at + plan.row_tiles * plan.piece

    def table(self, ref, at: Int, row: Int, group: Int, barrier: Int) -> None:
        """The entries of a stage's groups, [row tile][16 rows of each group]."""
        entries = ROWS * self.plan.step_groups
        slices = (self._range(row, self.plan.row_tiles), self._range(group * ROWS, entries))
        self._copy(ref, (self.plan.row_tiles, entries), ir.MemRefType(ref.type).element_type, at, slices, barrier)


def _loop(copies: _Copies, tile_count: Int, x_ref, w_ref, tables: Sequence[ir.Value]) -> None:
    plan, b = copies.plan, copies.b
    c = plan.config

    def tile_body(i: Int, carry):
        n_tile, m_tile, k_part = coordinates(plan, b, i)
        row = n_tile * plan.row_tiles

        def step_body(step: Int, carry):
            stage, phase = Int(carry[0]), Int(carry[1])
            ptx.mbarrier_wait(b.empty + stage * 8, phase ^ 1)
            barrier = b.full + stage * 8
            k0 = k_part * plan.k_block + step * c.k_step
            ptx.mbarrier_expect(barrier, plan.copied_bytes)
            at = stage * plan.stage_bytes
            copies.x(x_ref, at, m_tile * c.m_tile, k0, barrier)
            at = copies.weights(w_ref, at + plan.x_bytes, row, k0 // plan.kind.block_k * BLOCK_BYTES, barrier)
            for table, size in zip(tables, (s for s in plan.table_bytes() if s), strict=True):
                copies.table(table, at, row, k0 // plan.group, barrier)
                at = at + plan.row_tiles * size
            stage, phase = next_stage(stage, phase, plan.stages)
            return [stage.value, phase.value]

        # LLVM unrolls a short loop of known length, for which the producer's 24 registers are too few.
        steps = ptx.opaque(plan.steps) if c.k_groups > 1 else plan.steps
        return ptx.loop(steps, carry, step_body)

    ptx.loop(tile_count, [ptx.const(0), ptx.const(0)], tile_body)
