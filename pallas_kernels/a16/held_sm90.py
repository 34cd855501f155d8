"""M <= 16 on Hopper with x held in registers: nothing but weights passes through shared memory.

The `warps` of a block divide K; each loads its slice of x once, as operand B of mma.m16n8k16, and keeps it (64
registers for M = 16 and 256 columns). A tile is 16 rows of W by all of K, contiguous in memory (32 KiB of 4-bit weights
at K = 4096), so that one bulk copy fetches it for all warps; one elected lane of a further warp keeps the ring filled.
The warps' float32 sums meet in shared memory, and 4 or 8 warps in turn add those of the tile before.

Against `decode_sm90`: no ldmatrix per step (one for 8 products), 2 copies a tile where there were 2 for every KiB, the
128 KiB that x took for M = 16 are ring, and tiles of 16 rows leave no SM idle (14 rounds of 13.6 tiles for N = 28672).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental.mosaic.gpu import utils as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from pallas_kernels.a16 import ptx
from pallas_kernels.a16.dequant import DEQUANT, LIFT, raised_u4, zero_pair
from pallas_kernels.a16.held_plan import Config as Config
from pallas_kernels.a16.held_plan import Plan
from pallas_kernels.a16.ptx import Int
from pallas_kernels.a16.row_scale import load_row_scale, row_pair
from pallas_kernels.a16.stored import BLOCK_BYTES, ROWS


def matmul(
    plan: Plan,
    x: jax.Array,
    weight: jax.Array,
    scale: jax.Array,
    zero: jax.Array | None = None,
    after: jax.Array | None = None,
) -> jax.Array:
    """x [M, K] by packed arrays (see `fragments`) -> [M, N] in x's dtype.

    `after` is not read: it orders this call behind another (benchmarks).
    """
    plan.check()
    c, x_dtype = plan.config, x.dtype
    optional = [a for a in (zero, after) if a is not None]
    refs = (plgpu.RefType(),) * (5 + len(optional))

    def body(*args):
        if c.pdl:
            plgpu.griddepcontrol_launch_dependents()
        # The primitive marks the kernel for programmatic launch; the wait itself stands in `_emit`, after prefetch.
        plgpu.inline_mgpu(arg_types=refs)(functools.partial(_emit, plan))(*args)
        if c.pdl:
            plgpu.griddepcontrol_wait()

    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((c.parts * plan.m, plan.n), x_dtype if c.parts == 1 else jnp.float32),
        grid=(plan.blocks * c.parts,),
        grid_names=("tile",),
        num_threads=plan.block_warps // 4 + 1,
        thread_name="wg",
        kernel_name="a16_held_sm90",
        scratch_types=[plgpu.SMEM((plan.data_bytes + plan.barrier_bytes,), jnp.uint8)],
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
        ),
    )
    y = kernel(x, weight, scale, *optional)
    return y if c.parts == 1 else y.reshape(c.parts, plan.m, plan.n).sum(axis=0).astype(x_dtype)


class _Block:
    """Thread coordinates and the addresses in shared memory."""

    def __init__(self, plan: Plan, smem: ir.Value):
        c = plan.config
        self.tid = ptx.special("%tid.x")
        self.warp = Int(mgpu.warp_idx(sync=True))
        self.lane = self.tid & 31
        self.leader = self.lane.eq(0)
        block = ptx.special("%ctaid.x")
        self.part: Int = block // plan.blocks if c.parts > 1 else Int.of(0)
        self.first: Int = block % plan.blocks if c.parts > 1 else block
        self.ring = ptx.shared_address(smem)
        self.sums = self.ring + plan.stages * plan.stage_bytes
        self.x = self.ring + (plan.data_bytes - plan.x_bytes)
        self.full = self.ring + plan.data_bytes
        self.empty = self.full + 8 * plan.stages
        self.x_full = self.empty + 8 * plan.stages
        self.x_held = self.x_full + 8
        self.meet = self.x_held + 8
        self.tile_count = (Int.of(plan.tiles - 1) - self.first) // plan.blocks + 1


def _emit(plan: Plan, ctx, x_ref, w_ref, s_ref, *rest):
    del ctx
    *optional, y_ref, smem = rest
    tables = [*([] if plan.scales_in_epilogue else [s_ref]), *optional[: plan.has_zero]]
    b = _Block(plan, smem)
    c = plan.config
    with ptx.when(b.tid.eq(0)):
        for stage in range(plan.stages):
            ptx.mbarrier_init(b.full + 8 * stage, 1)
            ptx.mbarrier_init(b.empty + 8 * stage, c.warps // c.pieces)
        ptx.mbarrier_init(b.x_full, 1)
        ptx.mbarrier_init(b.x_held, plan.block_warps)
        ptx.mbarrier_init(b.meet, plan.block_warps)
        ptx.fence_mbarrier_init()
        ptx.mbarrier_expect(b.x_full, plan.m * plan.k_block * 2)
    ptx.syncthreads()
    multiplies = b.warp.lt(plan.block_warps)
    with ptx.when(arith.xori(multiplies, arith.constant(ir.IntegerType.get_signless(1), 1))):
        ptx.set_registers(plan.producer_registers, increase=False)
        with ptx.when(b.warp.eq(plan.block_warps)):
            with ptx.when(ptx.elect()):
                _produce(plan, b, x_ref, w_ref, tables)
            ptx.syncwarp()
    with ptx.when(multiplies):
        ptx.set_registers(plan.consumer_registers, increase=True)
        _consume(plan, b, s_ref, y_ref)


# --- the producer: one lane ---


def _produce(plan: Plan, b: _Block, x_ref, w_ref, tables) -> None:
    """Fills the stages that x does not lie over, loads x, and goes on when the warps hold it."""
    c = plan.config
    bases = [ptx.global_address(r) for r in (w_ref, *tables)]
    for stage in range(plan.early):
        with ptx.when(Int.of(stage // c.pieces).lt(b.tile_count)):
            _fetch(plan, b, bases, Int.of(stage), Int.of(stage))
    if c.pdl:
        ptx.asm("griddepcontrol.wait;")
    x_base = ptx.global_address(x_ref)

    def row_body(j: Int, carry):
        source = ptx.offset(x_base, (j * (plan.k * 2)).i64(), (b.part * (plan.k_block * 2)).i64())
        ptx.bulk_load_keep(b.x + j * plan.x_stride, source, plan.k_block * 2, b.x_full)
        return carry

    ptx.loop(plan.m, [], row_body)
    if plan.early < plan.stages:  # the others are x's
        ptx.mbarrier_wait(b.x_held, Int.of(0))
    total = b.tile_count * c.pieces
    left = ptx.select(Int.of(plan.early).lt(total), total - plan.early, 0)

    def piece_body(j: Int, carry):
        stage, phase = Int(carry[0]), Int(carry[1])
        ptx.mbarrier_wait(b.empty + stage * 8, phase ^ 1)
        _fetch(plan, b, bases, j + plan.early, stage)
        wrap = (stage + 1).eq(plan.stages)
        return [ptx.select(wrap, 0, stage + 1).value, ptx.select(wrap, phase ^ 1, phase).value]

    ptx.loop(left, [ptx.const(plan.early % plan.stages), ptx.const(plan.early // plan.stages)], piece_body)


def _fetch(plan: Plan, b: _Block, bases, number: Int, stage: Int) -> None:
    """Starts the copies of this block's number'th piece: weights, then their scales and zeros."""
    c = plan.config
    barrier = b.full + stage * 8
    target = b.ring + stage * plan.stage_bytes
    ptx.mbarrier_expect(barrier, plan.copied_bytes)
    row = b.first + number // c.pieces * plan.blocks
    column = b.part * plan.k_block + number % c.pieces * plan.k_piece
    row_bytes = plan.k // plan.kind.block_k * BLOCK_BYTES
    row_start = arith.muli(row.i64(), arith.constant(ptx.i64_type(), row_bytes))
    source = ptx.offset(bases[0], row_start, (column // plan.kind.block_k * BLOCK_BYTES).i64())
    ptx.bulk_load(target, source, plan.weight_bytes, barrier)
    at = plan.weight_bytes
    sizes = [(size, record) for size, record in zip(plan.table_bytes(), (plan.scale_record, 16, 0)) if size]
    for base, (size, record) in zip(bases[1:], sizes, strict=True):
        index = row * plan.groups + column // plan.group
        ptx.bulk_load(target + at, ptx.offset(base, (index * record).i64()), size, barrier)
        at += size


# --- the warps that multiply ---


def _consume(plan: Plan, b: _Block, s_ref, y_ref) -> None:
    c = plan.config
    y_base = ptx.global_address(y_ref)
    if c.pdl:
        ptx.asm("griddepcontrol.wait;")
    x = _hold_x(plan, b)
    start = _raised_sums(plan, x) if c.lift else {}
    each = c.warps // c.pieces
    piece, place = (b.warp // each, b.warp % each) if c.pieces > 1 else (Int.of(0), b.warp)
    zero_acc = [ptx.f32(0.0)] * (4 * plan.n_tiles)
    idle = plan.block_warps != c.warps

    def tile_body(i: Int, carry):
        stage, phase = Int(carry[0]), Int(carry[1])

        def multiply(_: Int, carry):
            ptx.mbarrier_wait(b.full + stage * 8, phase)
            acc = _multiply(plan, b, x, start, b.ring + stage * plan.stage_bytes, place)
            ptx.syncwarp()
            with ptx.when(b.leader):
                ptx.mbarrier_arrive(b.empty + stage * 8)
            return acc

        active = b.warp.lt(c.warps)
        acc = ptx.loop(ptx.select(active, 1, 0), zero_acc, multiply) if idle else multiply(i, [])
        # The tile before is finished only now: its slowest warp had this tile's time to arrive.
        with ptx.when(Int.of(0).lt(i)):
            _finish(plan, b, i - 1, s_ref, y_base)
        with ptx.when(i.eq(0)):  # the sums lie where x was
            ptx.mbarrier_wait(b.x_held, Int.of(0))
        _store_sums(plan, b, i, acc)
        after = stage + c.pieces
        wrap = Int.of(plan.stages - 1).lt(after)
        return [ptx.select(wrap, after - plan.stages, after).value, ptx.select(wrap, phase ^ 1, phase).value]

    ptx.loop(b.tile_count, [piece.value, ptx.const(0)], tile_body)
    _finish(plan, b, b.tile_count - 1, s_ref, y_base)


def _hold_x(plan: Plan, b: _Block) -> dict[tuple[int, int], list[Int]]:
    """(16-column step, eight rows of x) -> operand B of this warp's slice; then the producer may write over x."""
    ptx.mbarrier_wait(b.x_full, Int.of(0))
    slice_at = b.warp * (plan.k_warp * 2)
    if plan.block_warps != plan.config.warps:
        slice_at = slice_at.min((plan.config.warps - 1) * plan.k_warp * 2)
    held = {}
    for t in range(plan.n_tiles):
        # Lane l reads row l % 8 of the 8x8 matrix l / 8; rows past M repeat the last one, their sums are not stored.
        row = (b.lane % 8 + 8 * t).min(plan.m - 1)
        at = b.x + row * plan.x_stride + (b.lane // 8) * 16 + slice_at
        for step in range(0, plan.k_warp // 16, 2):
            words = ptx.ldmatrix_x4(at + step * 32)
            held[step, t], held[step + 1, t] = words[:2], words[2:]
    ptx.keep_alive([word for pair in held.values() for word in pair])  # all have arrived
    ptx.syncwarp()
    with ptx.when(b.leader):
        ptx.mbarrier_arrive(b.x_held)
    return held


def _raised_sums(plan: Plan, x) -> dict[tuple[int, int], list[ir.Value]]:
    """(part of the slice with one scale, eight rows of x) -> what the sums start from: -(magic + 8) sum x."""
    one = Int.of(0x3F803F80 if plan.x_dtype == "bf16" else 0x3C003C00)
    steps = plan.flush_k // 16
    out = {}
    for t in range(plan.n_tiles):
        for flush in range(plan.k_warp // plan.flush_k):
            total = [ptx.f32(0.0)] * 4
            for step in range(flush * steps, (flush + 1) * steps):
                total = ptx.mma_m16n8k16(plan.x_dtype, total, [one] * 4, x[step, t])
            first, second = (arith.mulf(v, ptx.f32(-LIFT[plan.x_dtype])) for v in total[:2])
            out[flush, t] = [first, second, first, second]
    return out


def _multiply(plan: Plan, b: _Block, x, start, stage: Int, place: Int) -> list[ir.Value]:
    """(scales applied) W x of this warp's slice of a tile; [n_tile, 4] sums. `place`: of the warp in its piece."""
    kind, c = plan.kind, plan.config
    blocks = plan.k_warp // kind.block_k
    words_at = stage + place * (blocks * BLOCK_BYTES) + b.lane * 16
    first_group = (
        place * (plan.k_warp // plan.group) if plan.k_warp >= plan.group else place * plan.k_warp // plan.group
    )
    zero_at = stage + plan.weight_bytes + plan.table_bytes()[0]
    steps_per_flush = plan.flush_k // 16
    acc = [ptx.f32(0.0)] * (4 * plan.n_tiles)
    sums: dict[int, list[ir.Value]] = {}
    zeros: tuple[Int, Int] | None = None
    words: list[Int] = []
    for step in range(plan.k_warp // 16):
        flush = step // steps_per_flush
        if step % kind.steps == 0:
            words = ptx.load_shared(words_at + step // kind.steps * BLOCK_BYTES, 4)
        if step % steps_per_flush == 0:
            sums = {t: start.get((flush, t), [ptx.f32(0.0)] * 4) for t in range(plan.n_tiles)}
            if plan.has_zero:
                pair = ptx.load_shared_u16(zero_at + (first_group + flush) * 16 + (b.lane // 4) * 2)
                zeros = zero_pair(kind, plan.x_dtype, pair, False), zero_pair(kind, plan.x_dtype, pair, True)
        at = step % kind.steps * kind.words
        part = words[at : at + kind.words]
        a = raised_u4(plan.x_dtype, part) if c.lift else DEQUANT[kind.name](plan.x_dtype, part, zeros)
        for t in range(plan.n_tiles):
            sums[t] = ptx.mma_m16n8k16(plan.x_dtype, sums[t], a, x[step, t])
        if (step + 1) % steps_per_flush:
            continue
        scales = None
        if not plan.scales_in_epilogue:
            scales = row_pair(plan, stage + plan.weight_bytes, first_group + flush, b.lane)
        for j in range(4 * plan.n_tiles):
            value = sums[j // 4][j % 4]
            acc[j] = arith.addf(acc[j], value) if scales is None else ptx.fma_f32(value, scales[j % 4 // 2], acc[j])
    return acc


def _store_sums(plan: Plan, b: _Block, i: Int, acc: list[ir.Value]) -> None:
    """This warp's sums of the i'th tile as [warp][rows 0-7 or 8-15][column of x][8], free of bank conflicts.

    Columns of x stand in the order 0 2 4 6 1 3 5 7 of each eight. Two buffers suffice: whoever writes tile i has seen
    all arrive with tile i - 1, so all have finished tile i - 2.
    """
    with ptx.when(b.warp.lt(plan.config.warps)):
        base = b.sums + (i & 1) * plan.partial_bytes + b.warp * (8 * plan.half_floats)
        base = base + ((b.lane % 4) * 8 + b.lane // 4) * 4
        for j, value in enumerate(acc):
            slot = 8 * (j // 4) + 4 * (j % 2)
            ptx.store_shared_f32(base + (j % 4 // 2 * plan.half_floats + slot * 8) * 4, value)
    ptx.syncwarp()
    with ptx.when(b.leader):
        ptx.mbarrier_arrive(b.meet)


def _finish(plan: Plan, b: _Block, i: Int, s_ref, y_base) -> None:
    """Adds all warps' sums of the i'th tile: 4 warps for eight rows of x, other ones each time."""
    c = plan.config
    ptx.mbarrier_wait(b.meet, i & 1)
    workers = 4 * plan.n_tiles
    turn = (b.warp - i * workers) & (plan.block_warps - 1)
    slot = turn * 2 + b.lane // 16
    m = (slot // 8) * 8 + (slot % 4) * 2 + (slot % 8) // 4
    with ptx.when(arith.andi(turn.lt(workers), m.lt(plan.m))):
        at = b.sums + (i & 1) * plan.partial_bytes
        at = at + ((b.lane % 16) // 8 * plan.half_floats + slot * 8 + b.lane % 8) * 4
        parts = [ptx.load_shared_f32(at + warp * (8 * plan.half_floats)) for warp in range(c.warps)]
        while len(parts) > 1:
            pairs = [arith.addf(u, v) for u, v in zip(parts[::2], parts[1::2])]
            parts = [*pairs, *parts[len(pairs) * 2 :]]
        n = (b.first + i * plan.blocks) * ROWS + b.lane % 16
        total = parts[0]
        if plan.scales_in_epilogue:
            total = arith.mulf(total, load_row_scale(plan, s_ref, n))
        if c.parts == 1:
            total = arith.truncf(ir.BF16Type.get() if plan.x_dtype == "bf16" else ir.F16Type.get(), total)
        row = m + b.part * plan.m if c.parts > 1 else m
        address = ptx.offset(y_base, ((row * plan.n + n) * (2 if c.parts == 1 else 4)).i64())
        llvm.store(total, llvm.inttoptr(llvm.PointerType.get(1), address))
