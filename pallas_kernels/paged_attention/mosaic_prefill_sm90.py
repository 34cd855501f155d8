"""Chunked prefill on Hopper: two consumer warpgroups of 64 queries each, one producer that follows the page table.

A CTA serves 128 queries of one head of one tile; the producer copies blocks of keys and values page by page with TMA
into a ring in shared memory. A consumer overlaps inside a warpgroup: while the tensor cores compute Q K_j^T and then
P_{j-1} V_{j-1}, the softmax of block j runs between the two waits; with `pingpong` the warpgroups also take turns at
issuing, so that one's softmax (exp2: 16 a cycle an SM) hides behind the other's products. Only blocks that reach past
the tile's first query (or a window's edge) are masked.

Pages that no query of the CTA may see are addressed past the pool: TMA fills their place with zeros. The rows of the
last page behind the sequence's end hold whatever the page held before, so the producer zeroes their values in shared
memory (0 * NaN would spread); their scores are replaced by the mask.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import launch_context, mma_utils, utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector
from jaxlib.mlir.dialects import math as mlir_math

from pallas_kernels import tuning
from pallas_kernels.paged_attention.config import PrefillConfig, prefill_heuristic, prefill_search_space
from pallas_kernels.paged_attention.simt import Mlir, Reg

LOG2E = math.log2(math.e)
LOWEST = -1e30  # start of the running maximum: finite, so that a row without a visible key yet gives exp2(-inf) = 0
ROWS = 64  # of a warpgroup: the M of wgmma
CONSUMERS = 2


@dataclasses.dataclass(frozen=True)
class Problem:
    """All that is static."""

    tiles: int
    queries: int  # of a tile
    heads: int
    kv_heads: int
    head_dim: int
    pages: int
    page_size: int
    table_width: int
    sm_scale: float
    window: int | None
    soft_cap: float | None
    k_scaled: bool
    v_scaled: bool
    config: PrefillConfig

    @property
    def swizzle(self) -> int:
        return 128 if self.head_dim % 64 == 0 else 64

    @property
    def columns(self) -> int:  # of a swizzled tile
        return self.swizzle // 2

    def tiled(self, rows: int) -> tuple[int, ...]:
        """Shape in shared memory of [rows, Dh]: tiles of 8 rows by `swizzle` bytes."""
        return (rows // 8, self.head_dim // self.columns, 8, self.columns)


def _barriers(ops: Mlir, ref: ir.Value, sizes: dict[str, int]) -> dict[str, list[utils.BarrierRef]]:
    i32, base = ops.i32, utils.memref_ptr(ref)
    out, at = {}, 0
    for name, n in sizes.items():
        out[name] = [utils.BarrierRef(base, arith.constant(i32, at + i), None, 1) for i in range(n)]  # type: ignore
        at += n
    return out


class _Ring:
    """Barriers of a ring: index -> the barrier of its slot and its parity."""

    def __init__(self, barriers: list[utils.BarrierRef], i32: ir.Type):
        self.barriers, self.i32 = barriers, i32
        self.stages = len(barriers)

    def slot(self, j: Reg) -> Reg:
        return j % self.stages

    def at(self, j: Reg) -> utils.BarrierRef:
        first = self.barriers[0]
        return utils.BarrierRef(first.base_address, arith.addi(first.offset, self.slot(j).value), None, 1)  # type: ignore

    def wait(self, j: Reg, flipped: bool = False) -> None:
        parity = ((j // self.stages) & 1) ^ int(flipped)
        self.at(j).wait_parity(parity.equals(1).value)


def _program(ctx: Any, p: Problem, refs: dict[str, ir.Value]) -> None:
    config, block = p.config, p.config.block_kv
    pages_per_block = block // p.page_size
    ops = Mlir({n: refs[n] for n in ("page_table", "q_start", "q_len", "k_scale", "v_scale")}, refs["q_smem"])
    i32, index = ops.i32, ir.IndexType.get()
    ptx = ops._ptx

    stages = config.stages
    bars = _barriers(
        ops, refs["barriers"], dict(q=CONSUMERS, k_full=stages, k_empty=stages, v_full=stages, v_empty=stages, tail=1)
    )
    counts = dict(q=1, k_full=pages_per_block, k_empty=CONSUMERS, v_full=pages_per_block, v_empty=CONSUMERS, tail=128)
    thread = ops.special("tid.x")

    def init() -> None:
        for name, barriers in bars.items():
            for b in barriers:
                ptx("mbarrier.init.shared.b64 [$0], $1;", Reg(b.get_ptr()), ops.const_i32(counts[name]), effects=True)

    ops.when(thread.equals(0), init)
    ptx("fence.mbarrier_init.release.cluster;", effects=True)
    ops.barrier()
    k_full, k_empty, v_full, v_empty = (_Ring(bars[n], i32) for n in ("k_full", "k_empty", "v_full", "v_empty"))

    # Later tiles of a sequence see more keys: they go first, so that the grid's tail is short. Heads are adjacent in
    # time and share keys and values in L2.
    item = ops.special("ctaid.x")
    blocks_per_tile = p.queries // (ROWS * CONSUMERS)
    head, rest = item % p.heads, item // p.heads
    tile = ops.const_i32(p.tiles - 1) - rest // blocks_per_tile
    q_block = ops.const_i32(blocks_per_tile - 1) - rest % blocks_per_tile
    kv_head = head // (p.heads // p.kv_heads)
    first = q_block * (ROWS * CONSUMERS)
    start = ops.load_global("q_start", tile << 2) + first
    left = ops.load_global("q_len", tile << 2) - first  # live queries of this CTA, if positive
    end = start + ops.min_int(left, ROWS * CONSUMERS)  # keys at end and beyond are seen by nobody here
    begin = ops.const_i32(0) if p.window is None else ops.max_int(start - (p.window - 1), 0)
    first_block = begin // block
    live = left >= 1
    count = ops.select(live, (end + (block - 1)) // block - first_block, ops.const_i32(0))

    warpgroup = Reg(utils.warpgroup_idx(sync=True))
    as_index = lambda r: arith.index_cast(index, r.value)  # noqa: E731
    tile_transform = launch_context.TileTransform((8, p.columns))

    def producer() -> None:
        ptx("setmaxnreg.dec.sync.aligned.u32 24;", effects=True)
        elected = utils.single_thread_predicate(utils.ThreadSubset.WARPGROUP)
        pool_rows = p.pages * p.kv_heads * p.page_size
        table_row = tile * p.table_width

        def load(j: Reg, _: list[Reg]) -> list[Reg]:
            rows = []
            for i in range(pages_per_block):
                page = (first_block + j) * pages_per_block + i
                number = ops.load_global("page_table", (table_row + ops.min_int(page, p.table_width - 1)) << 2)
                seen = (page * p.page_size) < end
                if p.window is not None:
                    seen = ops.both(seen, (page * p.page_size) >= begin - (p.page_size - 1))
                row = (number * p.kv_heads + kv_head) * p.page_size
                rows.append(ops.select(seen, row, ops.const_i32(pool_rows)))
            for full, empty, pool, smem in (
                (k_full, k_empty, "k_pages", "k_smem"),
                (v_full, v_empty, "v_pages", "v_smem"),
            ):
                empty.wait(j, flipped=True)
                slot = utils.memref_slice(refs[smem], (as_index(full.slot(j)),))
                for i, row in enumerate(rows):
                    ctx.async_copy(
                        src_ref=refs[pool],
                        dst_ref=utils.memref_slice(slot, (slice(i * p.page_size // 8, (i + 1) * p.page_size // 8),)),
                        gmem_slice=(utils.ds(as_index(row), p.page_size), utils.ds(0, p.head_dim)),
                        gmem_transform=(tile_transform,),
                        swizzle=p.swizzle,
                        barrier=full.at(j),
                        predicate=elected,
                    )
            return []

        ops.loop(count, [], load)
        last = count - 1
        valid = end - (first_block + last) * block  # rows of the last block that exist

        def zero_tail() -> None:
            v_full.wait(last)
            base = _address(ops, refs["v_smem"], i32) + v_full.slot(last) * (block * p.head_dim * 2)
            lane = thread & 127
            chunks = p.columns // 8  # 16-byte chunks of a row of a tile
            per_group = 8 * p.head_dim // 8  # chunks of 8 rows
            for i in range(block * p.head_dim * 2 // 16 // 128):
                chunk = lane + 128 * i
                row = ((chunk // per_group) << 3) + (chunk // chunks) % 8
                address = base + (chunk << 4)
                ops.when(row >= valid, functools.partial(ops.store_shared4, address, [ops.const_f32(0.0)] * 4))
            ptx("fence.proxy.async.shared::cta;", effects=True)

        ops.when(valid < block, zero_tail)
        ptx("mbarrier.arrive.shared.b64 _, [$0];", Reg(bars["tail"][0].get_ptr()), effects=True)

    def consumer() -> None:
        ptx("setmaxnreg.inc.sync.aligned.u32 240;", effects=True)
        elected = utils.single_thread_predicate(utils.ThreadSubset.WARPGROUP)
        q_smem = utils.memref_slice(refs["q_smem"], (as_index(warpgroup),))
        q_bar = utils.BarrierRef(bars["q"][0].base_address, warpgroup.value, None, 1)  # type: ignore
        my_first = warpgroup * ROWS
        q_row = tile * p.queries + first + my_first
        q_slice = (utils.ds(as_index(q_row), ROWS), as_index(head), utils.ds(0, p.head_dim))
        ctx.async_copy(
            src_ref=refs["q"], dst_ref=q_smem, gmem_slice=q_slice, gmem_transform=(tile_transform,), swizzle=p.swizzle,
            barrier=q_bar, predicate=elected,
        )  # fmt: skip
        scale = ops.const_f32(p.sm_scale if p.soft_cap else p.sm_scale * LOG2E)
        if p.k_scaled:
            scale = scale * ops.load_global_f32("k_scale", kv_head << 2)
        my_start = start + my_first
        q_bar.wait_parity(arith.constant(ir.IntegerType.get_signless(1), 0))

        def slot_of(name: str, ring: _Ring, j: Reg) -> ir.Value:
            return utils.memref_slice(refs[name], (as_index(ring.slot(j)),))

        def prepared(*arrays: Any) -> Any:
            """Accumulators (f32) and A operands whose registers the following wgmmas use.

            All of a step's registers are pinned before its first wgmma: ptxas serializes every wgmma of a function
            in which a register is written between the issue and the wait (C7513; so compiled, 538 TFLOP/s).
            """
            accs = [
                mgpu.WGMMAAccumulator.from_registers(x, sync=False)._value if x.mlir_dtype == ops.f32 else x
                for x in arrays
            ]
            pinned = fa.optimization_barrier(*accs)
            ptx("wgmma.fence.sync.aligned;", effects=True, convergent=True)
            return list(pinned) if len(arrays) > 1 else [pinned]

        def scores(acc: Any, j: Reg) -> Any:
            """Issues Q K_j^T into a prepared zero accumulator."""
            keys = utils.memref_transpose(slot_of("k_smem", k_full, j), (1, 0, 3, 2))
            acc = mgpu.WGMMAAccumulator(_value=acc, _original_layout=fa.WGMMA_LAYOUT, _sync=False)
            acc = mgpu.wgmma(acc, q_smem, keys, swizzle=p.swizzle)
            ptx("wgmma.commit_group.sync.aligned;", effects=True, convergent=True)
            return acc

        def add_values(acc: Any, weights: Any, j: Reg) -> Any:
            """Issues acc += P V_j; both prepared."""
            acc = _wgmma_registers(acc, weights, slot_of("v_smem", v_full, j), p.swizzle)
            ptx("wgmma.commit_group.sync.aligned;", effects=True, convergent=True)
            return mgpu.WGMMAAccumulator(_value=acc, _original_layout=fa.WGMMA_LAYOUT, _sync=False)

        def ready(acc: Any, pending: int, *more: Any) -> Any:
            ptx(f"wgmma.wait_group.sync.aligned {pending};", effects=True, convergent=True)
            return fa.optimization_barrier(acc.value, *more)

        lane0 = utils.single_thread_predicate(utils.ThreadSubset.WARPGROUP)

        def release(ring: _Ring, j: Reg) -> None:
            ring.at(j).arrive(predicate=lane0)

        def softmax(s: Any, j: Reg, peak: Any, total: Any, masked: bool) -> tuple[Any, ...]:
            factor = scale
            if p.soft_cap:
                cap = p.soft_cap

                def capped(x: ir.Value) -> ir.Value:  # c - 2c / (1 + exp(2 x / c)), in units of log2
                    out = x
                    for e in range(ir.VectorType(x.type).shape[0]):
                        v = Reg(vector.extract(x, dynamic_position=[], static_position=[e])) * factor
                        r = ops.reciprocal(ops.exp2(v * (2 * LOG2E / cap)) + 1.0)
                        v = ops.fma(r, ops.const_f32(-2 * cap * LOG2E), ops.const_f32(cap * LOG2E))
                        out = vector.insert(v.value, out, dynamic_position=[], static_position=[e])
                    return out

                s = s._pointwise(capped)
                factor = ops.const_f32(1.0)
            if masked:
                # Key column <= query row, both relative to the block and the warpgroup.
                limit = my_start - (first_block + j) * block
                lowest = arith.constant(ops.f32, -math.inf)

                def hide(value: ir.Value, at: tuple[ir.Value, ...]) -> ir.Value:
                    row, column = (Reg(arith.index_cast(i32, x)) for x in at)
                    seen = limit >= column - row
                    if p.window is not None:
                        seen = ops.both(seen, (limit - p.window) < column - row)
                    return arith.select(seen.value, value, lowest)

                s = s.foreach(hide, create_array=True)
            high = s.reduce("max", 1) * factor.value
            new = peak.max(high)
            alpha = (peak - new).exp2(approx=True)
            minus = (new * -1.0).broadcast_in_dim((ROWS, block), (0,), fa.WGMMA_LAYOUT)

            def shifted(x: ir.Value, m: ir.Value) -> ir.Value:
                return mlir_math.fma(x, vector.broadcast(x.type, factor.value), m)

            weights = s._pointwise(shifted, minus).exp2(approx=True)
            return new, alpha, weights, total * alpha + weights.reduce("add", 1)

        row_of = lambda value: fa.FragmentedArray.splat(  # noqa: E731
            arith.constant(ops.f32, value), (ROWS,), fa.WGMMA_ROW_LAYOUT
        )
        wide = lambda x: x.broadcast_in_dim((ROWS, p.head_dim), (0,), fa.WGMMA_LAYOUT)  # noqa: E731
        out = fa.FragmentedArray.splat(arith.constant(ops.f32, 0.0), (ROWS, p.head_dim), fa.WGMMA_LAYOUT)
        dtype = ir.MemRefType(refs["q_smem"].type).element_type

        def my_turn() -> None:
            if config.pingpong:
                ptx("bar.sync $0, 256;", warpgroup + 8, effects=True, convergent=True)

        def your_turn(where: Reg) -> None:
            if config.pingpong:
                other = (ops.const_i32(9) - warpgroup).value
                utils.inline_ptx("bar.arrive $0, 256;", other, predicate=where.value, convergent=True)

        your_turn(warpgroup.equals(1))
        zero = ops.const_i32(0)
        nil = fa.FragmentedArray.splat(arith.constant(ops.f32, 0.0), (ROWS, block), fa.WGMMA_LAYOUT)
        k_full.wait(zero)
        my_turn()
        acc = scores(prepared(nil)[0], zero)
        your_turn(ops.either(count >= 2, warpgroup.equals(0)))
        s = ready(acc, 0)
        release(k_empty, zero)
        peak, _, weights, total = softmax(s, zero, row_of(LOWEST), row_of(0.0), True)
        weights = weights.astype(dtype)

        def after_softmax(total: Any) -> None:
            """Keeps the softmax in front of the next wait, i.e. under the products that are in flight.

            LLVM needs the optimization barrier; ptxas would still hoist the wait over plain arithmetic, but not over a
            store to shared memory. This one depends on the sum of all weights and never happens.
            """
            for i, register in enumerate(total.registers.flat):
                t = Reg(vector.extract(register, dynamic_position=[], static_position=[0]))
                ops.store_shared(_address(ops, refs["barriers"], i32) + 4 * i, t, t < -1.0)

        def step(j: Reg, carry: list[Any], masked: bool) -> list[Any]:
            out, peak, total, weights = carry
            k_full.wait(j)
            my_turn()
            acc, out, weights = prepared(nil, out, weights)
            acc = scores(acc, j)
            v_full.wait(j - 1)
            out_acc = add_values(out, weights, j - 1)
            your_turn(ops.either(j < count - 1, warpgroup.equals(0)))
            s = ready(acc, 1)
            release(k_empty, j)
            peak, alpha, weights, total = softmax(s, j, peak, total, masked)
            weights, alpha, total = fa.optimization_barrier(weights, alpha, total)
            after_softmax(total)
            out, weights = ready(out_acc, 0, weights)
            release(v_empty, j - 1)
            return [out * wide(alpha), peak, total, weights.astype(dtype)]

        def loop(low: Reg, high: Reg, carry: list[Any], masked: bool) -> list[Any]:
            bound = ops.max_int(high - low, 0).value
            return utils.fori(bound, carry)(lambda i, c: step(low + Reg(i), c, masked)).results

        carry = [out, peak, total, weights]
        one = ops.const_i32(1)
        if p.window is None:
            # Blocks all of whose keys are at or before the CTA's first query.
            full = ops.max_int((start + 1) // block, 1)
            full = ops.select(full < count, full, count)
            carry = loop(one, full, carry, False)
            carry = loop(ops.max_int(full, 1), count, carry, True)
        else:
            carry = loop(one, count, carry, True)
        out, peak, total, weights = carry
        last = count - 1
        v_full.wait(last)
        bars["tail"][0].wait_parity(arith.constant(ir.IntegerType.get_signless(1), 0))
        out, weights = prepared(out, weights)
        out = ready(add_values(out, weights, last), 0)

        unit = ops.const_f32(1.0)
        if p.v_scaled:
            unit = ops.load_global_f32("v_scale", kv_head << 2)
        inverse = total._pointwise(lambda t: _reciprocal(ops, t, unit))
        out = out * wide(inverse)
        my_left = left - my_first
        nothing = arith.constant(ops.f32, 0.0)
        out = out.foreach(
            lambda v, at: arith.select((Reg(arith.index_cast(i32, at[0])) < my_left).value, v, nothing),
            create_array=True,
        )
        out.astype(dtype).store_tiled(q_smem, swizzle=p.swizzle)
        utils.commit_shared()
        ctx.async_copy(
            src_ref=q_smem, dst_ref=refs["out"], gmem_slice=q_slice, gmem_transform=(tile_transform,),
            swizzle=p.swizzle, predicate=elected,
        )  # fmt: skip
        ctx.await_async_copy(0)

    def nothing_to_see() -> None:
        """A padding block: 128 rows of zeros."""
        row_chunks = p.head_dim // 8
        zero = ops.const_i32(0)
        address = Reg(arith.extui(ops.i64, ((tile * p.queries + first) * p.heads + head).value)) * (p.head_dim * 2)
        base = _address(ops, refs["out"], ops.i64) + address
        for i in range(-(-ROWS * CONSUMERS * row_chunks // 384)):
            chunk = thread + 384 * i
            row, column = chunk // row_chunks, chunk % row_chunks
            offset = row * (p.heads * p.head_dim * 2) + (column << 4)

            def store(offset: Reg = offset) -> None:
                to = base + Reg(arith.extui(ops.i64, offset.value))
                ptx("st.global.v4.b32 [$0], {$1, $1, $1, $1};", to, zero, effects=True)

            ops.when(chunk < ROWS * CONSUMERS * row_chunks, store)

    ops.when(count < 1, nothing_to_see)

    def work() -> None:
        ops.when(warpgroup.equals(CONSUMERS), producer)
        ops.when(warpgroup < CONSUMERS, consumer)

    ops.when(count >= 1, work)


def _wgmma_registers(acc: Any, a: Any, b: ir.Value, swizzle: int) -> Any:
    """acc [64, n] + a [64, k] @ b, both in registers: mgpu.wgmma without its fence, which writes a's registers."""
    (k, n), element = mma_utils.tiled_memref_shape(b)
    group = swizzle // 2
    (base, (_, (k_stride, *_))), (_, k_group_stride), fastest = mma_utils.create_descriptor(
        b, swizzle=swizzle, large_tile=(group, group), group_size=(group, n), logical_k_major=True
    )
    registers = acc.registers.copy()
    for i in range(k // group):
        offset = arith.constant(base.type, mma_utils.encode_addr(i * k_group_stride))
        registers[0:1] = mgpu._wgmma.wgmma_m64(
            registers[0:1], a[:, i * group : (i + 1) * group], arith.addi(base, offset), swizzle=swizzle, n=n,
            a_element_type=element, b_element_type=element, a_transpose=None, a_k_stride=None,
            b_transpose=fastest != mma_utils.Dim.K, b_k_stride=k_stride,
        )  # fmt: skip
    return fa.FragmentedArray(_registers=registers, _layout=acc.layout, _is_signed=acc.is_signed)


def _address(ops: Mlir, ref: ir.Value, kind: Any) -> Reg:
    return Reg(llvm.ptrtoint(kind, utils.memref_ptr(ref)))


def _reciprocal(ops: Mlir, total: ir.Value, unit: Reg) -> ir.Value:
    """unit / total, 0 where total is 0."""
    t = Reg(vector.extract(total, dynamic_position=[], static_position=[0]))
    r = ops.select(t.equals(0.0), ops.const_f32(0.0), ops.reciprocal(t)) * unit
    return vector.broadcast(total.type, r.value)


@functools.lru_cache(maxsize=256)
def _kernel(p: Problem, dtype: Any):
    stages, block = p.config.stages, p.config.block_kv

    def paged_prefill(*refs):
        given = ("q", "k_pages", "v_pages", "page_table", "q_start", "q_len", "k_scale", "v_scale", "out")
        names = (*given, "q_smem", "k_smem", "v_smem", "barriers")

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * len(names))
        def program(ctx, *refs):
            _program(ctx, p, dict(zip(names, refs, strict=True)))

        program(*refs)

    return plgpu.kernel(
        paged_prefill,
        out_type=jax.ShapeDtypeStruct((p.tiles * p.queries, p.heads, p.head_dim), dtype),
        scratch_types=[
            plgpu.SMEM((CONSUMERS, *p.tiled(ROWS)), dtype),
            plgpu.SMEM((stages, *p.tiled(block)), dtype),
            plgpu.SMEM((stages, *p.tiled(block)), dtype),
            plgpu.SMEM((8 * (CONSUMERS + 4 * stages + 1),), jnp.int8),
        ],
        grid=(p.tiles * p.queries // (ROWS * CONSUMERS) * p.heads,),
        grid_names=("item",),
        num_threads=CONSUMERS + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane, approx_math=True),
    )


def prefill_attention(
    q, k_pages, v_pages, page_table, q_start, q_len, *, sm_scale, window=None, soft_cap=None, k_scale=None,
    v_scale=None, config: PrefillConfig | None = None,
):  # fmt: skip
    """See api.prefill_attention."""
    tiles, queries, heads, head_dim = q.shape
    pages, kv_heads, page_size, _ = k_pages.shape
    if q.dtype not in (jnp.bfloat16, jnp.float16) or k_pages.dtype != q.dtype:
        raise NotImplementedError(
            f"takes bf16 or f16 queries on pages of the same dtype, not {q.dtype} on {k_pages.dtype}"
        )
    if head_dim % 32 or head_dim > 256:
        raise NotImplementedError(f"takes head dims up to 256 that are multiples of 32, not {head_dim}")
    if queries % (ROWS * CONSUMERS):
        raise NotImplementedError(f"takes tiles of a multiple of {ROWS * CONSUMERS} queries, not {queries}")
    if tiles == 0 or queries == 0 or page_table.shape[1] == 0:
        raise NotImplementedError("takes no empty batch or page table")
    config = config or tuning.choose(
        "prefill_attention",
        tuning.key(head_dim=head_dim, page_size=page_size, items=tuning.bucket(tiles * queries // 128 * heads)),
        heuristic=lambda: prefill_heuristic(head_dim),
        space=lambda: prefill_search_space(head_dim, page_size),
    )
    if page_size % 8 or config.block_kv % page_size:
        raise NotImplementedError(
            f"takes page sizes that are multiples of 8 and divide {config.block_kv}, not {page_size}"
        )
    p = Problem(
        tiles=tiles, queries=queries, heads=heads, kv_heads=kv_heads, head_dim=head_dim, pages=pages,
        page_size=page_size, table_width=page_table.shape[1], sm_scale=float(sm_scale), window=window,
        soft_cap=None if soft_cap is None else float(soft_cap),
        k_scaled=k_scale is not None, v_scaled=v_scale is not None, config=config,
    )  # fmt: skip

    def per_head(scale: Any) -> jax.Array:
        return jnp.broadcast_to(jnp.asarray(1.0 if scale is None else scale, jnp.float32).reshape(-1), (kv_heads,))

    rows = pages * kv_heads * page_size
    out = _kernel(p, q.dtype)(
        q.reshape(tiles * queries, heads, head_dim), k_pages.reshape(rows, head_dim), v_pages.reshape(rows, head_dim),
        page_table.astype(jnp.int32), q_start.astype(jnp.int32), q_len.astype(jnp.int32),
        per_head(k_scale), per_head(v_scale),
    )  # fmt: skip
    return out.reshape(q.shape)
