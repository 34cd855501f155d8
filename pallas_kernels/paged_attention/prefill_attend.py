"""The attending warpgroups of the prefill kernel: 64 queries each, keys and values from the rings.

Inside a warpgroup, while the tensor cores compute Q K_j^T and then P_{j-1} V_{j-1}, the softmax of block j runs between
the two waits; with `pingpong` the warpgroups also take turns at issuing, so that one's softmax (exp2: 16 a cycle an SM)
hides behind the other's products. Only blocks that reach past the item's first query (or a window's edge) are masked.

The rows of the last page behind the sequence's end hold whatever the page held before: their scores are replaced by the
mask, and their values by zeros in shared memory (0 * NaN would spread), by each warpgroup for itself.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import launch_context, mma_utils, utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, scf, vector

from pallas_kernels.paged_attention.prefill_combine import Combine
from pallas_kernels.paged_attention.prefill_problem import ROWS, Problem, Ring, address
from pallas_kernels.paged_attention.prefill_softmax import LOG2E, LOWEST, Softmax, row_array, scalar
from pallas_kernels.paged_attention.prefill_walk import Item, item, items_of_cta, lengths, place
from pallas_kernels.paged_attention.simt import Mlir, Reg

_WGMMA_K = 16  # inner dimension of one wgmma of 16-bit operands


class Attend:
    """One consumer warpgroup."""

    def __init__(
        self, ctx: Any, ops: Mlir, p: Problem, refs: dict[str, ir.Value], rings: dict[str, Ring], thread: Reg,
        warpgroup: Reg,
    ):  # fmt: skip
        self.ctx, self.ops, self.p, self.refs, self.rings = ctx, ops, p, refs, rings
        self.thread, self.warpgroup = thread, warpgroup
        self.elected = utils.single_thread_predicate(utils.ThreadSubset.WARPGROUP)
        self.q_smem = utils.memref_slice(refs["q_smem"], (self._index(warpgroup),))
        self.out_smem = self.q_smem
        if p.own_output:
            self.out_smem = utils.memref_slice(refs["out_smem"], (self._index(warpgroup),))
        self.q_bar = rings["q"].at(warpgroup)
        self.dtype = ir.MemRefType(refs["k_smem"].type).element_type  # of keys, values and weights
        self.out_dtype = ir.MemRefType(refs["out"].type).element_type
        self.tile_transform = launch_context.TileTransform((8, p.columns))

    def _index(self, r: Reg) -> ir.Value:
        return arith.index_cast(ir.IndexType.get(), r.value)

    # --- the list of items ---

    def run(self) -> None:
        ops, p = self.ops, self.p
        ops._ptx(f"setmaxnreg.inc.sync.aligned.u32 {p.consumer_registers};", effects=True)
        zero = ops.const_i32(0)
        mine = items_of_cta(ops, p)
        self.copy_queries(zero, zero < mine)
        self.your_turn(self.warpgroup.equals(1))

        def one(n: Reg, carry: list[Reg]) -> list[Reg]:
            base, q_start, q_len = carry
            work = item(ops, p, n, q_start, q_len)
            following = lengths(ops, p, n + 1)
            self.q_bar.wait_parity((n & 1).equals(1).value)
            next_queries = functools.partial(self.copy_queries, n + 1, (n + 1) < mine)
            ops.when(work.count >= 1, lambda: self.attend(work, base, next_queries))
            if p.rest:  # a part without blocks: its item is another CTA's
                ops.when(ops.both(work.count < 1, work.ends < 1), next_queries)
                ops.when(ops.both(work.count < 1, work.ends >= 1), lambda: self.padding(work, next_queries))
            else:
                ops.when(work.count < 1, lambda: self.padding(work, next_queries))
            return [base + work.count, *following]

        ops.loop(mine, [zero, *lengths(ops, p, zero)], one)
        # The turn that the other warpgroup left behind.
        ops.when(self.warpgroup.equals(0), self.my_turn)
        self.ctx.await_async_copy(0)

    def _query_slice(self, tile: Reg, first: Reg, head: Reg) -> tuple[Any, ...]:
        row = tile * self.p.queries + first + self.warpgroup * ROWS
        return utils.ds(self._index(row), ROWS), self._index(head), utils.ds(0, self.p.head_dim)

    def copy_queries(self, n: Reg, exists: Reg) -> None:
        self.ctx.async_copy(
            src_ref=self.refs["q"], dst_ref=self.q_smem, gmem_slice=self._query_slice(*place(self.ops, self.p, n)),
            gmem_transform=(self.tile_transform,), swizzle=self.p.swizzle, barrier=self.q_bar,
            predicate=arith.andi(self.elected, exists.value),
        )  # fmt: skip

    def padding(self, work: Item, next_queries: Any) -> None:
        """Nothing to see: zeros."""
        zero = fa.FragmentedArray.splat(
            arith.constant(self.ops.f32, 0.0), (ROWS, self.p.head_dim), fa.WGMMA_LAYOUT, is_signed=None
        )
        if self.p.own_output:
            next_queries()
        self.store(work, zero)
        if not self.p.own_output:
            self.ctx.await_async_copy(0, await_read_only=True)
            next_queries()

    def store(self, work: Item, out: Any) -> None:
        self.ctx.await_async_copy(0, await_read_only=True)  # the last item's result has left its place
        out.astype(self.out_dtype).store_tiled(self.out_smem, swizzle=self.p.swizzle)
        utils.commit_shared()
        self.ctx.async_copy(
            src_ref=self.out_smem, dst_ref=self.refs["out"],
            gmem_slice=self._query_slice(work.tile, work.first, work.head),
            gmem_transform=(self.tile_transform,), swizzle=self.p.swizzle, predicate=self.elected,
        )  # fmt: skip

    # --- turns, products ---

    def my_turn(self) -> None:
        if self.p.config.pingpong:
            self.ops._ptx("bar.sync $0, 256;", self.warpgroup + 8, effects=True, convergent=True)

    def your_turn(self, where: Reg | None = None) -> None:
        if self.p.config.pingpong:
            other = (self.ops.const_i32(9) - self.warpgroup).value
            predicate = None if where is None else where.value
            utils.inline_ptx("bar.arrive $0, 256;", other, predicate=predicate, convergent=True)

    def slot(self, kind: str, j: Reg) -> ir.Value:
        return utils.memref_slice(self.refs[f"{kind}_smem"], (self._index(self.rings[f"{kind}_full"].slot(j)),))

    def prepared(self, *arrays: Any) -> list[Any]:
        """Accumulators (f32) and A operands whose registers the following wgmmas use.

        All of a step's registers are pinned before its first wgmma: ptxas serializes every wgmma of a function
        in which a register is written between the issue and the wait (C7513; so compiled, 538 TFLOP/s).
        """
        accs = [
            mgpu.WGMMAAccumulator.from_registers(x, sync=False)._value if x.mlir_dtype == self.ops.f32 else x
            for x in arrays
        ]
        pinned = fa.optimization_barrier(*accs)
        self.ops._ptx("wgmma.fence.sync.aligned;", effects=True, convergent=True)
        return list(pinned) if len(arrays) > 1 else [pinned]

    def _commit(self) -> None:
        self.ops._ptx("wgmma.commit_group.sync.aligned;", effects=True, convergent=True)

    def scores(self, acc: Any, j: Reg) -> Any:
        """Issues Q K_j^T into a prepared zero accumulator."""
        keys = utils.memref_transpose(self.slot("k", j), (1, 0, 3, 2))
        acc = mgpu.WGMMAAccumulator(_value=acc, _original_layout=fa.WGMMA_LAYOUT, _sync=False)
        acc = mgpu.wgmma(acc, self.queries, keys, swizzle=self.p.swizzle)
        self._commit()
        return acc

    def add_values(self, acc: Any, weights: Any, j: Reg) -> Any:
        """Issues acc += P V_j; both prepared."""
        acc = wgmma_registers(acc, weights, self.slot("v", j), self.p.swizzle)
        self._commit()
        return mgpu.WGMMAAccumulator(_value=acc, _original_layout=fa.WGMMA_LAYOUT, _sync=False)

    def ready(self, acc: Any, pending: int, *more: Any) -> Any:
        self.ops._ptx(f"wgmma.wait_group.sync.aligned {pending};", effects=True, convergent=True)
        return fa.optimization_barrier(acc.value, *more)

    def release(self, kind: str, j: Reg) -> None:
        self.rings[f"{kind}_empty"].at(j).arrive(predicate=self.elected)

    # --- one item ---

    def attend(self, work: Item, base: Reg, next_queries: Any) -> None:
        ops, p = self.ops, self.p
        k_full, v_full = self.rings["k_full"], self.rings["v_full"]
        self.scale = ops.const_f32(p.sm_scale if p.soft_cap else p.sm_scale * LOG2E)
        kv_head = work.head // (p.heads // p.kv_heads)
        if p.k_scaled:
            self.scale = self.scale * ops.load_global_f32("k_scale", kv_head << 2)
        self.queries = self.q_smem
        if p.fp8:
            self.queries = self._queries_to_f16()
        softmax = Softmax(ops, p, self.thread, self.scale)
        start = work.start + self.warpgroup * ROWS
        block = p.config.block_kv
        limit = start - work.first_block * block  # the last key that row 0 sees, from the first block's first

        row_of = lambda value: fa.FragmentedArray.splat(  # noqa: E731
            arith.constant(ops.f32, value), (ROWS,), fa.WGMMA_ROW_LAYOUT
        )
        out = fa.FragmentedArray.splat(arith.constant(ops.f32, 0.0), (ROWS, p.head_dim), fa.WGMMA_LAYOUT)
        nil = fa.FragmentedArray.splat(arith.constant(ops.f32, 0.0), (ROWS, block), fa.WGMMA_LAYOUT)
        k_full.wait(base)
        self.my_turn()
        acc = self.scores(self.prepared(nil)[0], base)
        self.your_turn()
        s = self.ready(acc, 0)
        self.release("k", base)
        peak, _, _, weights, total = softmax(s, limit, row_of(LOWEST), row_of(0.0), True)
        weights = weights.astype(self.dtype)

        def step(j: Reg, carry: list[Any], masked: bool) -> list[Any]:
            out, peak, total, weights = carry
            at = base + j
            k_full.wait(at)
            self.my_turn()
            acc, out, weights = self.prepared(nil, out, weights)
            acc = self.scores(acc, at)
            v_full.wait(at - 1)
            out_acc = self.add_values(out, weights, at - 1)
            self.your_turn()
            s = self.ready(acc, 1)
            self.release("k", at)
            peak, alpha, grown, weights, total = softmax(s, limit - j * block, peak, total, masked)
            weights, alpha, total = fa.optimization_barrier(weights, alpha, total)
            self._after(total)
            out, weights = self.ready(out_acc, 0, weights)
            self.release("v", at - 1)
            return [self._scaled(out, alpha, grown), peak, total, weights.astype(self.dtype)]

        def loop(low: Reg, high: Reg, carry: list[Any], masked: bool) -> list[Any]:
            bound = ops.max_int(high - low, 0).value
            return utils.fori(bound, carry)(lambda i, c: step(low + Reg(i), c, masked)).results

        carry = [out, peak, total, weights]
        one, count = ops.const_i32(1), work.count
        if p.window is None:
            # Blocks all of whose keys are at or before the item's first query.
            full = ops.max_int((work.start + 1) // block - work.first_block, 1)
            full = ops.select(full < count, full, count)
            carry = loop(one, full, carry, False)
            carry = loop(full, count, carry, True)
        else:
            carry = loop(one, count, carry, True)
        out, peak, total, weights = carry
        if p.own_output:
            utils.warpgroup_barrier()  # all four warps have read the queries
            next_queries()
        last = base + count - 1
        v_full.wait(last)
        valid = work.end - (work.first_block + count - 1) * block  # rows of the last block that exist
        ops.when(valid < block, lambda: self._zero_tail(last, valid))
        out, weights = self.prepared(out, weights)
        out = self.ready(self.add_values(out, weights, last), 0)
        self.release("v", last)

        if not p.rest:
            self.finish(work, out, total, next_queries)
            return
        combine = Combine(ops, p, self.thread, self.warpgroup)

        def tell() -> None:
            combine.tell(out, peak, total)
            if not p.own_output:
                next_queries()

        def last_of_item() -> None:
            whole, _, sums = combine(work, out, peak, total)
            self.finish(work, whole, sums, next_queries)

        ops.when(work.ends < 1, tell)
        ops.when(work.ends >= 1, last_of_item)

    def finish(self, work: Item, out: Any, total: Any, next_queries: Any) -> None:
        """Divides by the sums of weights and stores."""
        ops, p = self.ops, self.p
        kv_head = work.head // (p.heads // p.kv_heads)
        unit = ops.load_global_f32("v_scale", kv_head << 2) if p.v_scaled else ops.const_f32(1.0)
        lanes = [scalar(r) for r in total.registers.flat]
        for distance in (1, 2):
            lanes = [t + ops.shuffle_xor(t, distance) for t in lanes]
        inverse = [ops.select(t.equals(0.0), ops.const_f32(0.0), ops.reciprocal(t)) * unit for t in lanes]
        out = out * self._wide(row_array(inverse, total))
        live = work.left - self.warpgroup * ROWS
        nothing = arith.constant(ops.f32, 0.0)

        def hide(value: ir.Value, at: tuple[ir.Value, ...]) -> ir.Value:
            return arith.select((Reg(arith.index_cast(ops.i32, at[0])) < live).value, value, nothing)

        self.store(work, out.foreach(hide, create_array=True))
        if not p.own_output:
            self.ctx.await_async_copy(0, await_read_only=True)
            next_queries()

    def _wide(self, x: Any) -> Any:
        return x.broadcast_in_dim((ROWS, self.p.head_dim), (0,), fa.WGMMA_LAYOUT)

    def _scaled(self, out: Any, alpha: Any, grown: Reg) -> Any:
        """out * alpha; skipped by warps all of whose rows have alpha 1."""
        branch = scf.IfOp(grown.value, [r.type for r in out.registers.flat], has_else=True)
        with ir.InsertionPoint(branch.then_block):
            scf.yield_(list((out * self._wide(alpha)).registers.flat))
        with ir.InsertionPoint(branch.else_block):
            scf.yield_(list(out.registers.flat))
        registers = np.empty(out.registers.size, dtype=object)
        registers[:] = list(branch.results)
        registers = registers.reshape(out.registers.shape)
        return fa.FragmentedArray(_registers=registers, _layout=out.layout, _is_signed=out.is_signed)

    def _after(self, total: Any) -> None:
        """Keeps the softmax in front of the next wait, i.e. under the products that are in flight.

        LLVM needs the optimization barrier; ptxas would still hoist the wait over plain arithmetic, but not over a
        store to shared memory. This one depends on the sum of all weights and never happens.
        """
        ops = self.ops
        for i, register in enumerate(total.registers.flat):
            t = Reg(vector.extract(register, dynamic_position=[], static_position=[0]))
            ops.store_shared(address(ops, self.refs["barriers"], ops.i32) + 4 * i, t, t < -1.0)

    def _queries_to_f16(self) -> ir.Value:
        """bf16 queries -> float16, in place (a value beyond float16's range becomes infinite)."""
        ops, p = self.ops, self.p
        if isinstance(ir.MemRefType(self.refs["q"].type).element_type, ir.F16Type):
            return self.q_smem
        base = address(ops, self.q_smem, ops.i32) + ((self.thread & 127) << 4)
        for i in range(ROWS * p.head_dim * 2 // 16 // 128):
            words = ops.load_shared_words(base + 2048 * i)
            ops.store_shared_words(base + 2048 * i, [ops.pack(*ops.unpack_bf16(w), "f16") for w in words])
        utils.commit_shared()
        shape = ir.MemRefType(self.q_smem.type)
        as_f16 = ir.MemRefType.get(shape.shape, ir.F16Type.get(), memory_space=shape.memory_space)
        return utils.ptr_as_memref(utils.memref_ptr(self.q_smem), as_f16)

    def _zero_tail(self, j: Reg, valid: Reg) -> None:
        ops, p = self.ops, self.p
        base = address(ops, self.refs["v_smem"], ops.i32)
        base = base + self.rings["v_full"].slot(j) * (p.config.block_kv * p.head_dim * 2)
        chunks = p.columns // 8  # 16-byte chunks of a row of a tile
        per_group = 8 * p.head_dim // 8  # chunks of 8 rows
        zeros = [ops.const_i32(0)] * 4
        for i in range(p.config.block_kv * p.head_dim * 2 // 16 // 128):
            chunk = (self.thread & 127) + 128 * i
            row = ((chunk // per_group) << 3) + (chunk // chunks) % 8
            ops.when(row >= valid, functools.partial(ops.store_shared_words, base + (chunk << 4), zeros))
        utils.commit_shared()


def wgmma_registers(acc: Any, a: Any, b: ir.Value, swizzle: int) -> Any:
    """acc [64, n] + a [64, k] @ b, both in registers: mgpu.wgmma without its fence, which writes a's registers.

    In steps of 16 of k, the instruction's own: mgpu.wgmma goes by swizzles (64 keys), which blocks of 160 do not fill.
    """
    (k, n), element = mma_utils.tiled_memref_shape(b)
    if k % _WGMMA_K:
        raise ValueError(f"wgmma takes multiples of {_WGMMA_K} of the inner dimension, not {k}")
    (base, (_, (stride, *_))), _, fastest = mma_utils.create_descriptor(
        b, swizzle=swizzle, group_size=(_WGMMA_K, n), logical_k_major=True
    )
    registers = acc.registers.copy()
    for i in range(k // _WGMMA_K):
        offset = arith.constant(base.type, mma_utils.encode_addr(i * stride))
        registers[0:1] = mgpu._wgmma.wgmma_m64(
            registers[0:1], a[:, i * _WGMMA_K : (i + 1) * _WGMMA_K], arith.addi(base, offset),
            swizzle=2 * _WGMMA_K,  # read there as the width of `a` in bytes; the descriptor holds the true swizzle
            n=n, a_element_type=element, b_element_type=element, a_transpose=None, a_k_stride=None,
            b_transpose=fastest != mma_utils.Dim.K, b_k_stride=stride,
        )  # fmt: skip
    return fa.FragmentedArray(_registers=registers, _layout=acc.layout, _is_signed=acc.is_signed)
