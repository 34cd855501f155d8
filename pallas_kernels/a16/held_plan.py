"""The held kernel's configuration and all that follows from it, and no jax: slices of K, ring, shared memory."""

from __future__ import annotations

import dataclasses

from pallas_kernels.a16.problem import SMEM_BYTES, Problem
from pallas_kernels.a16.stored import BLOCK_BYTES, ROWS

MAX_M = 16
X_REGISTERS = {8: 128, 16: 64}  # of x a thread may hold, by warps of the block that multiply


@dataclasses.dataclass(frozen=True)
class Config:
    """warps: they divide K, at most 16; pieces: copies that a row tile arrives in, each awaited by its own warps;
    parts: of K, summed in float32 by XLA afterwards; stages: pieces in the ring (0: as many as fit); lift: the magic
    number is taken off the sums, not off the weights (4 bits without zero points); pdl: the first weights are fetched
    while the kernel before still runs."""

    warps: int = 16
    pieces: int = 1
    parts: int = 1
    stages: int = 0
    lift: bool = False
    pdl: bool = False


@dataclasses.dataclass(frozen=True)
class Plan(Problem):
    """Everything static about one kernel, derived from the problem and a configuration."""

    config: Config

    @property
    def n_tiles(self) -> int:  # mma columns: x rows in eights
        return -(-self.m // 8)

    @property
    def block_warps(self) -> int:  # of the warpgroups that multiply; those past config.warps only help to sum
        return -(-self.config.warps // 8) * 8

    @property
    def k_block(self) -> int:  # columns of a part
        return self.k // self.config.parts

    @property
    def k_piece(self) -> int:
        return self.k_block // self.config.pieces

    @property
    def k_warp(self) -> int:
        return self.k_block // self.config.warps

    @property
    def tiles(self) -> int:
        return self.n // ROWS

    @property
    def blocks(self) -> int:  # of a part; each block keeps to one part, whose x it holds
        return min(self.tiles, self.sms // self.config.parts)

    @property
    def x_registers(self) -> int:
        return self.k_warp // 16 * self.n_tiles * 2

    @property
    def flush_k(self) -> int:  # columns summed before a scale is applied
        return self.k_warp if self.scales_in_epilogue else min(self.group, self.k_warp)

    @property
    def piece_groups(self) -> int:
        return self.k_piece // self.group if self.k_piece % self.group == 0 else 1

    @property
    def weight_bytes(self) -> int:  # of a piece
        return self.k_piece // self.kind.block_k * BLOCK_BYTES

    def table_bytes(self) -> tuple[int, int, int]:
        """Bytes of scales, zeros and offsets of a piece."""
        return self.records(self.piece_groups)

    @property
    def copied_bytes(self) -> int:
        return self.weight_bytes + sum(self.table_bytes())

    @property
    def stage_bytes(self) -> int:
        return -(-self.copied_bytes // 128) * 128

    @property
    def x_stride(self) -> int:  # 16 bytes of padding keep ldmatrix free of bank conflicts
        return self.k_block * 2 + 16

    @property
    def x_bytes(self) -> int:
        return -(-self.m * self.x_stride // 128) * 128

    @property
    def half_floats(self) -> int:
        """Sums of rows 0-7 of a tile, and as many of rows 8-15: 16 more between them, for the banks."""
        return 64 * self.n_tiles + 16

    @property
    def partial_bytes(self) -> int:  # one buffer of all warps' sums
        return self.config.warps * 2 * self.half_floats * 4

    @property
    def barrier_bytes(self) -> int:  # full and empty of each stage; x full, x held, sums
        return 16 * self.stages + 24

    @property
    def stages(self) -> int:
        room = SMEM_BYTES - 1024 - 2 * self.partial_bytes
        fits = room // (self.stage_bytes + 16)
        return min(fits, self.config.stages or 32, self.config.pieces * -(-self.tiles // self.blocks))

    @property
    def data_bytes(self) -> int:
        """Ring, then sums; x lies over their end until the warps hold it."""
        return max(self.stages * self.stage_bytes + 2 * self.partial_bytes, self.x_bytes)

    @property
    def early(self) -> int:  # stages that x does not lie over
        return min(self.stages, (self.data_bytes - self.x_bytes) // self.stage_bytes)

    @property
    def producer_registers(self) -> int:
        return 24 if self.block_warps == 16 else 40

    @property
    def consumer_registers(self) -> int:
        """What the block was launched with, less the producers' share (see `wgmma_plan`)."""
        groups = self.block_warps // 4 + 1
        launched = min(65536 // (128 * groups) // 8 * 8, 248) * groups
        return min((launched - self.producer_registers) // (groups - 1) // 8 * 8, 240)

    def check(self) -> None:
        """Raises NotImplementedError when the kernel cannot take this problem in this configuration."""
        c = self.config
        problem = None
        if not 1 <= self.m <= MAX_M:
            problem = f"M = {self.m} is not in 1 .. {MAX_M}"
        elif not 1 <= c.warps <= 16 or c.warps % c.pieces:
            problem = f"{c.pieces} pieces for {c.warps} warps"
        elif self.k != c.parts * c.warps * self.k_warp or self.k_warp % self.kind.block_k:
            problem = f"K = {self.k} is not a multiple of {c.parts} x {c.warps} x {self.kind.block_k}"
        elif self.n % ROWS or self.blocks < 1:
            problem = f"N = {self.n} is not a multiple of {ROWS}, or {c.parts} parts are more than the multiprocessors"
        elif self.x_registers > X_REGISTERS[self.block_warps]:
            problem = f"x [{self.m}, {self.k_warp}] of a warp does not fit its registers"
        elif not self.scales_in_epilogue and (self.k_warp % self.group and self.group % self.k_warp):
            problem = f"groups of {self.group} do not divide a warp's {self.k_warp} columns"
        elif not self.scales_in_epilogue and (self.k_piece % self.group or self.group % 16):
            problem = f"groups of {self.group} do not divide a piece's {self.k_piece} columns"
        elif self.has_offset:
            problem = "offsets"
        elif c.lift and (self.kind.name != "u4" or self.has_zero):
            problem = "lift is for 4 bits without zero points"
        elif self.stages < min(2, c.pieces * -(-self.tiles // self.blocks)) or self.stages < c.pieces:
            problem = f"pieces of {self.stage_bytes} bytes leave no ring"
        elif self.data_bytes + self.barrier_bytes > SMEM_BYTES - 1024:
            problem = f"x [{self.m}, {self.k_block}] does not fit shared memory"
        if problem:
            raise NotImplementedError(f"held kernel: {problem}")
