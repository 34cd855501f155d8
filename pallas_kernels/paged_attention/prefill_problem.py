"""What is static of a prefill call, and the rings through which its two roles (load, attend) meet."""

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
    def rest(self) -> int:
        """Items that the last round splits over all CTAs by keys; 0 where it deals them whole."""
        return self.items % self.blocks if self.config.split_last else 0

    @property
    def loader_registers(self) -> int:
        """Of a thread of the loading warpgroup; the other two share the rest of 168 a thread, in multiples of 8."""
        return 40 if self.fp8 or self.rest else 24

    @property
    def consumer_registers(self) -> int:
        return (3 * 168 - self.loader_registers) // 16 * 8

    @property
    def partial_rows(self) -> int:
        """Of 16 bytes, which a thread keeps of a part's result: its accumulators, two maxima, two sums."""
        return self.head_dim // 8 + 1

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
