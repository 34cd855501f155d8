"""scaled_matmul for Hopper: TMA-fed, warp-specialized, persistent wgmma kernel with scales in the epilogue.

Accuracy of fp8. The tensor core adds 32 products and the accumulator after aligning them to the largest and cutting
13 bits below it, so that long sums lose bits. A partial sum of `tile_k` is therefore added ("promoted") to a float32
one in registers: every 128 of K with block scales, every 128 to 512 up to M = 64. Above M = 64 with row or tensor
scales it is not, which is what cuBLASLt's fast accumulation and CUTLASS do and what full speed needs. Error relative
to the exact result (Frobenius) for normal data at K = 14336, before the rounding to bf16 (0.0017): never promoted
0.0028, every 1024 0.0005, every 512 0.0003, every 256 0.0002, 128 0.0001. Measured on an H200 at the first three, and
reproduced by emulating the sum (tests/pallas_kernels/test_scaled_matmul.py). int8 sums are exact.

`Config.early_launch` (off) is for chains of small kernels on a plain stream. There it took a Llama-8B MLP (norm,
gate_up, SiLU, down) at M = 1, 16, 64 from 59, 61, 62 us to 51, 52, 55; a command buffer took 54, 56, 58 either way.
Hopper's programmatic dependent launch starts this kernel when the one before has begun its last blocks. The weights of
the first stages, which no kernel writes, are fetched at once; x, and by it every store, waits for that kernel's end.
Within a command buffer XLA captures each kernel by itself and the launch is an ordinary one.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.scaled_matmul.block_scales import BlockSum
from pallas_kernels.scaled_matmul.choice import choose_config, multiprocessors, refuse, scale_kind, whole_rows
from pallas_kernels.scaled_matmul.config import SCALE_CHUNK, Config
from pallas_kernels.scaled_matmul.load import load
from pallas_kernels.scaled_matmul.multiply import WGMMA, Consumer, plain_sum, promoted_sum
from pallas_kernels.scaled_matmul.problem import Problem
from pallas_kernels.scaled_matmul.store import join_blocks, join_warpgroups, leave, put, rounded, store
from pallas_kernels.scaled_matmul.walk import Walk


def _kernel(p: Problem, refs: dict[str, Any], scratch: dict[str, Any]) -> None:
    walk, c = Walk(p, refs, scratch), p.config

    # setmaxnreg: the producer gives registers to the consumers. With one consumer there are 255 for everybody.
    @pl.when(walk.wg == c.consumers)
    def _():
        if c.consumers > 1:
            plgpu.set_max_registers(40, action="decrease")
        load(walk)

    @pl.when(walk.wg < c.consumers)
    def _():
        if c.consumers > 1:
            plgpu.set_max_registers(c.registers, action="increase")
        _consume(walk)


def _consume(walk: Walk) -> None:
    p, c, consumer = walk.p, walk.p.config, Consumer(walk)
    if c.turns:
        pl.when(consumer.owner == 1)(lambda: plgpu.barrier_arrive(walk.scratch["turn"].at[0]))
    if c.deferred:
        _consume_deferred(consumer)
        return leave(consumer)

    def tile(turn, slot):
        i = turn * c.teams + consumer.team if c.teams > 1 else turn
        m0, n0 = walk.origin(i)
        if p.block:
            totals, slot = BlockSum(consumer, i, n0).over(slot)
        else:
            promote = c.promote and p.accumulator == jnp.float32
            total, slot = promoted_sum(consumer, slot) if promote else plain_sum(consumer, slot)
            totals = (total,)
        if c.split_k > 1:
            join_blocks(consumer, totals, i, m0, n0)
        elif c.wgs_k > 1:
            join_warpgroups(consumer, totals, i, m0, n0)
        else:
            store(consumer, totals, m0, n0)
        # The other teams' tiles lie between this one and the next.
        return walk.advance(slot, p.k_steps * (c.teams - 1) % c.stages) if c.teams > 1 else slot

    if c.teams > 1:
        turns = lax.div(walk.tiles - consumer.team + (c.teams - 1), jnp.int32(c.teams))
        lax.fori_loop(0, turns, tile, lax.rem(consumer.team * p.k_steps, jnp.int32(c.stages)))
    else:
        lax.fori_loop(0, walk.tiles, tile, jnp.int32(0))
    leave(consumer)


def _consume_deferred(consumer: Consumer) -> None:
    """Carries a tile's rounded pieces into the next tile's first K steps, which store one each while they multiply."""
    walk, p, c = consumer.walk, consumer.walk.p, consumer.walk.p.config

    def stores(state: tuple[Any, ...], there: Any) -> list[Any]:
        m0, n0, *pieces = state
        return [functools.partial(put, consumer, e, piece, m0, n0, there) for e, piece in enumerate(pieces)]

    def tile(i, state):
        slot, *before = state
        m0, n0 = walk.origin(i)
        meanwhile = stores(before, i > 0)
        if p.block:
            totals, slot = BlockSum(consumer, i, n0).over(slot, meanwhile)
        else:
            total, slot = plain_sum(consumer, slot, meanwhile)
            totals = (total,)
        return slot, m0, n0, *rounded(consumer, totals)

    nothing = plgpu.layout_cast(jnp.zeros((p.wg_rows, c.epilogue_n), p.out_dtype), WGMMA)
    start = (jnp.int32(0), jnp.int32(0), jnp.int32(0), *[(nothing,)] * c.pieces)
    _, *last = lax.fori_loop(0, walk.tiles, tile, start)
    for work in stores(last, walk.tiles > 0):
        work()


def scaled_matmul(
    xq: jax.Array,
    wq: jax.Array,
    x_scale: jax.Array,
    w_scale: jax.Array,
    bias: jax.Array | None = None,
    *,
    out_dtype: jax.typing.DTypeLike = jnp.bfloat16,
    config: Config | None = None,
    after: jax.Array | None = None,
    interpretable: bool = False,
) -> jax.Array:
    """See `api.scaled_matmul`; raises NotImplementedError for what this kernel does not take.

    `config` None chooses. `after` is an array that is waited for and not read: benchmarks chain calls by it.
    `interpretable` multiplies with Pallas' own operation everywhere, for interpret mode.
    """
    (m, k), n = xq.shape, wq.shape[0]
    out_dtype = jnp.dtype(out_dtype)
    refuse(m, n, k, xq.dtype)
    whole_m = whole_rows(m)
    if whole_m != m:  # engines pad to buckets, so that this copy is rare
        xq = jnp.pad(xq, ((0, whole_m - m), (0, 0)))
        if x_scale.shape[0] != 1:
            x_scale = jnp.pad(x_scale, ((0, whole_m - m), (0, 0)))
        more: dict[str, Any] = dict(out_dtype=out_dtype, config=config, after=after, interpretable=interpretable)
        return scaled_matmul(xq, wq, x_scale, w_scale, bias, **more)[:m]
    x_kind, w_kind = scale_kind(x_scale), scale_kind(w_scale)
    if w_kind == "vector" and w_scale.shape[0] != n:  # K <= 128: blocks of rows only
        w_scale = jnp.repeat(w_scale, 128, axis=0)[:n]
    if x_kind == "block":
        x_scale = jnp.pad(x_scale, ((0, 0), (0, -x_scale.shape[1] % SCALE_CHUNK)))
    c = choose_config(m, n, k, xq.dtype, "block" in (x_kind, w_kind), out_dtype.itemsize, config)
    p = Problem(m, n, k, xq.dtype, out_dtype, x_kind, w_kind, bias is not None, interpretable, c)
    operands = {
        "x": xq,
        "w": wq,
        "xs": x_scale if x_kind == "block" else x_scale.reshape(-1),
        "ws": w_scale if w_kind == "block" else w_scale.reshape(-1),
    }
    if bias is not None:
        operands["bias"] = bias.astype(jnp.float32)

    def body(*refs):
        named = dict(zip([*operands, "out"], [*refs[: len(operands)], refs[-1]]))
        pl.run_scoped(lambda scratch: _kernel(p, named, scratch), p.scratch(), collective_axes="wg")

    down, across = p.clusters
    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((m, p.out_n), out_dtype),
        grid=(min(down * across, multiprocessors() // c.cluster),),
        grid_names=("grid",),
        cluster=(c.cluster,),
        cluster_names=("cluster",),
        num_threads=c.consumers + 1,
        thread_name="wg",
        kernel_name="scaled_matmul_sm90",
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
        ),
    )
    return kernel(*operands.values(), *([] if after is None else [after]))[:, :n]
