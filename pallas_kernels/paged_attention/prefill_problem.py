"""What is static of a prefill call, and the parts of its kernel that both roles (load, attend) share."""

from __future__ import annotations

import dataclasses
from typing import Any

from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from pallas_kernels.paged_attention.config import PrefillConfig
from pallas_kernels.paged_attention.simt import Mlir, Reg

ROWS = 64  # queries of a warpgroup: the M of wgmma
CONSUMERS = 2
SMEM_BYTES = 227 * 1024


@dataclasses.dataclass(frozen=True)
class Problem:
    """All that is static. `blocks` of the grid walk over `items` (a head of 128 queries of a tile each)."""

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
    fp8: str | None  # "e4m3" or "e5m2": the pages' kind, converted to float16 on the way
    blocks: int
    config: PrefillConfig

    @property
    def blocks_per_tile(self) -> int:
        return self.queries // (ROWS * CONSUMERS)

    @property
    def items(self) -> int:
        return self.tiles * self.blocks_per_tile * self.heads

    @property
    def swizzle(self) -> int:
        return 128 if self.head_dim % 64 == 0 else 64

    @property
    def columns(self) -> int:  # of a swizzled tile
        return self.swizzle // 2

    def tiled(self, rows: int) -> tuple[int, ...]:
        """Shape in shared memory of [rows, Dh]: tiles of 8 rows by `swizzle` bytes."""
        return (rows // 8, self.head_dim // self.columns, 8, self.columns)

    @property
    def raw_stages(self) -> int:  # blocks of fp8 keys (and of values) on their way
        return 2 if self.fp8 else 0

    @property
    def fixed_bytes(self) -> int:
        """Shared memory without the place of the result."""
        ring = self.config.stages * 2 * 2 + self.raw_stages * 2
        return self.head_dim * (ring * self.config.block_kv + 2 * ROWS * CONSUMERS) + 2048

    @property
    def own_output(self) -> bool:
        """Whether the result has a place of its own, so that the next queries are copied while it is stored."""
        return self.fixed_bytes + 2 * ROWS * CONSUMERS * self.head_dim <= SMEM_BYTES

    def barriers(self) -> dict[str, tuple[int, int]]:
        """name -> (how many, arrivals of a phase)."""
        stages, copies = self.config.stages, self.config.block_kv // self.page_size
        full = 128 if self.fp8 else copies  # the converting threads, or the copies
        ring = dict(k_full=full, k_empty=CONSUMERS, v_full=full, v_empty=CONSUMERS)
        out = dict(q=(CONSUMERS, 1), **{name: (stages, count) for name, count in ring.items()})
        return out | ({"raw_k": (self.raw_stages, copies), "raw_v": (self.raw_stages, copies)} if self.fp8 else {})


class Ring:
    """Barriers of a ring of buffers: index -> the barrier of its slot and its parity."""

    def __init__(self, base: ir.Value, first: int, stages: int, i32: ir.Type):
        self.base, self.first, self.stages, self.i32 = base, first, stages, i32

    def slot(self, j: Reg) -> Reg:
        return j % self.stages

    def at(self, j: Reg) -> utils.BarrierRef:
        offset = arith.addi(arith.constant(self.i32, self.first), self.slot(j).value)
        return utils.BarrierRef(self.base, offset, None, 1)  # type: ignore

    def wait(self, j: Reg, flipped: bool = False) -> None:
        parity = ((j // self.stages) & 1) ^ int(flipped)
        self.at(j).wait_parity(parity.equals(1).value)


def rings(ops: Mlir, p: Problem, ref: ir.Value) -> dict[str, Ring]:
    base, out, first = utils.memref_ptr(ref), {}, 0
    for name, (count, _) in p.barriers().items():
        out[name] = Ring(base, first, count, ops.i32)
        first += count
    return out


def address(ops: Mlir, ref: ir.Value, kind: Any) -> Reg:
    return Reg(llvm.ptrtoint(kind, utils.memref_ptr(ref)))


@dataclasses.dataclass(frozen=True)
class Item:
    """One item of this CTA's list: a head of 128 queries, and the blocks of keys that they see."""

    tile: Reg
    first: Reg  # query of the tile
    head: Reg
    start: Reg  # position of the first query
    left: Reg  # live queries from there on, if positive
    end: Reg  # keys at end and beyond are seen by nobody here
    begin: Reg  # nor those before
    first_block: Reg
    count: Reg  # of blocks; 0 for padding


def items_of_cta(ops: Mlir, p: Problem) -> Reg:
    """How many items this CTA has."""
    rounds, rest = divmod(p.items, p.blocks)
    if not rest:
        return ops.const_i32(rounds)
    mine = _place(ops, p, ops.const_i32(rounds)) < rest
    return ops.select(mine, ops.const_i32(rounds + 1), ops.const_i32(rounds))


def _place(ops: Mlir, p: Problem, n: Reg) -> Reg:
    """Items are dealt in rounds, every other one backwards: the first of a round see the most keys."""
    cta = ops.special("ctaid.x")
    return ops.select((n & 1).equals(0), cta, ops.const_i32(p.blocks - 1) - cta)


def place(ops: Mlir, p: Problem, n: Reg) -> tuple[Reg, Reg, Reg]:
    """(tile, first query, head) of this CTA's item n; later ones of a sequence, which see more keys, go first.

    Heads are adjacent in time and share keys and values in L2.
    """
    item = ops.min_int(n * p.blocks + _place(ops, p, n), p.items - 1)
    head, rest = item % p.heads, item // p.heads
    tile = ops.const_i32(p.tiles - 1) - rest // p.blocks_per_tile
    q_block = ops.const_i32(p.blocks_per_tile - 1) - rest % p.blocks_per_tile
    return tile, q_block * (ROWS * CONSUMERS), head


def lengths(ops: Mlir, p: Problem, n: Reg) -> list[Reg]:
    """q_start and q_len of item n's tile: asked for one item ahead, since they come from far."""
    tile, _, _ = place(ops, p, n)
    return [ops.load_global("q_start", tile << 2), ops.load_global("q_len", tile << 2)]


def item(ops: Mlir, p: Problem, n: Reg, q_start: Reg, q_len: Reg) -> Item:
    tile, first, head = place(ops, p, n)
    block = p.config.block_kv
    start, left = q_start + first, q_len - first
    end = start + ops.min_int(left, ROWS * CONSUMERS)
    begin = ops.const_i32(0) if p.window is None else ops.max_int(start - (p.window - 1), 0)
    first_block = begin // block
    count = ops.select(left >= 1, (end + (block - 1)) // block - first_block, ops.const_i32(0))
    return Item(tile, first, head, start, left, end, begin, first_block, count)
