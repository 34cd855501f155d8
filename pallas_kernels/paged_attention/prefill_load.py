"""The loading warpgroup of the prefill kernel: follows the page table with TMA, page by page, into rings of blocks.

Pages that no query of the item may see are addressed past the pool: TMA fills their place with zeros. fp8 pages land in
a ring of their own, two blocks ahead, and this warpgroup converts them to float16 (exact) into the ring that wgmma
reads: a thread turns 16 bytes into two chunks of 16, and half of the threads store their second chunk first, so that
eight threads hit all 32 banks.
"""

from __future__ import annotations

import functools
from typing import Any

from jax.experimental.mosaic.gpu import launch_context, utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

from pallas_kernels.paged_attention.prefill_problem import Problem, Ring, address
from pallas_kernels.paged_attention.prefill_walk import Item, item, items_of_cta, lengths
from pallas_kernels.paged_attention.simt import Mlir, Reg


def load(ctx: Any, ops: Mlir, p: Problem, refs: dict[str, ir.Value], rings: dict[str, Ring], thread: Reg) -> None:
    ops._ptx(f"setmaxnreg.dec.sync.aligned.u32 {p.loader_registers};", effects=True)
    elected = utils.single_thread_predicate(utils.ThreadSubset.WARPGROUP)
    convert = _Converter(ops, p, refs, rings, thread) if p.fp8 else None

    def one(n: Reg, carry: list[Reg]) -> list[Reg]:
        base, q_start, q_len = carry
        work = item(ops, p, n, q_start, q_len)
        following = lengths(ops, p, n + 1)
        if convert is None:

            def fill(kind: str, j: Reg) -> None:
                rows = _rows(ops, p, work, j)
                rings[f"{kind}_empty"].wait(base + j, flipped=True)
                _copy(ctx, ops, p, refs, kind, f"{kind}_smem", rings[f"{kind}_full"], base + j, rows, elected)

            def block(j: Reg, _: list[Reg]) -> list[Reg]:
                if p.config.early_keys:
                    # The place of keys j + 1 is free half a step before that of values j: Q K^T comes before P V.
                    ops.when(j + 1 < work.count, lambda: fill("k", j + 1))
                else:
                    fill("k", j)
                fill("v", j)
                return []

            if p.config.early_keys:
                ops.when(work.count >= 1, lambda: fill("k", ops.const_i32(0)))
            ops.loop(work.count, [], block)
        else:

            def fetch(j: Reg) -> None:
                rows = _rows(ops, p, work, j)
                for kind in "kv":
                    _copy(ctx, ops, p, refs, kind, f"raw_{kind}", rings[f"raw_{kind}"], base + j, rows, elected)

            def converted(j: Reg, _: list[Reg]) -> list[Reg]:
                for kind in "kv":
                    convert(kind, base + j)
                # All threads have read this slot of the raw ring: the block after next may land in it.
                utils.warpgroup_barrier()
                ops.when(j + p.raw_stages < work.count, lambda: fetch(j + p.raw_stages))
                return []

            for ahead in range(p.raw_stages):
                at = ops.const_i32(ahead)
                ops.when(at < work.count, functools.partial(fetch, at))
            ops.loop(work.count, [], converted)
        return [base + work.count, *following]

    zero = ops.const_i32(0)
    ops.loop(items_of_cta(ops, p), [zero, *lengths(ops, p, zero)], one)


def _rows(ops: Mlir, p: Problem, work: Item, j: Reg) -> list[Reg]:
    """First row in the pool (seen as [P * Hkv * Ps, Dh]) of each page of block j."""
    kv_head = work.head // (p.heads // p.kv_heads)
    rows = []
    for i in range(p.config.block_kv // p.page_size):
        page = (work.first_block + j) * (p.config.block_kv // p.page_size) + i
        at = work.tile * p.table_width + ops.min_int(page, p.table_width - 1)
        number = ops.load_global("page_table", at << 2)
        seen = (page * p.page_size) < work.end
        if p.window is not None:
            seen = ops.both(seen, (page * p.page_size) >= work.begin - (p.page_size - 1))
        row = (number * p.kv_heads + kv_head) * p.page_size
        rows.append(ops.select(seen, row, ops.const_i32(p.pages * p.kv_heads * p.page_size)))
    return rows


def _copy(
    ctx: Any, ops: Mlir, p: Problem, refs: dict[str, ir.Value], kind: str, smem: str, full: Ring, j: Reg,
    rows: list[Reg], elected: ir.Value,
) -> None:  # fmt: skip
    as_index = lambda r: arith.index_cast(ir.IndexType.get(), r.value)  # noqa: E731
    slot = utils.memref_slice(refs[smem], (as_index(full.slot(j)),))
    raw = smem.startswith("raw")
    unit = 1 if raw else 8  # rows of the buffer's first dimension
    options: dict[str, Any] = {}
    if not raw:
        options = dict(gmem_transform=(launch_context.TileTransform((8, p.columns)),), swizzle=p.swizzle)
    for i, row in enumerate(rows):
        part = slice(i * p.page_size // unit, (i + 1) * p.page_size // unit)
        ctx.async_copy(
            src_ref=refs[f"{kind}_pages"],
            dst_ref=utils.memref_slice(slot, (part,)),
            gmem_slice=(utils.ds(as_index(row), p.page_size), utils.ds(0, p.head_dim)),
            barrier=full.at(j),
            predicate=elected,
            **options,
        )


class _Converter:
    """raw ring (fp8, rows of Dh bytes) -> the ring that wgmma reads (float16, swizzled tiles)."""

    def __init__(self, ops: Mlir, p: Problem, refs: dict[str, ir.Value], rings: dict[str, Ring], thread: Reg):
        self.ops, self.p, self.refs, self.rings = ops, p, refs, rings
        self.lane = thread & 127

    def __call__(self, kind: str, j: Reg) -> None:
        ops, p, rings = self.ops, self.p, self.rings
        raw, full, empty = rings[f"raw_{kind}"], rings[f"{kind}_full"], rings[f"{kind}_empty"]
        bytes_of_block = p.config.block_kv * p.head_dim
        raw.wait(j)
        empty.wait(j, flipped=True)
        source = address(ops, self.refs[f"raw_{kind}"], ops.i32) + raw.slot(j) * bytes_of_block
        target = address(ops, self.refs[f"{kind}_smem"], ops.i32) + full.slot(j) * (2 * bytes_of_block)
        for i in range(bytes_of_block // 16 // 128):
            chunk = self.lane + 128 * i
            words = ops.load_shared_words(source + (chunk << 4))
            pairs = [half for word in words for half in ops.fp8_to_f16(word, p.fp8 or "")]
            first, second, swap = destination(ops, p, chunk)
            low = [ops.select(swap, pairs[i + 4], pairs[i]) for i in range(4)]
            high = [ops.select(swap, pairs[i], pairs[i + 4]) for i in range(4)]
            ops.store_shared_words(target + first, low)
            ops.store_shared_words(target + second, high)
        ops._ptx("fence.proxy.async.shared::cta;", effects=True)
        ops._ptx("mbarrier.arrive.shared.b64 _, [$0];", Reg(full.at(j).get_ptr()), effects=True)


def destination(ops: Any, p: Problem, chunk: Any) -> tuple[Any, Any, Any]:
    """Where the 16 values of raw `chunk` go: (byte of the chunk stored first, of the second, whether they swap).

    A swizzled tile is 8 rows of `swizzle` bytes whose 16-byte chunk c lies at c ^ (row % 8) (swizzle 128) or at
    c ^ (row % 8 / 2) (swizzle 64); tiles of a block run over Dh first.
    """
    per_row = p.head_dim // 16
    row, column = chunk // per_row, chunk % per_row
    per_tile = p.swizzle // 32  # raw chunks of a row of a tile
    within = (column % per_tile) << 1
    mask = row & 7 if p.swizzle == 128 else (row & 7) >> 1
    tile = (row >> 3) * (p.head_dim // p.columns) + column // per_tile
    start = tile * (8 * p.swizzle) + (row & 7) * p.swizzle
    swap = ((column // per_tile) & 1).equals(1)
    turn = ops.select(swap, ops.const_i32(1), ops.const_i32(0))
    first, second = (within + turn) ^ mask, (within + (turn ^ 1)) ^ mask
    return start + (first << 4), start + (second << 4), swap
