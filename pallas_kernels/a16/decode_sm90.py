"""Small M on Hopper: weights streamed once from HBM, multiplied by mma.m16n8k16 as they arrive.

Every warp owns a private ring of shared-memory stages that the copy engine fills `stages` ahead, and a fixed set of
k units; nothing synchronises warps until a tile's partial sums meet. x stays in shared memory for the whole kernel
(a cluster of `split` blocks divides K, so that it fits). Weights become bf16 integers in registers (`dequant`), the
group scales multiply the float32 sums.

One block of 16 warps per SM; a tile is 16 * row_tiles * row_warps rows of W by all of K; the warps are
row_warps x k_warps, the rest idle.
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
from pallas_kernels.a16.decode_plan import WARPS, Plan
from pallas_kernels.a16.decode_plan import Config as Config
from pallas_kernels.a16.dequant import DEQUANT, zero_pair
from pallas_kernels.a16.ptx import Int
from pallas_kernels.a16.row_scale import load_row_scale, row_pair
from pallas_kernels.a16.stored import BLOCK_BYTES, ROWS


def matmul(
    plan: Plan,
    x: jax.Array,
    weight: jax.Array,
    scale: jax.Array,
    zero: jax.Array | None = None,
    offset: jax.Array | None = None,
    after: jax.Array | None = None,
) -> jax.Array:
    """x [M, K] by packed arrays (see `fragments`) -> [M, N] in x's dtype.

    `after` is not read: it orders this call behind another (benchmarks).
    """
    plan.check()
    optional = [a for a in (zero, offset, after) if a is not None]
    smem = plan.x_bytes + 2 * plan.partial_bytes
    smem += plan.config.row_warps * plan.config.k_warps * plan.stages * (plan.stage_bytes + 8) + 8 * plan.units + 8
    refs = (plgpu.RefType(),) * (5 + len(optional))

    def body(*args):
        if plan.config.pdl:
            plgpu.griddepcontrol_launch_dependents()
        # The primitive marks the kernel for programmatic launch; the wait itself stands in `_emit`, after prefetch.
        plgpu.inline_mgpu(arg_types=refs)(functools.partial(_emit, plan))(*args)
        if plan.config.pdl:
            plgpu.griddepcontrol_wait()

    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((plan.m, plan.n), x.dtype),
        grid=(plan.clusters,),
        grid_names=("tile",),
        cluster=(plan.config.split,) if plan.config.split > 1 else (),
        cluster_names=("split",) if plan.config.split > 1 else (),
        num_threads=WARPS // 4,
        thread_name="wg",
        kernel_name="a16_decode_sm90",
        scratch_types=[plgpu.SMEM((smem,), jnp.uint8)],
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
        ),
    )
    return kernel(x, weight, scale, *optional)


class _Block:
    """Thread coordinates and the addresses in shared memory."""

    def __init__(self, plan: Plan, smem: ir.Value):
        c = plan.config
        tid = ptx.special("%tid.x")
        self.tid = tid
        # All lanes of a warp agree on their warp's number: a shuffle tells the compiler so.
        warp = Int(mgpu.warp_idx(sync=True))
        self.warp = warp
        self.lane = tid & 31
        self.row_warp = warp % c.row_warps
        self.k_warp = warp // c.row_warps
        self.active = warp.lt(c.row_warps * c.k_warps)
        self.leader = self.lane.eq(0)
        self.rank = ptx.special("%cluster_ctarank") if c.split > 1 else Int.of(0)
        self.cluster = ptx.special("%ctaid.x") // c.split
        base = ptx.shared_address(smem)
        self.x = base
        self.partials = base + plan.x_bytes
        ring = self.partials + 2 * plan.partial_bytes
        self.ring = ring + warp * (plan.stages * plan.stage_bytes)
        barriers = ring + c.row_warps * c.k_warps * plan.stages * plan.stage_bytes
        self.meet = barriers  # a tile's partial sums of all warps and blocks are written
        self.x_barriers = barriers + 8  # one for each unit's part of x
        self.barriers = self.x_barriers + 8 * plan.units + warp * (plan.stages * 8)


def _emit(plan: Plan, ctx, x_ref, w_ref, s_ref, *rest):
    del ctx
    *optional, y_ref, smem = rest
    tables = [*([] if plan.scales_in_epilogue else [s_ref]), *optional[: plan.has_zero + plan.has_offset]]
    b = _Block(plan, smem)
    x_base, y_base, w_base = (ptx.global_address(r) for r in (x_ref, y_ref, w_ref))
    t_bases = [ptx.global_address(r) for r in tables]
    tile_count = (Int.of(plan.tiles - 1) - b.cluster) // plan.clusters + 1

    fetch = functools.partial(_fetch, plan, b, w_base, t_bases)
    with ptx.when(arith.andi(b.active, b.leader)):
        for stage in range(plan.stages):
            ptx.mbarrier_init(b.barriers + 8 * stage, 1)
        with ptx.when(b.warp.eq(0)):
            ptx.mbarrier_init(b.meet, WARPS * plan.config.split)
            for unit in range(plan.units):
                ptx.mbarrier_init(b.x_barriers + 8 * unit, 1)
        ptx.fence_mbarrier_init()
        for stage in range(plan.stages):
            tile, unit = b.cluster + (stage // plan.units) * plan.clusters, stage % plan.units
            with ptx.when(tile.lt(plan.tiles)):
                fetch(tile, Int.of(unit), Int.of(stage))
    if plan.config.pdl:
        ptx.asm("griddepcontrol.wait;")
    with ptx.when(b.warp.eq(0)):
        _load_x(plan, b, x_base)
    if plan.config.split > 1:  # the blocks' barriers are set up before any arrives at another's
        ptx.cluster_sync()
    else:
        ptx.syncthreads()

    # Lane l reads row l % 8 of the 8x8 matrix l / 8; rows past M repeat the last one, their sums are never stored.
    x_lanes = []
    for nt in range(plan.n_tiles):
        row = (b.lane % 8 + 8 * nt).min(plan.m - 1)
        x_lanes.append(b.x + row * plan.x_stride + (b.lane // 8) * 16)

    zero_acc = [ptx.f32(0.0)] * (plan.config.row_tiles * plan.n_tiles * 4)
    my_units = ptx.select(b.active, plan.units, 0)
    ahead, ahead_unit = divmod(plan.stages, plan.units)

    def tile_body(i: Int, carry):
        def unit_body(unit: Int, carry):
            stage, phase, f_tile, f_unit, *acc = carry
            stage, phase, f_tile, f_unit = Int(stage), Int(phase), Int(f_tile), Int(f_unit)
            with ptx.when(i.eq(0)):
                ptx.mbarrier_wait(b.x_barriers + unit * 8, Int.of(0))
            ptx.mbarrier_wait(b.barriers + stage * 8, phase)
            acc = _multiply(plan, b, x_lanes, b.ring + stage * plan.stage_bytes, unit, acc)
            ptx.syncwarp()
            with ptx.when(arith.andi(b.leader, f_tile.lt(plan.tiles))):
                fetch(f_tile, f_unit, stage)
            wrap = (stage + 1).eq(plan.stages)
            stage, phase = ptx.select(wrap, 0, stage + 1), ptx.select(wrap, phase ^ 1, phase)
            done = (f_unit + 1).eq(plan.units)
            f_tile = ptx.select(done, f_tile + plan.clusters, f_tile)
            f_unit = ptx.select(done, 0, f_unit + 1)
            return [stage.value, phase.value, f_tile.value, f_unit.value, *acc]

        out = ptx.loop(my_units, [*carry, *zero_acc], unit_body)
        carry, acc = out[:4], out[4:]
        # The tile before is finished only now: its slowest warp had this tile's time to arrive.
        with ptx.when(Int.of(0).lt(i)):
            _finish(plan, b, i - 1, s_ref, y_base)
        _store_partials(plan, b, i, acc)
        return carry

    start = [Int.of(0), Int.of(0), b.cluster + ahead * plan.clusters, Int.of(ahead_unit)]
    ptx.loop(tile_count, [v.value for v in start], tile_body)
    _finish(plan, b, tile_count - 1, s_ref, y_base)
    if plan.config.split > 1:  # the other blocks may still read this one's sums
        ptx.cluster_sync()


def _load_x(plan: Plan, b: _Block, x_base) -> None:
    """One warp starts the copies of x, rows over lanes, in parts of K as the warps' units need them."""
    part = plan.unit_k * plan.config.k_warps
    for unit in range(plan.units):
        barrier = b.x_barriers + 8 * unit
        with ptx.when(b.leader):
            ptx.mbarrier_expect(barrier, plan.m * part * 2)
        ptx.syncwarp()
        for first in range(0, plan.m, 32):
            row = b.lane + first
            with ptx.when(row.lt(plan.m)):
                column = (b.rank * plan.k_block + unit * part) * 2
                source = ptx.offset(x_base, (row * (plan.k * 2)).i64(), column.i64())
                ptx.bulk_load_keep(b.x + row * plan.x_stride + unit * part * 2, source, part * 2, barrier)


def _fetch(plan: Plan, b: _Block, w_base, t_bases, tile: Int, unit: Int, stage: Int) -> None:
    """One lane starts the copies of a stage: row_tiles pieces of weights, then their scales, zeros and offsets."""
    c = plan.config
    barrier = b.barriers + stage * 8
    target = b.ring + stage * plan.stage_bytes
    ptx.mbarrier_expect(barrier, plan.copied_bytes)
    piece = c.unit * BLOCK_BYTES
    block0 = b.rank * (plan.k_block // plan.kind.block_k) + (unit * c.k_warps + b.k_warp) * c.unit
    table_at = plan.weight_bytes
    row_bytes = plan.k // plan.kind.block_k * BLOCK_BYTES
    for r in range(c.row_tiles):
        row = (tile * c.row_warps + b.row_warp) * c.row_tiles + r
        row_start = arith.muli(row.i64(), arith.constant(ptx.i64_type(), row_bytes))
        ptx.bulk_load(target + r * piece, ptx.offset(w_base, row_start, (block0 * BLOCK_BYTES).i64()), piece, barrier)
        first = _first_group(plan, block0 * plan.kind.block_k)
        records = (plan.scale_record, 16, plan.scale_record)
        present = [(size, rec) for size, rec in zip(plan.table_bytes(), records, strict=True) if size]
        for base, (size, record) in zip(t_bases, present, strict=False):
            index = row * plan.groups + first
            ptx.bulk_load(target + table_at, ptx.offset(base, (index * record).i64()), size, barrier)
            table_at += size


def _first_group(plan: Plan, k0: Int) -> Int:
    """The first group whose scales a unit starting at column k0 loads (its last record must exist)."""
    first = k0 // plan.group
    aligned = plan.unit_k % plan.group == 0 or plan.group % plan.unit_k == 0
    return first if aligned else first.min(plan.groups - plan.unit_groups)


def _multiply(plan: Plan, b: _Block, x_lanes, stage: Int, unit: Int, acc: list[ir.Value]) -> list[ir.Value]:
    """acc += (scales applied) W x over one stage; acc[(row_tile, n_tile, 4)]."""
    c, kind = plan.config, plan.kind
    steps_per_flush = plan.flush_k // 16
    zero4 = [ptx.f32(0.0)] * 4
    k_local = (unit * c.k_warps + b.k_warp) * plan.unit_k  # in the block's part of K
    k0 = k_local + b.rank * plan.k_block
    x_at = [lane + k_local * 2 for lane in x_lanes]
    size = sum(plan.table_bytes())
    table = stage + plan.weight_bytes
    sums = {(r, t): zero4 for r in range(c.row_tiles) for t in range(plan.n_tiles)}
    x_sums = dict.fromkeys(range(plan.n_tiles), zero4)
    zeros: dict[int, tuple[Int, Int]] = {}
    ones = [Int.of(0x3F803F80 if plan.x_dtype == "bf16" else 0x3C003C00)] * 4
    words: dict[int, list[Int]] = {}
    x_frag: dict[int, list[Int]] = {}
    acc = list(acc)
    for step in range(c.unit * kind.steps):
        flush = step // steps_per_flush
        if step % 2 == 0:  # one ldmatrix.x4 serves two steps of 16 columns
            x_frag = {t: ptx.ldmatrix_x4(x_at[t] + step * 32) for t in range(plan.n_tiles)}
        if step % kind.steps == 0:
            at = stage + b.lane * 16 + (step // kind.steps) * BLOCK_BYTES
            words = {r: ptx.load_shared(at + r * c.unit * BLOCK_BYTES, 4) for r in range(c.row_tiles)}
        if step % steps_per_flush == 0 and plan.has_zero:
            for r in range(c.row_tiles):
                at = table + r * size + plan.table_bytes()[0]
                pair = ptx.load_shared_u16(at + _local_group(plan, k0, flush) * 16 + (b.lane // 4) * 2)
                zeros[r] = (
                    zero_pair(plan.kind, plan.x_dtype, pair, False),
                    zero_pair(plan.kind, plan.x_dtype, pair, True),
                )
        part = (step % kind.steps) * kind.words
        for r in range(c.row_tiles):
            a = DEQUANT[kind.name](plan.x_dtype, words[r][part : part + kind.words], zeros.get(r))
            for t in range(plan.n_tiles):
                half = x_frag[t][2 * (step % 2) : 2 * (step % 2) + 2]
                sums[r, t] = ptx.mma_m16n8k16(plan.x_dtype, sums[r, t], a, half)
        if plan.has_offset:
            for t in range(plan.n_tiles):
                half = x_frag[t][2 * (step % 2) : 2 * (step % 2) + 2]
                x_sums[t] = ptx.mma_m16n8k16(plan.x_dtype, x_sums[t], ones, half)
        if (step + 1) % steps_per_flush:
            continue
        for r in range(c.row_tiles):
            if plan.scales_in_epilogue:
                scales = None
            else:
                group = _local_group(plan, k0, flush)
                scales = row_pair(plan, table + r * size, group, b.lane)
            if plan.has_offset:
                sizes = plan.table_bytes()
                offsets = row_pair(plan, table + r * size + sizes[0] + sizes[1], group, b.lane)
            for t in range(plan.n_tiles):
                for i in range(4):
                    j = (r * plan.n_tiles + t) * 4 + i
                    if scales is None:
                        acc[j] = arith.addf(acc[j], sums[r, t][i])
                    else:
                        acc[j] = ptx.fma_f32(sums[r, t][i], scales[i // 2], acc[j])
                    if plan.has_offset:
                        acc[j] = ptx.fma_f32(x_sums[t][i], offsets[i // 2], acc[j])
                sums[r, t] = zero4
        x_sums = dict.fromkeys(range(plan.n_tiles), zero4)
    return acc


def _local_group(plan: Plan, k0: Int, flush: int) -> Int | int:
    """Which of the loaded groups the flush'th part of the unit belongs to."""
    if plan.unit_k % plan.group == 0:
        return flush * plan.flush_k // plan.group
    if plan.group % plan.unit_k == 0:
        return 0
    return (k0 + flush * plan.flush_k) // plan.group - _first_group(plan, k0)


def _store_partials(plan: Plan, b: _Block, i: Int, acc: list[ir.Value]) -> None:
    """Accumulators of the i'th tile to shared memory as [k_warp][x row][W row], then word of it to all blocks.

    Two buffers suffice: whoever writes tile i has seen all arrive with tile i - 1, so all have finished tile i - 2.
    """
    c = plan.config
    buffer = b.partials + (i & 1) * plan.partial_bytes
    with ptx.when(b.active):
        base = buffer + b.k_warp * (plan.n_tiles * 8 * plan.partial_stride * 4)
        base = base + ((b.lane % 4) * (2 * plan.partial_stride) + b.lane // 4 + b.row_warp * (ROWS * c.row_tiles)) * 4
        for r in range(c.row_tiles):
            for t in range(plan.n_tiles):
                for j in range(4):
                    at = ((8 * t + j % 2) * plan.partial_stride + ROWS * r + 8 * (j // 2)) * 4
                    ptx.store_shared_f32(base + at, acc[(r * plan.n_tiles + t) * 4 + j])
    ptx.syncwarp()
    if c.split == 1:
        with ptx.when(b.leader):
            ptx.mbarrier_arrive(b.meet)
    else:
        with ptx.when(b.lane.lt(c.split)):
            ptx.mbarrier_arrive_remote(ptx.cluster_map(b.meet, b.lane))


def _finish(plan: Plan, b: _Block, i: Int, s_ref, y_base) -> None:
    """Adds the i'th tile's partial sums of all warps and blocks; each block writes its share of the rows."""
    c = plan.config
    tile = b.cluster + i * plan.clusters
    buffer = b.partials + (i & 1) * plan.partial_bytes
    if c.split == 1:
        ptx.mbarrier_wait(b.meet, i & 1)
    else:
        ptx.mbarrier_wait_cluster(b.meet, i & 1)
    share = c.rows // c.split
    outputs = share * plan.m
    threads = WARPS * 32
    for start in range(0, outputs, threads):
        index = b.tid + start
        with ptx.when(index.lt(outputs)):
            m, row = index // share, index % share + b.rank * share
            at = buffer + (m * plan.partial_stride + row) * 4
            # Each block starts with itself: were all to read the same one at a time, its port would be the limit.
            parts = []
            for step in range(c.split):
                base = ptx.cluster_map(at, (b.rank + step) & (c.split - 1)) if c.split > 1 else at
                for kw in range(c.k_warps):
                    offset = kw * plan.n_tiles * 8 * plan.partial_stride * 4
                    parts.append(ptx.load_shared_f32(base + offset, cluster=c.split > 1))
            total = functools.reduce(arith.addf, parts)
            n = tile * c.rows + row
            if plan.scales_in_epilogue:
                total = arith.mulf(total, load_row_scale(plan, s_ref, n))
            out_type = ir.BF16Type.get() if plan.x_dtype == "bf16" else ir.F16Type.get()
            value = arith.truncf(out_type, total)
            address = ptx.offset(y_base, ((m * plan.n + n) * 2).i64())
            llvm.store(value, llvm.inttoptr(llvm.PointerType.get(1), address))
