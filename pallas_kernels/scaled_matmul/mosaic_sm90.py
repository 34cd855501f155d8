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

from pallas_kernels.quantize.exact import cluster_fence
from pallas_kernels.scaled_matmul.choice import choose_config, multiprocessors, refuse, scale_kind, whole_rows
from pallas_kernels.scaled_matmul.config import EXCHANGE_PADDING, SCALE_CHUNK, Config

_L = plgpu.Layout.WGMMA
_ROW, _COL = _L.reduce(1), _L.reduce(0)


def _tile_columns(columns: int, dtype: Any) -> int:
    """Columns that one swizzled tile of shared memory holds: what a copy moves together."""
    return plgpu.find_swizzle(columns * jnp.dtype(dtype).itemsize * 8) // jnp.dtype(dtype).itemsize


def _transforms(columns: int, dtype: Any) -> tuple[Any, Any]:
    per_tile = _tile_columns(columns, dtype)
    tiling: Any = plgpu.TilingTransform  # typed as abstract in jax 0.11
    swizzle: Any = plgpu.SwizzleTransform
    return tiling((8, per_tile)), swizzle(per_tile * jnp.dtype(dtype).itemsize)


def _rows(scale, shape):
    return lax.broadcast_in_dim(scale, shape, [0])


def _columns(scale, shape):
    return lax.broadcast_in_dim(scale, shape, [1])


def _kernel(*refs, config: Config, m: int, n: int, k: int, block: bool, x_kind: str, w_kind: str, has_bias: bool):
    if has_bias:
        x_gmem, w_gmem, xs_gmem, ws_gmem, bias_gmem, out_gmem, scratch = refs
    else:
        x_gmem, w_gmem, xs_gmem, ws_gmem, out_gmem, scratch = refs
        bias_gmem = None
    c = config
    load_m = c.load_m(m)
    k_steps = c.k_steps(k)
    m_tiles, n_tiles = -(-m // c.tile_m), -(-n // c.tile_n)
    share_w, share_x = c.cluster > 1 and c.cluster_axis == "m", c.cluster > 1 and c.cluster_axis == "n"
    m_clusters = -(-m_tiles // c.cluster) if share_w else m_tiles
    n_clusters = -(-n_tiles // c.cluster) if share_x else n_tiles
    tiles = m_clusters * n_clusters
    wg = lax.axis_index("wg")
    first = lax.axis_index("grid")
    grid = lax.axis_size("grid")
    local_tiles = lax.div(jnp.int32(tiles) - first + (grid - 1), jnp.int32(grid))
    full, empty, scales_full, scales_empty = (scratch[b] for b in ("full", "empty", "scales_full", "scales_empty"))
    operand_smem = scratch["operands"]
    first_step = lax.axis_index("cluster") * k_steps if c.split_k > 1 else 0
    scale_slots = c.scale_slots(k)
    epilogue_copies = "xs" in scratch or "ws" in scratch or has_bias

    def tile_origin(i):
        lin = first + i * grid
        if m_clusters == 1:
            mi, ni = jnp.int32(0), lin
        elif n_clusters == 1:
            mi, ni = lin, jnp.int32(0)
        else:
            mi, ni = plgpu.planar_snake(lin, (m_clusters, n_clusters), 0 if c.minor == "m" else 1, c.stripe)
        if share_w or share_x:
            rank = lax.axis_index("cluster")
            mi, ni = (mi * c.cluster + rank, ni) if share_w else (mi, ni * c.cluster + rank)
        return mi * c.tile_m, ni * c.tile_n

    def x_tile(slot, start, rows):
        return operand_smem.at[pl.ds(pl.multiple_of(slot * load_m + start, 8), rows)]

    def w_tile(slot, start, rows):
        return operand_smem.at[pl.ds(pl.multiple_of(c.stages * load_m + slot * c.tile_n + start, 8), rows)]

    def chunk_of(ki):
        """(number, place in it) of the chunk of x scales that K step ki of a tile uses."""
        per_chunk = jnp.int32(c.steps_per_chunk)
        return lax.div(ki, per_chunk), lax.rem(ki, per_chunk)

    def advance(slot, by):
        slot = slot + by
        return lax.select(slot >= c.stages, slot - c.stages, slot)

    def team_of(i):
        return lax.rem(i, jnp.int32(c.teams)) if c.teams > 1 else jnp.int32(0)

    def full_of(i, slot):
        """Each team has barriers of its own: a warpgroup has to wait for every phase of a barrier."""
        return full.at[team_of(i) * c.stages + slot if c.teams > 1 else slot]

    prefetched = min(c.stages, k_steps) if c.early_launch else 0  # K steps whose weights are fetched ahead of all else

    def producer():
        def load_w(n0, ki, slot, barrier):
            plgpu.copy_gmem_to_smem(
                w_gmem.at[pl.ds(n0, c.tile_n), pl.ds((first_step + ki) * c.tile_k, c.tile_k)],
                w_tile(slot, 0, c.tile_n),
                barrier,
                collective_axes="cluster" if share_w else None,
            )

        if c.early_launch:
            plgpu.griddepcontrol_launch_dependents()

            @pl.when(local_tiles > 0)
            def _():
                lax.fori_loop(0, prefetched, lambda ki, _: load_w(tile_origin(0)[1], ki, ki, full_of(0, ki)), None)

            plgpu.griddepcontrol_wait()

        def tile(i, slot):
            m0, n0 = tile_origin(i)

            def copy_vectors():
                team = team_of(i)
                ready = scales_full.at[team]

                @pl.when(i >= c.teams)
                def _():
                    plgpu.barrier_wait(scales_empty.at[team])

                for name, source, start in (("xs", xs_gmem, m0), ("ws", ws_gmem, n0), ("bias", bias_gmem, n0)):
                    if name in scratch:
                        vector = scratch[name].at[team]
                        plgpu.copy_gmem_to_smem(source.at[pl.ds(start, vector.shape[0])], vector, ready)

            if epilogue_copies and not c.late_scales:
                copy_vectors()

            def step(ki, slot):
                g = i * k_steps + ki

                @pl.when(g >= c.stages)
                def _():
                    plgpu.barrier_wait(empty.at[slot])

                barrier = full_of(i, slot)
                if prefetched:
                    pl.when(g >= prefetched)(lambda: load_w(n0, ki, slot, barrier))
                else:
                    load_w(n0, ki, slot, barrier)
                plgpu.copy_gmem_to_smem(
                    x_gmem.at[pl.ds(m0, load_m), pl.ds((first_step + ki) * c.tile_k, c.tile_k)],
                    x_tile(slot, 0, load_m),
                    barrier,
                    collective_axes="cluster" if share_x else None,
                )
                if block and x_kind == "block":
                    in_tile, place = chunk_of(ki)
                    first_chunk = first_step * (c.tile_k // 128)
                    chunk = i * c.chunks(k) + in_tile
                    opens_chunk = place == 0

                    @pl.when(opens_chunk)
                    def _():
                        plgpu.copy_gmem_to_smem(
                            xs_gmem.at[pl.ds(m0, c.tile_m), pl.ds(first_chunk + in_tile * SCALE_CHUNK, SCALE_CHUNK)],
                            scratch["xs_block"].at[lax.rem(chunk, jnp.int32(scale_slots))],
                            barrier,
                        )

                    @pl.when(jnp.logical_not(opens_chunk))
                    def _():
                        plgpu.barrier_arrive(barrier)

                return advance(slot, 1)

            slot = lax.fori_loop(0, k_steps, step, slot)
            if epilogue_copies and c.late_scales:
                copy_vectors()
            return slot

        lax.fori_loop(0, local_tiles, tile, jnp.int32(0))
        # A block must not exit while its peers may still signal its barriers: wait for the last releases. (Without a
        # cluster this costs nothing, and the interpreter wants every phase observed.)
        total = local_tiles * k_steps

        def drain(g, slot):
            plgpu.barrier_wait(empty.at[slot])
            return advance(slot, 1)

        start = lax.max(total - c.stages, jnp.int32(0))
        lax.fori_loop(start, total, drain, lax.rem(start, jnp.int32(c.stages)))
        if epilogue_copies:
            for team in range(c.teams):

                @pl.when(local_tiles > team)
                def _(team=team):
                    plgpu.barrier_wait(scales_empty.at[team])

    def consumer():
        owner = lax.rem(wg, jnp.int32(c.wgs_m * c.wgs_n))  # place in the output tile
        group = lax.div(wg, jnp.int32(c.wgs_m * c.wgs_n))
        wg_k, team = (jnp.int32(0), group) if c.teams > 1 else (group, jnp.int32(0))  # never both
        wg_m, wg_n = lax.div(owner, jnp.int32(c.wgs_n)), lax.rem(owner, jnp.int32(c.wgs_n))
        wg_rows = 64 * c.m_groups
        shape = (wg_rows, c.wg_n)
        acc_dtype = jnp.int32 if x_gmem.dtype == jnp.int8 else jnp.float32
        out_smem = scratch["out"].at[wg if c.teams > 1 else owner]

        def operands(slot, k0: int, length: int):
            k_slice = pl.ds(k0, length)
            rows = x_tile(slot, wg_m * wg_rows, wg_rows).at[:, k_slice]
            columns = w_tile(slot, wg_n * c.wg_n, c.wg_n).at[:, k_slice]
            return rows, columns.transpose((1, 0))

        def full_at(slot):
            return full.at[team * c.stages + slot if c.teams > 1 else slot]

        def release(slot):
            if share_w or share_x:
                # A few threads of a warpgroup arrive for all of it on a cluster's barrier (on a block's own every
                # thread does): the other warps must be done with the slot too.
                plgpu.commit_smem()
            plgpu.barrier_arrive(empty.at[slot])

        def partial_sums(slot, parts: int, length: int):
            """`parts` sums over `length` of K each, all issued before the first is awaited."""

            def multiply(*accs):
                for j, acc in enumerate(accs):
                    plgpu.wgmma(acc, *operands(slot, j * length, length))
                return [plgpu.wgmma_accumulator_load(acc, wait_n=parts - 1 - j) for j, acc in enumerate(accs)]

            return pl.run_scoped(multiply, *[plgpu.ACC(shape, acc_dtype)] * parts)

        def steps(body, init, slot):
            """Folds `body(ki, slot, carry)` over the K steps of this warpgroup's group -> (carry, next tile's slot)."""
            if c.wgs_k == 1:
                return lax.fori_loop(0, k_steps, lambda ki, s: (body(ki, s[1], s[0]), advance(s[1], 1)), (init, slot))

            def mine(j, state):
                carry, slot = state
                return body(j * c.wgs_k + wg_k, slot, carry), advance(slot, c.wgs_k)

            count = lax.div(jnp.int32(k_steps - 1) - wg_k, jnp.int32(c.wgs_k)) + 1
            carry, _ = lax.fori_loop(0, count, mine, (init, advance(slot, wg_k)))
            return carry, advance(slot, k_steps % c.stages)

        def plain_loop(slot):
            def scope(acc):
                def step(ki, slot, previous):
                    plgpu.barrier_wait(full_at(slot))
                    plgpu.wgmma(acc, *operands(slot, 0, c.tile_k))
                    plgpu.wgmma_wait(1)

                    @pl.when(previous >= 0)
                    def _():
                        release(previous)

                    return slot

                last, slot_after = steps(step, jnp.int32(-1), slot)
                total = acc[...]
                release(last)
                return total, slot_after

            return pl.run_scoped(scope, plgpu.ACC(shape, acc_dtype))

        def promoted_loop(slot):
            def step(ki, slot, total):
                plgpu.barrier_wait(full_at(slot))
                [part] = partial_sums(slot, 1, c.tile_k)
                release(slot)
                return total + part

            return steps(step, plgpu.layout_cast(jnp.zeros(shape, acc_dtype), _L), slot)

        def block_loop(slot, i, m0, n0):
            """The scaled sum, as parts side by side whose columns have one scale each (one part where wg_n allows)."""
            blocks = c.tile_k // 128
            last_row, last_column = -(-n // 128) - 1, -(-k // 128) - 1
            column0 = n0 + wg_n * c.wg_n
            w_row = lax.min(lax.div(column0, jnp.int32(128)), jnp.int32(last_row))
            straddles = w_kind == "block" and 128 % c.wg_n != 0  # columns of two scale blocks
            width = c.scale_columns() if straddles else c.wg_n
            starts = range(0, c.wg_n, width)
            next_row = lax.min(w_row + 1, jnp.int32(last_row))
            in_next = [lax.rem(column0, jnp.int32(128)) + start >= 128 for start in starts]

            def w_factors(column):
                """One scale a part, of block column `column` of the weight; None where the epilogue applies it."""
                if w_kind != "block":
                    return [None]
                here = ws_gmem[w_row, column]
                if not straddles:
                    return [here]
                beyond = ws_gmem[next_row, column]
                return [jnp.where(after, beyond, here) for after in in_next]

            def promote(totals, part, factors, chunk, block_column):
                part = part.astype(jnp.float32)
                parts = [part[:, start : start + width] for start in starts] if straddles else [part]
                if x_kind == "block":
                    x_scale = plgpu.load(
                        scratch["xs_block"].at[
                            chunk, pl.ds(wg_m * wg_rows, wg_rows), lax.rem(block_column, jnp.int32(SCALE_CHUNK))
                        ],
                        layout=_ROW,
                        optimized=False,
                    )
                    scales = [_rows(x_scale if f is None else x_scale * f, (wg_rows, width)) for f in factors]
                else:
                    scales = factors
                return tuple(t + p * s for t, p, s in zip(totals, parts, scales))

            def before(ki):
                """What a K step's promotions need from memory, asked for before the operands are awaited."""
                columns = [lax.min(first_block + ki * blocks + j, jnp.int32(last_column)) for j in range(blocks)]
                return [w_factors(column) for column in columns]

            def chunk_at(ki):
                return lax.rem(i * c.chunks(k) + chunk_of(ki)[0], jnp.int32(scale_slots))

            first_block = first_step * blocks
            nothing = tuple(plgpu.layout_cast(jnp.zeros((wg_rows, width), jnp.float32), _L) for _ in starts)

            def step(ki, slot, totals):
                factors = before(ki)
                plgpu.barrier_wait(full_at(slot))
                for j, part in enumerate(partial_sums(slot, blocks, 128)):
                    totals = promote(totals, part, factors[j], chunk_at(ki), ki * blocks + j)
                release(slot)
                return totals

            if c.overlap == 1:
                return steps(step, nothing, slot)

            def run(first, state):
                """`overlap` K steps: while one accumulator is promoted, the tensor cores fill the next."""
                totals, slot = state

                def issue(acc, slot):
                    plgpu.barrier_wait(full_at(slot))
                    plgpu.wgmma(acc, *operands(slot, 0, 128))

                def fold(acc, ki, slot, totals, pending):
                    factors = before(ki)[0]
                    part = plgpu.wgmma_accumulator_load(acc, wait_n=pending)
                    release(slot)
                    return promote(totals, part, factors, chunk_at(ki), ki)

                def rest(acc, j, slot, totals):
                    """With `acc` (step j of the run) in flight: the sums after all of the run's steps."""
                    ki = first * c.overlap + j
                    if j == c.overlap - 1:
                        return fold(acc, ki, slot, totals, 0)
                    following = advance(slot, 1)

                    def next_step(next_acc):
                        issue(next_acc, following)
                        return rest(
                            next_acc, j + 1, following, lax.optimization_barrier(fold(acc, ki, slot, totals, 1))
                        )

                    return pl.run_scoped(next_step, plgpu.ACC(shape, acc_dtype))

                def start(acc):
                    issue(acc, slot)
                    return rest(acc, 0, slot, totals)

                return pl.run_scoped(start, plgpu.ACC(shape, acc_dtype)), advance(slot, c.overlap % c.stages)

            return lax.fori_loop(0, k_steps // c.overlap, run, (nothing, slot))

        def in_columns(totals):
            """(first column, part) of the parts of a sum that lie side by side."""
            return list(zip(range(0, c.wg_n, c.wg_n // len(totals)), totals))

        def epilogue(totals, m0, n0):
            """Scales the parts (side by side, all of one width), rounds them and copies them out."""
            if epilogue_copies:
                plgpu.barrier_wait(scales_full.at[team])
            finished = []
            for start, total in in_columns(totals):
                total = total.astype(jnp.float32)
                if "xs" in scratch:
                    rows = scratch["xs"].at[team, pl.ds(wg_m * wg_rows, wg_rows)]
                    total = total * _rows(plgpu.load(rows, layout=_ROW, optimized=False), total.shape)
                elif x_kind == "tensor":
                    total = total * xs_gmem[0]
                column_slice = pl.ds(wg_n * c.wg_n + start, total.shape[1])
                if "ws" in scratch:
                    w_scale = plgpu.load(scratch["ws"].at[team, column_slice], layout=_COL, optimized=False)
                    total = total * _columns(w_scale, total.shape)
                elif w_kind == "tensor":
                    total = total * ws_gmem[0]
                if has_bias:
                    bias = plgpu.load(scratch["bias"].at[team, column_slice], layout=_COL, optimized=False)
                    total = total + _columns(bias.astype(jnp.float32), total.shape)
                finished.append(total)
            if epilogue_copies:
                plgpu.barrier_arrive(scales_empty.at[team])
            width = c.epilogue_n
            finished = [part.astype(out_gmem.dtype) for part in finished]
            pieces = [part[:, e : e + width] for part in finished for e in range(0, part.shape[1], width)]
            slots = out_smem.shape[0]
            store_rows = min(wg_rows, load_m)
            for e, piece in enumerate(pieces):
                plgpu.wait_smem_to_gmem(slots - 1, wait_read_only=True)
                out_smem[e % slots] = piece
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(
                    out_smem.at[e % slots, pl.ds(0, store_rows)],
                    out_gmem.at[pl.ds(m0 + wg_m * wg_rows, store_rows), pl.ds(n0 + wg_n * c.wg_n + e * width, width)],
                )

        def joined(totals, i, m0, n0):
            """Split K: a block keeps the rows of the warpgroup with its rank and sends the others to their blocks."""
            rank = lax.axis_index("cluster")
            sent, taken = scratch["sent"], scratch["taken"]

            @pl.when(wg_m != rank)
            def _():
                @pl.when(i > 0)
                def _():
                    plgpu.barrier_wait(taken)

                for start, total in in_columns(totals):
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
                for start, total in in_columns(totals):
                    other = plgpu.load(
                        scratch["exchange"].at[wg_n, :, pl.ds(start, total.shape[1])], layout=_L, optimized=False
                    )
                    whole.append(total.astype(jnp.float32) + other)
                plgpu.commit_smem()
                plgpu.barrier_arrive(taken)
                epilogue(whole, m0, n0)

        def tile(turn, slot):
            i = turn * c.teams + team if c.teams > 1 else turn
            m0, n0 = tile_origin(i)
            if block:
                total, slot = block_loop(slot, i, m0, n0)
            elif c.promote and acc_dtype == jnp.float32:
                total, slot = promoted_loop(slot)
            else:
                total, slot = plain_loop(slot)
            totals = total if isinstance(total, tuple) else (total,)
            if c.split_k > 1:
                joined(totals, i, m0, n0)
                return slot
            if c.wgs_k == 1:
                epilogue(totals, m0, n0)
                return advance(slot, k_steps * (c.teams - 1) % c.stages) if c.teams > 1 else slot
            exchange, written, read = scratch["exchange"], scratch["written"], scratch["read"]

            @pl.when(wg_k > 0)
            def _():
                @pl.when(i > 0)
                def _():
                    plgpu.barrier_wait(read)

                for start, part in in_columns(totals):
                    exchange[wg_k - 1, owner, :, pl.ds(start, part.shape[1])] = part
                plgpu.barrier_arrive(written)

            @pl.when(wg_k == 0)
            def _():
                plgpu.barrier_wait(written)
                whole = list(totals)
                for at, (start, part) in enumerate(in_columns(totals)):
                    columns = pl.ds(start, part.shape[1])
                    others = [plgpu.load(exchange.at[g, owner, :, columns], layout=_L) for g in range(c.wgs_k - 1)]
                    whole[at] = functools.reduce(jnp.add, others, part)
                plgpu.barrier_arrive(read)
                epilogue(whole, m0, n0)

            return slot

        if c.teams > 1:
            turns = lax.div(local_tiles - team + (c.teams - 1), jnp.int32(c.teams))
            lax.fori_loop(0, turns, tile, lax.rem(team * k_steps, jnp.int32(c.stages)))
        else:
            lax.fori_loop(0, local_tiles, tile, jnp.int32(0))
        if c.split_k > 1:
            # The owners' last arrivals must find this block alive.
            sender = jnp.logical_and(wg_m != lax.axis_index("cluster"), local_tiles > 0)
            pl.when(sender)(lambda: plgpu.barrier_wait(scratch["taken"]))

        if c.wgs_k > 1:

            @pl.when(jnp.logical_and(wg_k > 0, local_tiles > 0))
            def _():
                plgpu.barrier_wait(scratch["read"])

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    # setmaxnreg: the producer gives registers to the consumers. With one consumer there are 255 for everybody.
    @pl.when(wg == c.consumers)
    def _():
        if c.consumers > 1:
            plgpu.set_max_registers(40, action="decrease")
        producer()

    @pl.when(wg < c.consumers)
    def _():
        if c.consumers > 1:
            plgpu.set_max_registers(c.registers, action="increase")
        consumer()


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
) -> jax.Array:
    """See `api.scaled_matmul`; raises NotImplementedError for what this kernel does not take.

    `config` None chooses. `after` is an array that is waited for and not read: benchmarks chain calls by it.
    """
    (m, k), n = xq.shape, wq.shape[0]
    out_dtype = jnp.dtype(out_dtype)
    refuse(m, n, k, xq.dtype)
    whole_m = whole_rows(m)
    if whole_m != m:  # engines pad to buckets, so that this copy is rare
        xq = jnp.pad(xq, ((0, whole_m - m), (0, 0)))
        if x_scale.shape[0] != 1:
            x_scale = jnp.pad(x_scale, ((0, whole_m - m), (0, 0)))
        return scaled_matmul(xq, wq, x_scale, w_scale, bias, out_dtype=out_dtype, config=config, after=after)[:m]
    x_kind, w_kind = scale_kind(x_scale), scale_kind(w_scale)
    if w_kind == "vector" and w_scale.shape[0] != n:  # K <= 128: blocks of rows only
        w_scale = jnp.repeat(w_scale, 128, axis=0)[:n]
    block = "block" in (x_kind, w_kind)
    if x_kind == "block" and x_scale.shape[1] % SCALE_CHUNK:
        x_scale = jnp.pad(x_scale, ((0, 0), (0, -x_scale.shape[1] % SCALE_CHUNK)))
    sms = multiprocessors()
    c = choose_config(m, n, k, xq.dtype, block, out_dtype.itemsize, config)
    accumulator = jnp.int32 if xq.dtype == jnp.int8 and not block else jnp.float32
    # The output's columns are whole store tiles too: a few more than N where N is odd, cut off behind the kernel.
    tile_columns = _tile_columns(c.epilogue_n, out_dtype)
    out_n = -(-n // tile_columns) * tile_columns
    epilogue_n = c.epilogue_n
    padded_n = -(-c.tile_n // 32) * 32  # copies move multiples of 128 bytes
    scratch: dict[str, Any] = {
        "operands": plgpu.SMEM((c.operand_rows(m), c.tile_k), xq.dtype, transforms=_transforms(128, xq.dtype)),
        "out": plgpu.SMEM(
            (c.wgs_m * c.wgs_n * c.teams, min(c.out_slots, c.wg_n // epilogue_n), 64 * c.m_groups, epilogue_n),
            out_dtype,
            transforms=_transforms(epilogue_n, out_dtype),
        ),
    }
    copies = 0
    if x_kind == "vector":
        x_scale = x_scale.reshape(-1)
        scratch["xs"] = plgpu.SMEM((c.teams, c.tile_m), jnp.float32)
        copies += 1
    elif x_kind == "block":
        scratch["xs_block"] = plgpu.SMEM((c.scale_slots(k), c.tile_m, SCALE_CHUNK), jnp.float32)
    else:
        x_scale = x_scale.reshape(-1)
    if w_kind == "vector":
        w_scale = w_scale.reshape(-1)
        scratch["ws"] = plgpu.SMEM((c.teams, padded_n), jnp.float32)
        copies += 1
    elif w_kind == "tensor":
        w_scale = w_scale.reshape(-1)
    if bias is not None:
        bias = bias.astype(jnp.float32)
        scratch["bias"] = plgpu.SMEM((c.teams, padded_n), jnp.float32)
        copies += 1
    arrivals = 2 + (x_kind == "block")
    owners = c.wgs_m * c.wgs_n
    released: dict[str, Any] = {"num_arrivals": owners, "num_barriers": c.stages}
    scratch |= {
        "full": plgpu.Barrier(num_arrivals=arrivals, num_barriers=c.stages * c.teams),
        "empty": plgpu.ClusterBarrier(collective_axes=("cluster",), **released)
        if c.cluster > c.split_k
        else plgpu.Barrier(**released),
        "scales_full": plgpu.Barrier(num_arrivals=max(1, copies), num_barriers=c.teams),
        "scales_empty": plgpu.Barrier(num_arrivals=owners // c.split_k, num_barriers=c.teams),
    }
    if c.split_k > 1:
        scratch |= {
            "exchange": plgpu.SMEM((c.wgs_n, 64 * c.m_groups, c.wg_n + EXCHANGE_PADDING), jnp.float32),
            "sent": plgpu.ClusterBarrier(collective_axes=("cluster",), num_arrivals=c.wgs_n),
            "taken": plgpu.ClusterBarrier(collective_axes=("cluster",), num_arrivals=c.wgs_n),
        }
    if c.wgs_k > 1:
        scratch |= {
            "exchange": plgpu.SMEM(
                (c.wgs_k - 1, owners, 64 * c.m_groups, c.wg_n), accumulator, transforms=_transforms(c.wg_n, accumulator)
            ),
            "written": plgpu.Barrier(num_arrivals=owners * (c.wgs_k - 1)),
            "read": plgpu.Barrier(num_arrivals=owners),
        }
    body = functools.partial(
        _kernel, config=c, m=m, n=n, k=k, block=block, x_kind=x_kind, w_kind=w_kind, has_bias=bias is not None
    )
    m_tiles, n_tiles = -(-m // c.tile_m), -(-n // c.tile_n)
    if c.cluster > c.split_k:
        m_tiles, n_tiles = (
            (-(-m_tiles // c.cluster), n_tiles) if c.cluster_axis == "m" else (m_tiles, -(-n_tiles // c.cluster))
        )
    operands = [xq, wq, x_scale, w_scale, *([] if bias is None else [bias])]
    given = len(operands)
    kernel = plgpu.kernel(
        lambda *refs: pl.run_scoped(
            lambda scratch: body(*refs[:given], refs[-1], scratch), scratch, collective_axes="wg"
        ),
        out_type=jax.ShapeDtypeStruct((m, out_n), out_dtype),
        grid=(min(m_tiles * n_tiles, sms // c.cluster),),
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
    return kernel(*operands, *([] if after is None else [after]))[:, :n]
