"""The decode kernel's configuration and all that follows from it, and no jax: tiles, stages, shared memory."""

from __future__ import annotations

import dataclasses
import math

from pallas_kernels.a16.problem import SMEM_BYTES, Problem
from pallas_kernels.a16.stored import BLOCK_BYTES, ROWS

WARPS = 16


@dataclasses.dataclass(frozen=True)
class Config:
    """row_tiles: 16-row tiles per warp; row_warps x k_warps <= 16 warps; unit: blocks of k per stage of a warp's
    ring; split: blocks of a cluster along K; stages: depth of the ring (0: as deep as fits)."""

    row_tiles: int = 1
    row_warps: int = 1
    k_warps: int = 16
    unit: int = 4
    split: int = 1
    stages: int = 0
    pdl: bool = False

    @property
    def rows(self) -> int:
        return ROWS * self.row_tiles * self.row_warps


@dataclasses.dataclass(frozen=True)
class Plan(Problem):
    """Everything static about one kernel, derived from the problem and a configuration."""

    config: Config

    @property
    def n_tiles(self) -> int:  # mma columns: x rows in eights
        return -(-self.m // 8)

    @property
    def k_block(self) -> int:  # columns of one block of the cluster
        return self.k // self.config.split

    @property
    def unit_k(self) -> int:
        return self.config.unit * self.kind.block_k

    @property
    def units(self) -> int:  # per warp and tile
        return self.k_block // (self.unit_k * self.config.k_warps)

    @property
    def tiles(self) -> int:
        return self.n // self.config.rows

    @property
    def clusters(self) -> int:
        return min(self.tiles, self.most_clusters(self.config.split))

    @property
    def flush_k(self) -> int:  # columns summed before a scale is applied
        return self.unit_k if self.scales_in_epilogue else math.gcd(self.group, self.unit_k)

    @property
    def unit_groups(self) -> int:  # groups a unit may touch
        if self.unit_k % self.group == 0:
            return self.unit_k // self.group
        if self.group % self.unit_k == 0:
            return 1
        return min((self.unit_k - 2) // self.group + 2, self.groups)

    @property
    def weight_bytes(self) -> int:  # of a stage
        return self.config.row_tiles * self.config.unit * BLOCK_BYTES

    def table_bytes(self) -> tuple[int, int, int]:
        """Bytes of scales, zeros and offsets of a stage, for one 16-row tile."""
        return self.records(self.unit_groups)

    @property
    def copied_bytes(self) -> int:
        return self.weight_bytes + self.config.row_tiles * sum(self.table_bytes())

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
    def partial_stride(self) -> int:  # floats between two columns of the partial sums
        return self.config.rows + 4

    @property
    def partial_bytes(self) -> int:  # one buffer of partial sums
        return self.config.k_warps * self.n_tiles * 8 * self.partial_stride * 4

    @property
    def stages(self) -> int:
        active = self.config.row_warps * self.config.k_warps
        room = SMEM_BYTES - 1024 - self.x_bytes - 2 * self.partial_bytes - 8 * self.units - 8
        fits = room // (active * (self.stage_bytes + 8))
        total = self.units * -(-self.tiles // self.clusters)  # a deeper ring would never be filled
        return min(fits, self.config.stages or 16, max(total, 1))

    def check(self) -> None:
        """Raises NotImplementedError when the kernel cannot take this problem in this configuration."""
        c = self.config
        problem = None
        if self.n % c.rows:
            problem = f"N = {self.n} is not a multiple of {c.rows}"
        elif self.k_block * c.split != self.k or self.units * self.unit_k * c.k_warps != self.k_block:
            problem = f"K = {self.k} is not a multiple of {c.split} x {c.k_warps} x {self.unit_k}"
        elif c.row_warps * c.k_warps > WARPS:
            problem = "more than 16 warps"
        elif not self.scales_in_epilogue and (self.flush_k % 16 or self.k % self.group):
            problem = f"groups of {self.group} do not divide units of {self.unit_k} columns"
        elif self.stages < 2 and self.units * self.tiles > self.clusters:
            problem = f"x [{self.m}, {self.k_block}] leaves no shared memory for the weights"
        elif self.stages < 1 or not 1 <= self.m <= 64 or c.rows % c.split:
            problem = f"no room for M = {self.m}"
        if problem:
            raise NotImplementedError(f"decode kernel: {problem}")
