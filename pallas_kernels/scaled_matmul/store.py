"""The consumers' epilogue: sums of several warpgroups or blocks are joined, scaled, rounded and copied out."""

from __future__ import annotations

import functools
from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.quantize.exact import cluster_fence
from pallas_kernels.scaled_matmul.block_scales import Sums
from pallas_kernels.scaled_matmul.multiply import WGMMA, Consumer

Piece = tuple[Any, ...]  # rounded columns of a tile, in parts from top to bottom


def store(consumer: Consumer, totals: Sums, m0: Any, n0: Any) -> None:
    """Scales the parts of a tile, rounds them and copies them out."""
    pieces = rounded(consumer, totals)
    if consumer.walk.p.config.one_commit:
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        for e, piece in enumerate(pieces):
            _stage(consumer, e, piece)
        plgpu.commit_smem()
        for e in range(len(pieces)):
            _copy_out(consumer, e, m0, n0)
        return
    for e, piece in enumerate(pieces):
        put(consumer, e, piece, m0, n0)


def rounded(consumer: Consumer, totals: Sums) -> list[Piece]:
    """A tile's scaled sums in the output's dtype, in pieces of `epilogue_n` columns."""
    p, scratch, team = consumer.walk.p, consumer.walk.scratch, consumer.team
    if p.vectors:
        plgpu.barrier_wait(scratch["scales_full"].at[team])
    finished = [
        _scaled(consumer, row, column, total.astype(jnp.float32)) for row, column, total in _places(consumer, totals)
    ]
    if p.vectors:
        plgpu.barrier_arrive(scratch["scales_empty"].at[team])
    width = p.config.epilogue_n
    finished = [part.astype(p.out_dtype) for part in finished]
    across = len(totals) * totals[0].shape[0] // p.wg_rows  # parts side by side
    rows = [
        [part[:, e : e + width] for part in finished[at : at + across] for e in range(0, part.shape[1], width)]
        for at in range(0, len(finished), across)
    ]
    return list(zip(*rows))


def put(consumer: Consumer, e: int, piece: Piece, m0: Any, n0: Any, there: Any = None) -> None:
    """Stages piece e of a tile and starts its copy out; `there`: whether there is such a tile (None: there is)."""
    plgpu.wait_smem_to_gmem(_staging(consumer).shape[0] - 1, wait_read_only=True)
    _stage(consumer, e, piece)
    plgpu.commit_smem()
    if there is None:
        _copy_out(consumer, e, m0, n0)
    else:
        pl.when(there)(lambda: _copy_out(consumer, e, m0, n0))


def _stage(consumer: Consumer, e: int, piece: Piece) -> None:
    staging = _staging(consumer)
    slot = staging.at[e % staging.shape[0]]
    if len(piece) == 1:
        slot[...] = piece[0]
        return
    for i, part in enumerate(piece):
        slot[pl.ds(i * part.shape[0], part.shape[0])] = part


def _staging(consumer: Consumer) -> Any:
    walk = consumer.walk
    return walk.scratch["out"].at[walk.wg if walk.p.config.teams > 1 else consumer.owner]


def _copy_out(consumer: Consumer, e: int, m0: Any, n0: Any) -> None:
    p, staging, width = consumer.walk.p, _staging(consumer), consumer.walk.p.config.epilogue_n
    rows = min(p.wg_rows, p.load_m)
    plgpu.copy_smem_to_gmem(
        staging.at[e % staging.shape[0], pl.ds(0, rows)],
        consumer.walk.refs["out"].at[pl.ds(m0 + consumer.row, rows), pl.ds(n0 + consumer.column + e * width, width)],
    )


def join_warpgroups(consumer: Consumer, totals: Sums, i: Any, m0: Any, n0: Any) -> None:
    """wgs_k > 1: the first group adds the sums of the others to its own, and stores."""
    c, scratch = consumer.walk.p.config, consumer.walk.scratch
    exchange, written, read = scratch["exchange"], scratch["written"], scratch["read"]
    wg_k, owner = consumer.wg_k, consumer.owner

    @pl.when(wg_k > 0)
    def _():
        @pl.when(i > 0)
        def _():
            plgpu.barrier_wait(read)

        for start, part in _in_columns(consumer, totals):
            exchange[wg_k - 1, owner, :, pl.ds(start, part.shape[1])] = part
        plgpu.barrier_arrive(written)

    @pl.when(wg_k == 0)
    def _():
        plgpu.barrier_wait(written)
        whole = list(totals)
        for at, (start, part) in enumerate(_in_columns(consumer, totals)):
            columns = pl.ds(start, part.shape[1])
            others = [plgpu.load(exchange.at[g, owner, :, columns], layout=WGMMA) for g in range(c.wgs_k - 1)]
            whole[at] = functools.reduce(jnp.add, others, part)
        plgpu.barrier_arrive(read)
        store(consumer, tuple(whole), m0, n0)


def join_blocks(consumer: Consumer, totals: Sums, i: Any, m0: Any, n0: Any) -> None:
    """Split K: a block keeps the rows of the warpgroup with its rank and sends the others to their blocks."""
    scratch, wg_m, wg_n = consumer.walk.scratch, consumer.wg_m, consumer.wg_n
    rank = lax.axis_index("cluster")
    sent, taken = scratch["sent"], scratch["taken"]

    @pl.when(wg_m != rank)
    def _():
        @pl.when(i > 0)
        def _():
            plgpu.barrier_wait(taken)

        for start, total in _in_columns(consumer, totals):
            inbox = plgpu.cluster_ref(scratch["exchange"], {"cluster": wg_m})
            inbox[wg_n, :, pl.ds(start, total.shape[1])] = total.astype(jnp.float32)
        plgpu.commit_smem()  # a few threads arrive for all of them
        cluster_fence()
        plgpu.barrier_arrive(sent)

    @pl.when(wg_m == rank)
    def _():
        plgpu.barrier_wait(sent)
        cluster_fence()
        whole = []
        for start, total in _in_columns(consumer, totals):
            other = plgpu.load(
                scratch["exchange"].at[wg_n, :, pl.ds(start, total.shape[1])], layout=WGMMA, optimized=False
            )
            whole.append(total.astype(jnp.float32) + other)
        plgpu.commit_smem()
        plgpu.barrier_arrive(taken)
        store(consumer, tuple(whole), m0, n0)


def leave(consumer: Consumer) -> None:
    """After the last tile: what others still signal here, or read of ours, must find this block alive."""
    walk, c, scratch = consumer.walk, consumer.walk.p.config, consumer.walk.scratch
    if c.turns:
        pl.when(consumer.owner == 0)(lambda: plgpu.barrier_wait(scratch["turn"].at[0]))
    if c.split_k > 1:
        sender = jnp.logical_and(consumer.wg_m != lax.axis_index("cluster"), walk.tiles > 0)
        pl.when(sender)(lambda: plgpu.barrier_wait(scratch["taken"]))
    if c.wgs_k > 1:
        helper = jnp.logical_and(consumer.wg_k > 0, walk.tiles > 0)
        pl.when(helper)(lambda: plgpu.barrier_wait(scratch["read"]))
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _in_columns(consumer: Consumer, totals: Sums) -> list[tuple[int, Any]]:
    """(first column, part) of the parts of a sum that lie side by side."""
    return [(column, total) for _, column, total in _places(consumer, totals)]


def _places(consumer: Consumer, totals: Sums) -> list[tuple[int, int, Any]]:
    """(first row, first column, part) of the parts of a warpgroup's sum."""
    height, width = totals[0].shape
    across = consumer.walk.p.config.wg_n // width
    return [(i // across * height, i % across * width, total) for i, total in enumerate(totals)]


def _scaled(consumer: Consumer, row: int, column: int, total: Any) -> Any:
    """The part of a sum from there on, times its scales, plus its bias."""
    p, refs, scratch, team = consumer.walk.p, consumer.walk.refs, consumer.walk.scratch, consumer.team
    if "xs" in p.vectors:
        rows = scratch["xs"].at[team, pl.ds(consumer.row + row, total.shape[0])]
        x_scale = plgpu.load(rows, layout=WGMMA.reduce(1), optimized=False)
        total = total * lax.broadcast_in_dim(x_scale, total.shape, [0])
    elif p.x_kind == "tensor":
        total = total * refs["xs"][0]
    columns = pl.ds(consumer.column + column, total.shape[1])
    if "ws" in p.vectors:
        w_scale = plgpu.load(scratch["ws"].at[team, columns], layout=WGMMA.reduce(0), optimized=False)
        total = total * lax.broadcast_in_dim(w_scale, total.shape, [1])
    elif p.w_kind == "tensor":
        total = total * refs["ws"][0]
    if p.has_bias:
        bias = plgpu.load(scratch["bias"].at[team, columns], layout=WGMMA.reduce(0), optimized=False)
        total = total + lax.broadcast_in_dim(bias.astype(jnp.float32), total.shape, [1])
    return total
