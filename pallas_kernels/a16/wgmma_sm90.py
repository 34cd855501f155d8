"""Larger M on Hopper: warp-specialised wgmma with W dequantized in registers.

W takes the M role of wgmma (64 rows a warpgroup), x^T from shared memory the N role. One producer warp streams weights
in fragment order (bulk copies), their scales, and x in the 128-byte swizzle (TMA); each consumer warpgroup turns a
64-column block into its A operand while the wgmma of the block before runs. A cluster of `split` blocks divides K and
meets in distributed shared memory. Persistent: tiles are dealt out over clusters, the producer runs ahead of epilogues.

The scales multiply the integers in bf16 (fp16): W is rounded to x's dtype as in the reference, and scales of another
dtype are rounded to x's first. With one scale per row they multiply the finished sums instead.
"""

from __future__ import annotations

import contextlib
import functools
import itertools

import jax
import jax.numpy as jnp
from jax.experimental.mosaic.gpu import utils as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, memref

from pallas_kernels.a16 import ptx
from pallas_kernels.a16.dequant import DEQUANT, zero_pair
from pallas_kernels.a16.ptx import Int
from pallas_kernels.a16.row_scale import load_row_scale
from pallas_kernels.a16.stored import BLOCK_BYTES, ROWS
from pallas_kernels.a16.wgmma_plan import Config as Config
from pallas_kernels.a16.wgmma_plan import Plan
from pallas_kernels.a16.wgmma_produce import Block, coordinates, next_stage, produce, views


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
    tables = [a.reshape(a.shape[0], -1) for a in (scale, zero, offset) if a is not None]
    smem = 1024 + plan.data_bytes
    smem = -(-smem // 1024) * 1024
    c, x_dtype = plan.config, x.dtype

    def body(*args):
        refs = (plgpu.RefType(),) * len(args)
        plgpu.inline_mgpu(arg_types=refs)(functools.partial(_emit, plan))(*args)

    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((c.parts * plan.m, plan.n), x_dtype if c.parts == 1 else jnp.float32),
        grid=(plan.clusters,),
        grid_names=("tile",),
        cluster=(c.split,) if c.split > 1 else (),
        cluster_names=("block",) if c.split > 1 else (),
        num_threads=c.warpgroups + 1,
        thread_name="wg",
        kernel_name="a16_wgmma_sm90",
        scratch_types=[plgpu.SMEM((smem,), jnp.uint8)],
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
        ),
    )
    x, weight = views(plan, x, weight)
    y = kernel(x, weight, *tables, *([] if after is None else [after]))
    return y if c.parts == 1 else y.reshape(c.parts, plan.m, plan.n).sum(axis=0).astype(x_dtype)


def _emit(plan: Plan, ctx, x_ref, w_ref, s_ref, *rest):
    c = plan.config
    *optional, y_ref, smem = rest
    optional = optional[: plan.has_zero + plan.has_offset]
    b = Block(plan, smem)
    warps = 4 * c.warpgroups
    with ptx.when(b.tid.eq(0)):
        for stage in range(plan.stages):
            ptx.mbarrier_init(b.full + 8 * stage, 1)
            ptx.mbarrier_init(b.empty + 8 * stage, warps)
        ptx.mbarrier_init(b.ready, 4 * c.row_groups * c.split)
        ptx.fence_mbarrier_init()
    if c.split > 1:
        ptx.cluster_sync()
    else:
        ptx.syncthreads()
    tile_count = (Int.of(plan.tiles - 1) - b.cluster) // plan.clusters + 1

    def load() -> None:
        ptx.set_registers(plan.producer_registers, increase=False)
        with ptx.when(b.warp.eq(warps)):
            produce(plan, ctx, b, tile_count, x_ref, w_ref, [*([] if plan.scales_in_epilogue else [s_ref]), *optional])

    def multiply() -> None:
        ptx.set_registers(plan.consumer_registers, increase=True)
        _consume(plan, ctx, b, tile_count, s_ref, y_ref)

    ptx.either(b.warp.lt(warps), multiply, load)
    if c.split > 1:  # the other blocks may still read this one's sums
        ptx.cluster_leave()


def _consume(plan: Plan, ctx, b: Block, tile_count: Int, s_ref, y_ref) -> None:
    c = plan.config
    count = c.m_tile // 2
    y_base = ptx.global_address(y_ref)
    batches = plan.group_step // (16 * plan.batch)
    held = 4 * plan.batch  # registers of a batch's operand A

    def tile_body(i: Int, carry):
        n_tile, m_tile, part = coordinates(plan, b, i)

        def step_body(step: Int, carry):
            stage, phase, last = (Int(v) for v in carry[:3])
            previous, acc = [Int(v) for v in carry[3 : 3 + held]], list(carry[3 + held :])
            for sub, batch in itertools.product(range(plan.unroll), range(batches)):
                if batch == 0:
                    if sub:
                        last = stage
                        stage, phase = next_stage(stage, phase, plan.stages)
                    ptx.mbarrier_wait(b.full + stage * 8, phase)
                    base = b.stages + stage * plan.stage_bytes
                first = batch * plan.batch
                if first % plan.kind.steps == 0:
                    words = _words(plan, b, base, first // plan.kind.steps)
                fragments = _fragments(plan, b, base, words, first)
                # The tensor core works on the batch before while the line above runs, and is waited for only after it.
                ptx.keep_alive([r for a in fragments for r in a])
                ptx.wgmma_fence()  # ptxas would move the conversion behind the wait if the fence stood there
                ptx.wgmma_wait(0)
                ptx.keep_alive(previous)
                if batch == 0 and sub == 0:
                    with ptx.when(Int.of(0).lt(step)):
                        _free(b, last)
                elif batch == 0:
                    _free(b, last)
                for s, a in enumerate(fragments):
                    column = 16 * (first + s)
                    at = b.part(base, plan.x_bytes) + (column // 64) * c.m_tile * 128 + (column % 64) * 2
                    acc = ptx.wgmma_rs(plan.x_dtype, c.m_tile, acc, a, ptx.b_descriptor(at))
                ptx.wgmma_commit()
                previous = [r for a in fragments for r in a]
            after, phase = next_stage(stage, phase, plan.stages)
            return [after.value, phase.value, stage.value, *(r.value for r in previous), *acc]

        start = [*carry, ptx.const(0), *[ptx.const(0)] * held, *[ptx.f32(0.0)] * count]
        stage, phase, last, *rest = ptx.loop(plan.steps // plan.unroll, start, step_body)
        acc = ptx.wgmma_wait(0, rest[held:])
        ptx.keep_alive([Int(v) for v in rest[:held]])
        _free(b, Int(last))
        if c.k_groups > 1:
            _join(plan, ctx, b, n_tile, m_tile, acc, s_ref, y_ref, y_base)
        elif c.split > 1:
            _meet(plan, b, n_tile, m_tile, acc, s_ref, y_base)
        elif c.parts > 1:
            _write_part(plan, b, n_tile, m_tile, part, acc, s_ref, y_base)
        else:
            _write(plan, ctx, b, n_tile, m_tile, acc, s_ref, y_ref)
        return [stage, phase]

    ptx.loop(tile_count, [ptx.const(0), ptx.const(0)], tile_body)
    if c.split == 1 and c.parts == 1:
        with ptx.when((b.tid % 128).eq(0)):
            ptx.bulk_store_read()


def _free(b: Block, stage: Int) -> None:
    """This warp has read `stage`: word to the producer."""
    barrier = b.empty + stage * 8
    with ptx.when(b.leader):
        ptx.mbarrier_arrive(barrier)


def _words(plan: Plan, b: Block, base: Int, block: int) -> list[Int]:
    """This lane's 16 bytes of a block."""
    at = b.part(base + plan.x_bytes + b.row_warp * plan.piece, plan.piece) + b.lane * 16
    return ptx.load_shared(at + block * BLOCK_BYTES, 4)


def _fragments(plan: Plan, b: Block, base: Int, words: list[Int], first: int) -> list[list[Int]]:
    """Operand A of the steps first .. first + batch of a stage, scales applied; `words` are their block's."""
    kind, dtype = plan.kind, plan.x_dtype
    sizes = plan.table_bytes()
    table = base + plan.x_bytes + plan.row_tiles * plan.piece
    zero_table = table + plan.row_tiles * sizes[0]
    offset_table = zero_table + plan.row_tiles * sizes[1]
    out, loaded = [], -1
    scales = zeros = offsets = None
    for step in range(first, first + plan.batch):
        group = min(16 * step // plan.group, plan.step_groups - 1)
        if group != loaded:
            loaded = group
            at = b.first_group + group  # in the stage's
            if sizes[0]:
                scales = _pair16(plan, table + b.row_warp * sizes[0] + at * plan.scale_record, b.lane)
            if sizes[1]:
                pair = ptx.load_shared_u16(zero_table + b.row_warp * sizes[1] + at * 16 + (b.lane // 4) * 2)
                zeros = zero_pair(kind, dtype, pair, False), zero_pair(kind, dtype, pair, True)
            if sizes[2]:
                offsets = _pair16(plan, offset_table + b.row_warp * sizes[2] + at * plan.scale_record, b.lane)
        at = step % kind.steps * kind.words
        a = DEQUANT[kind.name](dtype, words[at : at + kind.words], zeros)
        if scales and offsets:
            a = [ptx.packed_fma(dtype, v, scales[i % 2], offsets[i % 2]) for i, v in enumerate(a)]
        elif scales:
            a = [ptx.packed("mul", dtype, v, scales[i % 2]) for i, v in enumerate(a)]
        out.append(a)
    return out


def _pair16(plan: Plan, table: Int, lane: Int) -> tuple[Int, Int]:
    """The scales of rows g and g + 8, each in both halves of a word, in x's dtype."""
    at = table + (lane // 4) * (plan.scale_record // 8)
    if plan.scale_dtype == "f32":
        low, high = (ptx.bits_to_f32(w) for w in ptx.load_shared(at, 2))
    else:
        (word,) = ptx.load_shared(at, 1)
        if plan.scale_dtype == plan.x_dtype:
            return ptx.prmt(word, word, 0x1010), ptx.prmt(word, word, 0x3232)
        if plan.scale_dtype == "f16":
            low, high = ptx.half_to_f32(word, False), ptx.half_to_f32(word, True)
        else:
            low, high = ptx.bits_to_f32(word << 16), ptx.bits_to_f32(word & 0xFFFF0000)
    return ptx.pack16(plan.x_dtype, low, low), ptx.pack16(plan.x_dtype, high, high)


def _row_scales(plan: Plan, b: Block, n_tile: Int, s_ref) -> tuple[ir.Value, ir.Value]:
    """The float32 scales of this lane's two rows, from the [N, 1] or [1, 1] array."""
    row = n_tile * plan.config.rows + b.row_warp * ROWS + b.lane // 4
    first = load_row_scale(plan, s_ref, row)
    return first, first if plan.one_scale else load_row_scale(plan, s_ref, row + 8)


def _scaled(plan: Plan, b: Block, n_tile: Int, acc, s_ref):
    if not plan.scales_in_epilogue:
        return acc
    pair = _row_scales(plan, b, n_tile, s_ref)
    return [arith.mulf(v, pair[i // 2 % 2]) for i, v in enumerate(acc)]


def _join(plan: Plan, ctx, b: Block, n_tile: Int, m_tile: Int, acc, s_ref, y_ref, y_base) -> None:
    """The first warpgroups of K add the others' sums to theirs, and write. All lie where the stages were."""
    c = plan.config
    mine = 128 * c.row_groups  # threads
    ptx.named_barrier(1, 128 * c.warpgroups)
    at = b.out + plan.out_bytes + (b.tid - mine) * 4
    with ptx.when(Int.of(0).lt(b.k_group)):
        for j, value in enumerate(acc):
            ptx.store_shared_f32(at + j * (128 * c.warpgroups - mine) * 4, value)
    ptx.named_barrier(1, 128 * c.warpgroups)
    with ptx.when(b.k_group.eq(0)):
        total = list(acc)
        for other in range(1, c.k_groups):
            for j in range(len(acc)):
                more = at + (j * (128 * c.warpgroups - mine) + other * mine) * 4
                total[j] = arith.addf(total[j], ptx.load_shared_f32(more))
        if c.split > 1:
            _meet(plan, b, n_tile, m_tile, total, s_ref, y_base)
        else:
            _write(plan, ctx, b, n_tile, m_tile, total, s_ref, y_ref)


def _write(plan: Plan, ctx, b: Block, n_tile: Int, m_tile: Int, acc, s_ref, y_ref) -> None:
    """Sums -> shared memory as [x row][64 rows of W], transposed, in the 128-byte swizzle -> y by TMA.

    Each warpgroup writes its own box, and the copy goes on while the next tile is multiplied.
    """
    c = plan.config
    acc = _scaled(plan, b, n_tile, acc, s_ref)
    if plan.one_round and c.k_groups == 1:  # the boxes lie over stages that other warpgroups may still multiply
        ptx.named_barrier(1, 128 * c.warpgroups)
    group = b.warp // 4
    first = b.tid.eq(group * 128)
    with ptx.when(first):
        ptx.bulk_store_read()  # the tile before has left
    ptx.named_barrier(group + 2, 128)
    box = b.out + group * (c.m_tile * 128)
    # Matrices of a stmatrix: (rows g, x rows 0-7), (rows g + 8, 0-7), (g, 8-15), (g + 8, 8-15).
    chunk = (b.warp % 4) * 2 + b.lane // 8 % 2  # of 16 bytes in a row of the box
    lane_at = box + ((b.lane % 8) + (b.lane // 16) * 8) * 128 + (chunk ^ (b.lane % 8)) * 16
    for t in range(c.m_tile // 16):
        part = acc[8 * t : 8 * t + 8]
        words = [ptx.pack16(plan.x_dtype, part[2 * i], part[2 * i + 1]) for i in range(4)]
        ptx.stmatrix_x4_trans(lane_at + t * 16 * 128, words)
    ptx.fence_async_shared()
    ptx.named_barrier(group + 2, 128)
    index = ir.IndexType.get()
    box_type = ir.MemRefType.get((c.m_tile, 64), ir.MemRefType(y_ref.type).element_type, memory_space=mgpu.smem())
    ctx.async_copy(
        src_ref=memref.view(box_type, b.smem, arith.index_cast(index, (box - b.stages).value), []),
        dst_ref=y_ref,
        gmem_slice=(
            mgpu.ds(arith.index_cast(index, (m_tile * c.m_tile).value), c.m_tile),
            mgpu.ds(arith.index_cast(index, (n_tile * c.rows + group * 64).value), 64),
        ),
        swizzle=128,
        predicate=first,
    )


def _write_part(plan: Plan, b: Block, n_tile: Int, m_tile: Int, part: Int, acc, s_ref, y_base) -> None:
    """Float32 sums of a part of K to rows part * M .. of the output; eight lanes write 32 bytes of a row."""
    c = plan.config
    acc = _scaled(plan, b, n_tile, acc, s_ref)
    m = m_tile * c.m_tile + (b.lane % 4) * 2
    row = arith.muli((part * plan.m + m).i64(), arith.constant(ptx.i64_type(), plan.n * 4))
    address = ptx.offset(y_base, row, ((n_tile * c.rows + b.warp * ROWS + b.lane // 4) * 4).i64())
    for t in range(c.m_tile // 8):
        for j in range(2):
            inside = ptx.when((m + (8 * t + j)).lt(plan.m)) if plan.m % c.m_tile else contextlib.nullcontext()
            with inside:
                ptx.store_global_f32(address, acc[4 * t + j], (8 * t + j) * plan.n * 4)
                ptx.store_global_f32(address, acc[4 * t + 2 + j], (8 * t + j) * plan.n * 4 + 32)


def _meet(plan: Plan, b: Block, n_tile: Int, m_tile: Int, acc, s_ref, y_base) -> None:
    """Adds the sums of the cluster's blocks; each block writes its share of the rows of W."""
    c = plan.config
    acc = _scaled(plan, b, n_tile, acc, s_ref)
    stride = (c.rows + 4) * 4
    if c.k_groups == 1:  # the sums lie over the stages, which other warpgroups may still multiply
        ptx.named_barrier(1, 128 * c.warpgroups)
    base = b.out + (b.lane % 4) * (2 * stride) + (b.warp * ROWS + b.lane // 4) * 4
    for t in range(c.m_tile // 8):
        for j in range(4):
            ptx.store_shared_f32(base + ((8 * t + j % 2) * stride + 8 * (j // 2) * 4), acc[4 * t + j])
    _arrive_everywhere(plan, b, b.ready)
    ptx.mbarrier_wait_cluster(b.ready, Int.of(0))
    share = c.rows // c.split
    quads = share // 4
    threads = 128 * c.row_groups
    m_left = (Int.of(plan.m) - m_tile * c.m_tile).min(c.m_tile)

    def sum_body(j: Int, carry):
        index = b.tid + j * threads
        m, quad = index // quads, index % quads
        with ptx.when(m.lt(m_left)):
            n = quad * 4 + b.rank * share
            at = b.out + m * stride + n * 4
            # Each block starts with itself, so that they do not all read the same one; all loads before the first sum.
            peers = [(b.rank + step) & (c.split - 1) for step in range(c.split)]
            parts = [ptx.load_shared_f32x4(ptx.cluster_map(at, peer), cluster=True) for peer in peers]
            total = list(parts[0])
            for part in parts[1:]:
                total = [arith.addf(u, v) for u, v in zip(total, part, strict=True)]
            words = [ptx.pack16(plan.x_dtype, total[0], total[1]), ptx.pack16(plan.x_dtype, total[2], total[3])]
            y_row = arith.muli((m_tile * c.m_tile + m).i64(), arith.constant(ptx.i64_type(), plan.n * 2))
            ptx.store_global(ptx.offset(y_base, y_row, ((n_tile * c.rows + n) * 2).i64()), words)
        return carry

    ptx.loop(-(-c.m_tile * quads // threads), [], sum_body)


def _arrive_everywhere(plan: Plan, b: Block, barrier: Int) -> None:
    """This warp arrives at `barrier` in every block of the cluster."""
    ptx.syncwarp()
    with ptx.when(b.lane.lt(plan.config.split)):
        ptx.mbarrier_arrive_remote(ptx.cluster_map(barrier, b.lane))
