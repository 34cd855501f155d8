"""The wgmma kernel's configuration and all that follows from it, and no jax: tiles, stages, shared memory."""

from __future__ import annotations

import dataclasses

from pallas_kernels.a16.problem import SMEM_BYTES, Problem
from pallas_kernels.a16.stored import BLOCK_BYTES, ROWS

CHUNK = 256  # bytes: the widest box of single bytes that TMA copies


@dataclasses.dataclass(frozen=True)
class Config:
    """warpgroups: consumers, 64 rows of W each; m_tile: rows of x; k_step: columns of a stage (multiple of 64);
    split: blocks of a cluster along K, which needs a cluster for every tile; stages: 0 is as many as fit; parts: tiles
    along K, summed in float32 by XLA afterwards (not with split); k_groups: warpgroups that share their rows and take a
    part of each stage's columns, their sums added in shared memory (one tile a block, not with parts)."""

    warpgroups: int = 2
    m_tile: int = 64
    k_step: int = 128
    split: int = 1
    stages: int = 0
    parts: int = 1
    k_groups: int = 1

    @property
    def row_groups(self) -> int:
        """Warpgroups that hold the sums of different rows."""
        return self.warpgroups // self.k_groups

    @property
    def rows(self) -> int:
        return 64 * self.row_groups


@dataclasses.dataclass(frozen=True)
class Plan(Problem):
    """Everything static about one kernel, derived from the problem and a configuration."""

    config: Config

    @property
    def n_tiles(self) -> int:
        return self.n // self.config.rows

    @property
    def m_tiles(self) -> int:
        return -(-self.m // self.config.m_tile)

    @property
    def tiles(self) -> int:
        return self.n_tiles * self.m_tiles * self.config.parts

    @property
    def clusters(self) -> int:
        return min(self.tiles, self.most_clusters(self.config.split))

    @property
    def k_block(self) -> int:
        return self.k // (self.config.split * self.config.parts)

    @property
    def steps(self) -> int:
        return self.k_block // self.config.k_step

    @property
    def batch(self) -> int:
        """16-column steps that are dequantized, then multiplied, at a time.

        Two batches of operand A must fit in the registers beside the sums: of 112 a thread (four warpgroups) 64 are
        sums at m_tile 128, and ptxas would serialize the products for want of registers.
        """
        return 2 if self.config.warpgroups == 4 and self.config.m_tile > 64 else self.kind.steps

    @property
    def unroll(self) -> int:
        """Steps of an iteration of the consumers' loop: two batches at least, in registers of their own. A product may
        still read its operand A when the next batch is dequantized, and a loop would write the same registers."""
        return 2 if self.group_step == 16 * self.batch else 1

    @property
    def group_step(self) -> int:
        """Columns of a stage that one warpgroup multiplies."""
        return self.config.k_step // self.config.k_groups

    @property
    def step_groups(self) -> int:
        return max(1, self.config.k_step // self.group)

    @property
    def row_tiles(self) -> int:
        return self.config.rows // ROWS

    @property
    def producer_registers(self) -> int:
        return 40 if self.config.warpgroups < 4 else 24

    @property
    def consumer_registers(self) -> int:
        """What the block was launched with, less the producers' share; setmaxnreg waits for ever for one more than
        there are (2 x 240 did, on an H200). ptxas gives a launched thread the most that the block's size allows."""
        groups = self.config.warpgroups + 1
        launched = min(65536 // (128 * groups) // 8 * 8, 248) * groups
        return min((launched - self.producer_registers) // self.config.warpgroups // 8 * 8, 240)

    @property
    def x_bytes(self) -> int:
        return self.config.m_tile * self.config.k_step * 2

    @property
    def piece(self) -> int:  # weight bytes of one 16-row tile in a stage
        return self.config.k_step // self.kind.block_k * BLOCK_BYTES

    def table_bytes(self) -> tuple[int, int, int]:
        """Bytes of scales, zeros and offsets of one 16-row tile in a stage."""
        return self.records(self.step_groups)

    @property
    def copied_bytes(self) -> int:
        return self.x_bytes + self.row_tiles * (self.piece + sum(self.table_bytes()))

    @property
    def stage_bytes(self) -> int:
        return -(-self.copied_bytes // 1024) * 1024

    @property
    def out_bytes(self) -> int:
        c = self.config
        if c.parts > 1:
            return 0
        if c.split > 1:  # float32 [m_tile][rows + 4]
            return c.m_tile * (c.rows + 4) * 4
        return c.m_tile * c.rows * 2  # 16-bit [warpgroup][m_tile][64]

    @property
    def exchange_bytes(self) -> int:  # float32 sums of all but the first of the warpgroups along K
        return (self.config.warpgroups - self.config.row_groups) * 64 * self.config.m_tile * 4

    @property
    def one_round(self) -> bool:
        """Every block has at most one tile: the output may lie where its stages were."""
        return self.tiles <= self.clusters

    @property
    def stages(self) -> int:
        fits = (SMEM_BYTES - 1024 - 1024 - (0 if self.one_round else self.out_bytes)) // self.stage_bytes
        return min(fits, self.config.stages or 12)

    @property
    def data_bytes(self) -> int:  # stages and output
        stages = self.stages * self.stage_bytes
        return max(stages, self.out_bytes + self.exchange_bytes) if self.one_round else stages + self.out_bytes

    def check(self) -> None:
        """Raises NotImplementedError when the kernel cannot take this problem in this configuration."""
        c = self.config
        problem = None
        if c.k_groups > 1 and (c.warpgroups % c.k_groups or c.parts > 1 or not self.one_round or self.group_step % 64):
            problem = f"{c.k_groups} groups along K of {c.warpgroups} warpgroups, {self.tiles} tiles"
        elif self.n % c.rows:
            problem = f"N = {self.n} is not a multiple of {c.rows}"
        elif c.split > 1 and not self.one_round:
            problem = f"{self.tiles} tiles for {self.clusters} clusters"
        elif c.parts > 1 and (c.split > 1 or self.n * c.m_tile * 4 >= 1 << 23):
            problem = "parts do not go with clusters, or the rows of y are too long for a store's offset"
        elif self.k % (c.split * c.parts * c.k_step * self.unroll) or c.k_step % 64:
            problem = f"K = {self.k} is not a multiple of {c.split} x {c.k_step}"
        elif not self.scales_in_epilogue and (
            self.k % self.group or (c.k_step % self.group and self.group % c.k_step) or self.group % 16
        ):
            problem = f"groups of {self.group} do not fit stages of {c.k_step} columns"
        elif not self.scales_in_epilogue and self.group_step % self.group and self.group % self.group_step:
            problem = f"groups of {self.group} do not fit the {self.group_step} columns of a warpgroup"
        elif self.stages < 2 or self.data_bytes > SMEM_BYTES - 2048:
            problem = "the stages do not fit shared memory"
        elif c.m_tile % 16 or c.m_tile > 256 or self.m < 1:
            problem = f"m_tile {c.m_tile}"
        if problem:
            raise NotImplementedError(f"wgmma kernel: {problem}")
