"""What the producer and the consumers of a thread block share: the output tiles that it walks, its ring of stages."""

from __future__ import annotations

from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.scaled_matmul.problem import Problem


class Walk:
    """A thread block's way through the problem. Tiles are numbered from 0 in the order in which it takes them.

    refs      global memory by name: x, w, xs, ws, out, and bias where there is one
    scratch   `Problem.scratch`'s shared memory and barriers
    """

    def __init__(self, p: Problem, refs: dict[str, Any], scratch: dict[str, Any]) -> None:
        self.p, self.refs, self.scratch = p, refs, scratch
        self.wg = lax.axis_index("wg")
        self.first = lax.axis_index("grid")
        self.grid = lax.axis_size("grid")
        down, across = p.clusters
        self.tiles = lax.div(jnp.int32(down * across) - self.first + (self.grid - 1), jnp.int32(self.grid))
        self.first_step = lax.axis_index("cluster") * p.k_steps if p.config.split_k > 1 else 0  # of K

    def origin(self, i: Any) -> tuple[Any, Any]:
        """(row, column) where tile i begins."""
        p, c = self.p, self.p.config
        down, across = p.clusters
        linear = self.first + i * self.grid
        if down == 1:
            mi, ni = jnp.int32(0), linear
        elif across == 1:
            mi, ni = linear, jnp.int32(0)
        else:
            mi, ni = plgpu.planar_snake(linear, (down, across), 0 if c.minor == "m" else 1, c.stripe)
        if p.shares_w or p.shares_x:
            rank = lax.axis_index("cluster")
            mi, ni = (mi * c.cluster + rank, ni) if p.shares_w else (mi, ni * c.cluster + rank)
        return mi * c.tile_m, ni * c.tile_n

    def x_start(self, slot: Any) -> Any:
        """Where the x tile of a stage begins among the operands' rows."""
        return slot * self.p.load_m

    def w_start(self, slot: Any) -> Any:
        return self.p.config.stages * self.p.load_m + slot * self.p.config.tile_n

    def x_rows(self, slot: Any, start: Any, rows: int) -> Any:
        """Rows of the x tile in a stage."""
        return self.scratch["operands"].at[pl.ds(pl.multiple_of(self.x_start(slot) + start, 8), rows)]

    def w_rows(self, slot: Any, start: Any, rows: int) -> Any:
        return self.scratch["operands"].at[pl.ds(pl.multiple_of(self.w_start(slot) + start, 8), rows)]

    def advance(self, slot: Any, by: int) -> Any:
        """The slot that is `by` further in the ring."""
        stages = self.p.config.stages
        slot = slot + by
        return lax.select(slot >= stages, slot - stages, slot)

    def before(self, slot: Any) -> Any:
        """The slot before it in the ring."""
        return lax.select(slot == 0, jnp.int32(self.p.config.stages - 1), slot - 1)

    def full(self, team: Any, slot: Any) -> Any:
        """The barrier of a full stage. Each team has its own: a warpgroup has to wait for every phase of a barrier."""
        c = self.p.config
        return self.scratch["full"].at[team * c.stages + slot if c.teams > 1 else slot]

    def team_of(self, i: Any) -> Any:
        """The team that computes tile i."""
        teams = self.p.config.teams
        return lax.rem(i, jnp.int32(teams)) if teams > 1 else jnp.int32(0)

    def chunk_of(self, ki: Any) -> tuple[Any, Any]:
        """(number, place in it) of the chunk of x scales that K step ki of a tile uses."""
        per_chunk = jnp.int32(self.p.config.steps_per_chunk)
        return lax.div(ki, per_chunk), lax.rem(ki, per_chunk)

    def chunk_slot(self, i: Any, chunk: Any) -> Any:
        """Where chunk number `chunk` of tile i's x scales lies in shared memory."""
        c, k = self.p.config, self.p.k
        return lax.rem(i * c.chunks(k) + chunk, jnp.int32(c.scale_slots(k)))
