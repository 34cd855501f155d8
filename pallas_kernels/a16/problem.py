"""What both kernels must know about a product, and no jax: its shapes, types and where the scales apply."""

from __future__ import annotations

import dataclasses

from pallas_kernels.a16.stored import Kind

SMEM_BYTES = 227 * 1024  # of one block on Hopper
DTYPES = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}


@dataclasses.dataclass(frozen=True)
class Problem:
    """x [m, k] in `x_dtype` times W [n, k] stored as `kind`, scales in `scale_dtype`."""

    m: int
    n: int
    k: int
    kind: Kind
    x_dtype: str  # "bf16" or "f16"
    scale_dtype: str  # "bf16", "f16" or "f32"
    group: int  # columns that share a scale; k: one group
    scales_in_epilogue: bool  # one scale per row (or one for all), applied to the finished sum
    one_scale: bool
    has_zero: bool
    has_offset: bool
    sms: int

    @property
    def groups(self) -> int:
        return -(-self.k // self.group)

    def most_clusters(self, split: int) -> int:
        """Clusters of `split` blocks that surely run at once, one block an SM.

        A cluster lives within one GPC, and which SMs of a GPC work differs from chip to chip. On an H100 with 132 SMs
        66 clusters of 2 fit and 24 of 4, but not 32 of 4: the last ones had to wait, and the kernel took twice as long.
        """
        return {1: self.sms, 2: self.sms // 2, 4: self.sms * 28 // 132, 8: self.sms * 12 // 132}[split] or 1

    @property
    def scale_record(self) -> int:  # bytes of one group's 16 scales
        return 16 * (4 if self.scale_dtype == "f32" else 2)

    def records(self, groups: int) -> tuple[int, int, int]:
        """Bytes of `groups` groups' scales, zeros and offsets of one 16-row tile."""
        scale = 0 if self.scales_in_epilogue else self.scale_record * groups
        return scale, 16 * groups if self.has_zero else 0, scale if self.has_offset else 0
