"""What is static of a call of the Hopper kernel: shapes, the kinds of its scales, and what its shared memory holds."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.scaled_matmul.config import EXCHANGE_PADDING, SCALE_CHUNK, Config


def tile_columns(columns: int, dtype: Any) -> int:
    """Columns that one swizzled tile of shared memory holds: what a copy moves together."""
    return plgpu.find_swizzle(columns * jnp.dtype(dtype).itemsize * 8) // jnp.dtype(dtype).itemsize


def transforms(columns: int, dtype: Any) -> tuple[Any, Any]:
    per_tile = tile_columns(columns, dtype)
    tiling: Any = plgpu.TilingTransform  # typed as abstract in jax 0.11
    swizzle: Any = plgpu.SwizzleTransform
    return tiling((8, per_tile)), swizzle(per_tile * jnp.dtype(dtype).itemsize)


@dataclasses.dataclass(frozen=True)
class Problem:
    """x [m, k] by w [n, k], both `dtype`, with scales of the kinds "tensor", "vector" or "block"."""

    m: int
    n: int
    k: int
    dtype: Any  # of x and w, as a numpy dtype
    out_dtype: Any
    x_kind: str
    w_kind: str
    has_bias: bool
    interpretable: bool  # for interpret mode, which knows Pallas' own products only
    config: Config

    @property
    def block(self) -> bool:
        return "block" in (self.x_kind, self.w_kind)

    @property
    def accumulator(self) -> Any:
        """What the tensor cores sum in."""
        return jnp.int32 if self.dtype == jnp.int8 else jnp.float32

    @property
    def load_m(self) -> int:
        return self.config.load_m(self.m)

    @property
    def k_steps(self) -> int:
        return self.config.k_steps(self.k)

    @property
    def owners(self) -> int:
        """Warpgroups that each hold a part of one output tile."""
        return self.config.wgs_m * self.config.wgs_n

    @property
    def wg_rows(self) -> int:
        return 64 * self.config.m_groups

    @property
    def shares_w(self) -> bool:
        return self.config.cluster > 1 and self.config.cluster_axis == "m"

    @property
    def shares_x(self) -> bool:
        return self.config.cluster > 1 and self.config.cluster_axis == "n"

    @property
    def one_arrival(self) -> bool:
        """Whether one thread (one for each block of a cluster) gives a stage back for all of a warpgroup."""
        return self.config.one_arrival or self.shares_w or self.shares_x

    @property
    def clusters(self) -> tuple[int, int]:
        """Output tiles down and across, those that a cluster computes together counted once."""
        c = self.config
        m_tiles, n_tiles = -(-self.m // c.tile_m), -(-self.n // c.tile_n)
        return (
            -(-m_tiles // c.cluster) if self.shares_w else m_tiles,
            -(-n_tiles // c.cluster) if self.shares_x else n_tiles,
        )

    @property
    def prefetched(self) -> int:
        """K steps whose weights are fetched before the kernel before this one has ended."""
        return min(self.config.stages, self.k_steps) if self.config.early_launch else 0

    @property
    def vectors(self) -> tuple[str, ...]:
        """What the epilogue has copied to shared memory for each output tile."""
        kinds = {"xs": self.x_kind == "vector", "ws": self.w_kind == "vector", "bias": self.has_bias}
        return tuple(name for name, there in kinds.items() if there)

    @property
    def out_n(self) -> int:
        """The output's columns are whole store tiles: a few more than N where N is odd, cut off behind the kernel."""
        columns = tile_columns(self.config.epilogue_n, self.out_dtype)
        return -(-self.n // columns) * columns

    def scratch(self) -> dict[str, Any]:
        """Shared memory and barriers by name."""
        return self._operands() | self._vectors() | self._barriers() | self._exchange()

    def _operands(self) -> dict[str, Any]:
        c, width = self.config, self.config.epilogue_n
        staging = (self.owners * c.teams, min(c.out_slots, c.wg_n // width), self.wg_rows, width)
        return {
            "operands": plgpu.SMEM(
                (c.operand_rows(self.m), c.tile_k), self.dtype, transforms=transforms(128, self.dtype)
            ),
            "out": plgpu.SMEM(staging, self.out_dtype, transforms=transforms(width, self.out_dtype)),
        }

    def _vectors(self) -> dict[str, Any]:
        c = self.config
        columns = -(-c.tile_n // 32) * 32  # copies move multiples of 128 bytes
        lengths = {"xs": c.tile_m, "ws": columns, "bias": columns}
        found: dict[str, Any] = {n: plgpu.SMEM((c.teams, lengths[n]), jnp.float32) for n in self.vectors}
        if self.x_kind == "block":
            found["xs_block"] = plgpu.SMEM((c.scale_slots(self.k), c.tile_m, SCALE_CHUNK), jnp.float32)
        return found

    def _barriers(self) -> dict[str, Any]:
        c = self.config
        arrivals = 2 + (self.x_kind == "block")
        released: dict[str, Any] = {"num_arrivals": self.owners, "num_barriers": c.stages}
        return {
            "full": plgpu.Barrier(num_arrivals=arrivals, num_barriers=c.stages * c.teams),
            "empty": plgpu.ClusterBarrier(collective_axes=("cluster",), **released)
            if self.one_arrival
            else plgpu.Barrier(**released),
            "scales_full": plgpu.Barrier(num_arrivals=max(1, len(self.vectors)), num_barriers=c.teams),
            "scales_empty": plgpu.Barrier(num_arrivals=self.owners // c.split_k, num_barriers=c.teams),
            **({"turn": plgpu.Barrier(num_barriers=2)} if c.turns else {}),
        }

    def _exchange(self) -> dict[str, Any]:
        """For sums that several warpgroups hold parts of: of one block (wgs_k) or of two (split K)."""
        c = self.config
        if c.split_k > 1:
            return {
                "exchange": plgpu.SMEM((c.wgs_n, self.wg_rows, c.wg_n + EXCHANGE_PADDING), jnp.float32),
                "sent": plgpu.ClusterBarrier(collective_axes=("cluster",), num_arrivals=c.wgs_n),
                "taken": plgpu.ClusterBarrier(collective_axes=("cluster",), num_arrivals=c.wgs_n),
            }
        if c.wgs_k > 1:
            dtype = jnp.float32 if self.block else self.accumulator
            shape = (c.wgs_k - 1, self.owners, self.wg_rows, c.wg_n)
            return {
                "exchange": plgpu.SMEM(shape, dtype, transforms=transforms(c.wg_n, dtype)),
                "written": plgpu.Barrier(num_arrivals=self.owners * (c.wgs_k - 1)),
                "read": plgpu.Barrier(num_arrivals=self.owners),
            }
        return {}
