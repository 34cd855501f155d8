"""The producer: one warpgroup that feeds the others by TMA."""

from __future__ import annotations

from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.scaled_matmul.config import SCALE_CHUNK
from pallas_kernels.scaled_matmul.walk import Walk


def load(walk: Walk) -> None:
    """Copies the operands and scales of every tile of this block, as its stages become free."""
    p, c, scratch = walk.p, walk.p.config, walk.scratch
    if c.early_launch:
        plgpu.griddepcontrol_launch_dependents()

        @pl.when(walk.tiles > 0)
        def _():
            copy = lambda ki, _: _copy_w(walk, walk.origin(0)[1], ki, ki, walk.full(walk.team_of(0), ki))  # noqa: E731
            lax.fori_loop(0, p.prefetched, copy, None)

        plgpu.griddepcontrol_wait()

    def tile(i, slot):
        m0, n0 = walk.origin(i)
        if p.vectors and not c.late_scales:
            _copy_vectors(walk, i, m0, n0)

        def step(ki, slot):
            g = i * p.k_steps + ki

            @pl.when(g >= c.stages)
            def _():
                plgpu.barrier_wait(scratch["empty"].at[slot])

            barrier = walk.full(walk.team_of(i), slot)
            if p.prefetched:
                pl.when(g >= p.prefetched)(lambda: _copy_w(walk, n0, ki, slot, barrier))
            else:
                _copy_w(walk, n0, ki, slot, barrier)
            plgpu.copy_gmem_to_smem(
                walk.refs["x"].at[pl.ds(m0, p.load_m), pl.ds((walk.first_step + ki) * c.tile_k, c.tile_k)],
                walk.x_rows(slot, 0, p.load_m),
                barrier,
                collective_axes="cluster" if p.shares_x else None,
            )
            if p.x_kind == "block":
                _copy_block_scales(walk, i, ki, m0, barrier)
            return walk.advance(slot, 1)

        slot = lax.fori_loop(0, p.k_steps, step, slot)
        if p.vectors and c.late_scales:
            _copy_vectors(walk, i, m0, n0)
        return slot

    lax.fori_loop(0, walk.tiles, tile, jnp.int32(0))
    _drain(walk)


def _copy_w(walk: Walk, n0: Any, ki: Any, slot: Any, barrier: Any) -> None:
    c = walk.p.config
    plgpu.copy_gmem_to_smem(
        walk.refs["w"].at[pl.ds(n0, c.tile_n), pl.ds((walk.first_step + ki) * c.tile_k, c.tile_k)],
        walk.w_rows(slot, 0, c.tile_n),
        barrier,
        collective_axes="cluster" if walk.p.shares_w else None,
    )


def _copy_vectors(walk: Walk, i: Any, m0: Any, n0: Any) -> None:
    """What the epilogue of tile i needs."""
    team, scratch = walk.team_of(i), walk.scratch
    ready = scratch["scales_full"].at[team]

    @pl.when(i >= walk.p.config.teams)
    def _():
        plgpu.barrier_wait(scratch["scales_empty"].at[team])

    for name in walk.p.vectors:
        vector = scratch[name].at[team]
        start = m0 if name == "xs" else n0
        plgpu.copy_gmem_to_smem(walk.refs[name].at[pl.ds(start, vector.shape[0])], vector, ready)


def _copy_block_scales(walk: Walk, i: Any, ki: Any, m0: Any, barrier: Any) -> None:
    """The chunk of x's block scales that K step ki opens, if it opens one; its barrier counts the copy either way."""
    c = walk.p.config
    in_tile, place = walk.chunk_of(ki)
    first_chunk = walk.first_step * (c.tile_k // 128)
    opens_chunk = place == 0

    @pl.when(opens_chunk)
    def _():
        plgpu.copy_gmem_to_smem(
            walk.refs["xs"].at[pl.ds(m0, c.tile_m), pl.ds(first_chunk + in_tile * SCALE_CHUNK, SCALE_CHUNK)],
            walk.scratch["xs_block"].at[walk.chunk_slot(i, in_tile)],
            barrier,
        )

    @pl.when(jnp.logical_not(opens_chunk))
    def _():
        plgpu.barrier_arrive(barrier)


def _drain(walk: Walk) -> None:
    """A block must not exit while its peers may still signal its barriers: wait for the last releases. (Without a
    cluster this costs nothing, and the interpreter wants every phase observed.)"""
    c, scratch = walk.p.config, walk.scratch
    total = walk.tiles * walk.p.k_steps

    def drain(g, slot):
        plgpu.barrier_wait(scratch["empty"].at[slot])
        return walk.advance(slot, 1)

    start = lax.max(total - c.stages, jnp.int32(0))
    lax.fori_loop(start, total, drain, lax.rem(start, jnp.int32(c.stages)))
    if walk.p.vectors:
        for team in range(c.teams):

            @pl.when(walk.tiles > team)
            def _(team=team):
                plgpu.barrier_wait(scratch["scales_empty"].at[team])
