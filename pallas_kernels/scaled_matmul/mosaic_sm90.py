"""scaled_matmul for Hopper: TMA-fed, warp-specialized, persistent wgmma kernel with scales in the epilogue."""

from __future__ import annotations

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.dispatch import current_device
from pallas_kernels.scaled_matmul.config import SCALE_CHUNK, SMEM_BYTES, Config, heuristic

_L = plgpu.Layout.WGMMA
_ROW, _COL = _L.reduce(1), _L.reduce(0)


def _transforms(columns: int, dtype) -> tuple:
    swizzle = plgpu.find_swizzle(columns * jnp.dtype(dtype).itemsize * 8)
    return (
        plgpu.TilingTransform((8, swizzle // jnp.dtype(dtype).itemsize)),
        plgpu.SwizzleTransform(swizzle),
    )


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
    k_steps = -(-k // c.tile_k)
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
    x_smem, w_smem = scratch["x"], scratch["w"]

    def tile_origin(i):
        lin = first + i * grid
        if m_clusters == 1:
            mi, ni = jnp.int32(0), lin
        elif n_clusters == 1:
            mi, ni = lin, jnp.int32(0)
        else:
            mi, ni = plgpu.planar_snake(lin, (m_clusters, n_clusters), 0 if c.minor == "m" else 1, c.stripe)
        if c.cluster > 1:
            rank = lax.axis_index("cluster")
            mi, ni = (mi * c.cluster + rank, ni) if share_w else (mi, ni * c.cluster + rank)
        return mi * c.tile_m, ni * c.tile_n

    def x_rows(slot, rows):
        return x_smem.at[pl.ds(pl.multiple_of(slot * load_m, 8), rows)]

    def next_slot(slot):
        return lax.select(slot == c.stages - 1, jnp.int32(0), slot + 1)

    def producer():
        def tile(i, slot):
            m0, n0 = tile_origin(i)
            if "xs" in scratch or "ws" in scratch or has_bias:

                @pl.when(i > 0)
                def _():
                    plgpu.barrier_wait(scales_empty)

                if "xs" in scratch:
                    plgpu.copy_gmem_to_smem(xs_gmem.at[pl.ds(m0, c.tile_m)], scratch["xs"], scales_full)
                if "ws" in scratch:
                    plgpu.copy_gmem_to_smem(ws_gmem.at[pl.ds(n0, scratch["ws"].shape[0])], scratch["ws"], scales_full)
                if has_bias:
                    plgpu.copy_gmem_to_smem(
                        bias_gmem.at[pl.ds(n0, scratch["bias"].shape[0])], scratch["bias"], scales_full
                    )

            def step(ki, slot):
                g = i * k_steps + ki

                @pl.when(g >= c.stages)
                def _():
                    plgpu.barrier_wait(empty.at[slot])

                k_slice = pl.ds(ki * c.tile_k, c.tile_k)
                plgpu.copy_gmem_to_smem(
                    w_gmem.at[pl.ds(n0, c.tile_n), k_slice],
                    w_smem.at[slot],
                    full.at[slot],
                    collective_axes="cluster" if share_w else None,
                )
                plgpu.copy_gmem_to_smem(
                    x_gmem.at[pl.ds(m0, load_m), k_slice],
                    x_rows(slot, load_m),
                    full.at[slot],
                    collective_axes="cluster" if share_x else None,
                )
                if block and x_kind == "block":
                    per_chunk = max(1, 128 * SCALE_CHUNK // c.tile_k)
                    chunk = lax.div(g, jnp.int32(per_chunk))
                    opens_chunk = lax.rem(ki, jnp.int32(per_chunk)) == 0

                    @pl.when(opens_chunk)
                    def _():
                        plgpu.copy_gmem_to_smem(
                            xs_gmem.at[pl.ds(m0, c.tile_m), pl.ds(lax.div(ki, jnp.int32(per_chunk)) * SCALE_CHUNK, 4)],
                            scratch["xs_block"].at[lax.rem(chunk, jnp.int32(c.scale_slots()))],
                            full.at[slot],
                        )

                    @pl.when(jnp.logical_not(opens_chunk))
                    def _():
                        plgpu.barrier_arrive(full.at[slot])

                return next_slot(slot)

            return lax.fori_loop(0, k_steps, step, slot)

        lax.fori_loop(0, local_tiles, tile, jnp.int32(0))
        if c.cluster > 1:
            # A block must not exit while its peers may still signal its barriers: wait for the last releases.
            total = local_tiles * k_steps

            def drain(g, slot):
                plgpu.barrier_wait(empty.at[slot])
                return next_slot(slot)

            start = lax.max(total - c.stages, jnp.int32(0))
            lax.fori_loop(start, total, drain, lax.rem(start, jnp.int32(c.stages)))

    def consumer():
        wg_m, wg_n = lax.div(wg, jnp.int32(c.wgs_n)), lax.rem(wg, jnp.int32(c.wgs_n))
        wg_rows = 64 * c.m_groups
        shape = (wg_rows, c.wg_n)
        acc_dtype = jnp.int32 if x_gmem.dtype == jnp.int8 else jnp.float32
        out_smem = scratch["out"].at[wg]

        def operands(slot, k0: int, length: int):
            rows = x_smem.at[
                pl.ds(pl.multiple_of(slot * load_m + wg_m * wg_rows, 8), wg_rows), pl.ds(k0, length)
            ]
            columns = w_smem.at[slot, pl.ds(pl.multiple_of(wg_n * c.wg_n, 8), c.wg_n), pl.ds(k0, length)]
            return rows, columns.transpose((1, 0))

        def partial_sum(slot, k0: int, length: int):
            def multiply(acc):
                plgpu.wgmma(acc, *operands(slot, k0, length))
                return acc[...]

            return pl.run_scoped(multiply, plgpu.ACC(shape, acc_dtype))

        def plain_loop(slot):
            def scope(acc):
                def step(ki, slot):
                    plgpu.barrier_wait(full.at[slot])
                    plgpu.wgmma(acc, *operands(slot, 0, c.tile_k))
                    plgpu.wgmma_wait(1)

                    @pl.when(ki > 0)
                    def _():
                        plgpu.barrier_arrive(empty.at[lax.select(slot == 0, jnp.int32(c.stages - 1), slot - 1)])

                    return next_slot(slot)

                slot_after = lax.fori_loop(0, k_steps, step, slot)
                total = acc[...]
                plgpu.barrier_arrive(
                    empty.at[lax.select(slot_after == 0, jnp.int32(c.stages - 1), slot_after - 1)]
                )
                return total, slot_after

            return pl.run_scoped(scope, plgpu.ACC(shape, acc_dtype))

        def promoted_loop(slot):
            def step(ki, carry):
                total, slot = carry
                plgpu.barrier_wait(full.at[slot])
                total = total + partial_sum(slot, 0, c.tile_k)
                plgpu.barrier_arrive(empty.at[slot])
                return total, next_slot(slot)

            zero = plgpu.layout_cast(jnp.zeros(shape, acc_dtype), _L)
            return lax.fori_loop(0, k_steps, step, (zero, slot))

        def block_loop(slot, i, m0, n0):
            w_row = lax.div(n0 + wg_n * c.wg_n, jnp.int32(128))
            blocks = c.tile_k // 128
            per_chunk = max(1, SCALE_CHUNK // blocks)

            def step(ki, carry):
                total, slot = carry
                w_scales = [
                    ws_gmem[w_row, lax.min(ki * blocks + j, jnp.int32(-(-k // 128) - 1))] for j in range(blocks)
                ]
                plgpu.barrier_wait(full.at[slot])
                chunk = lax.rem(lax.div(i * k_steps + ki, jnp.int32(per_chunk)), jnp.int32(c.scale_slots()))
                for j in range(blocks):
                    part = partial_sum(slot, 128 * j, 128).astype(jnp.float32)
                    if x_kind == "block":
                        column = lax.rem(ki * blocks + j, jnp.int32(SCALE_CHUNK))
                        x_scale = plgpu.load(
                            scratch["xs_block"].at[chunk, pl.ds(wg_m * wg_rows, wg_rows), column],
                            layout=_ROW,
                            optimized=False,
                        )
                        part = part * _rows(x_scale * w_scales[j], shape)
                    else:
                        part = part * w_scales[j]
                    total = total + part
                plgpu.barrier_arrive(empty.at[slot])
                return total, next_slot(slot)

            zero = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), _L)
            return lax.fori_loop(0, k_steps, step, (zero, slot))

        def tile(i, slot):
            m0, n0 = tile_origin(i)
            if block:
                total, slot = block_loop(slot, i, m0, n0)
            elif c.promote and acc_dtype == jnp.float32:
                total, slot = promoted_loop(slot)
            else:
                total, slot = plain_loop(slot)
            total = total.astype(jnp.float32)
            waits = "xs" in scratch or "ws" in scratch or has_bias
            if waits:
                plgpu.barrier_wait(scales_full)
            if "xs" in scratch:
                x_scale = plgpu.load(
                    scratch["xs"].at[pl.ds(wg_m * wg_rows, wg_rows)], layout=_ROW, optimized=False
                )
                total = total * _rows(x_scale, shape)
            elif x_kind == "tensor":
                total = total * xs_gmem[0]
            column_slice = pl.ds(wg_n * c.wg_n, c.wg_n)
            if "ws" in scratch:
                w_scale = plgpu.load(scratch["ws"].at[column_slice], layout=_COL, optimized=False)
                total = total * _columns(w_scale, shape)
            elif w_kind == "tensor":
                total = total * ws_gmem[0]
            if has_bias:
                bias = plgpu.load(scratch["bias"].at[column_slice], layout=_COL, optimized=False)
                total = total + _columns(bias.astype(jnp.float32), shape)
            if waits:
                plgpu.barrier_arrive(scales_empty)
            total = total.astype(out_gmem.dtype)
            width = c.epilogue_n
            slots = out_smem.shape[0]
            store_rows = min(wg_rows, load_m)
            for e in range(c.wg_n // width):
                plgpu.wait_smem_to_gmem(slots - 1, wait_read_only=True)
                out_smem[e % slots] = total[:, e * width : (e + 1) * width]
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(
                    out_smem.at[e % slots, pl.ds(0, store_rows)],
                    out_gmem.at[
                        pl.ds(m0 + wg_m * wg_rows, store_rows), pl.ds(n0 + wg_n * c.wg_n + e * width, width)
                    ],
                )
            return slot

        lax.fori_loop(0, local_tiles, tile, jnp.int32(0))
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
            plgpu.set_max_registers(min(240, (512 - 40) // c.consumers // 8 * 8), action="increase")
        consumer()


def _kind(scale: jax.Array) -> str:
    if scale.shape == (1, 1):
        return "tensor"
    return "vector" if scale.shape[1] == 1 else "block"


def scaled_matmul(
    xq: jax.Array,
    wq: jax.Array,
    x_scale: jax.Array,
    w_scale: jax.Array,
    bias: jax.Array | None = None,
    *,
    out_dtype: jax.typing.DTypeLike = jnp.bfloat16,
    config: Config | None = None,
) -> jax.Array:
    """See `api.scaled_matmul`; raises NotImplementedError for what this kernel does not take."""
    (m, k), n = xq.shape, wq.shape[0]
    out_dtype = jnp.dtype(out_dtype)
    if m == 0 or n % 8 or k % 16:
        raise NotImplementedError(f"needs M > 0, N a multiple of 8 and K of 16 (TMA strides), got M={m} N={n} K={k}")
    x_kind, w_kind = _kind(x_scale), _kind(w_scale)
    if w_kind == "vector" and w_scale.shape[0] != n:
        w_scale, w_kind = jnp.repeat(w_scale, 128, axis=0)[:n], "vector"
    block = "block" in (x_kind, w_kind)
    if block and (w_kind != "block" or n % 128 or k % 512):
        raise NotImplementedError(f"block scales need N % 128 = 0 and K % 512 = 0, got N={n} K={k}, w {w_kind}")
    sms = current_device().core_count or 132
    if config is None:
        config = heuristic(m, n, k, block=block, sms=sms, out_bytes=out_dtype.itemsize)
    c = config
    if block and 128 % c.wg_n:
        raise NotImplementedError(f"block scales need wg_n to divide 128, got {c.wg_n}")
    if c.smem_bytes(m, out_dtype.itemsize, block) > SMEM_BYTES:
        raise NotImplementedError(f"{c} needs {c.smem_bytes(m, out_dtype.itemsize, block)} bytes of shared memory")
    operand = _transforms(128, xq.dtype)
    epilogue_n = c.epilogue_n
    padded_n = -(-c.tile_n // 32) * 32  # copies move multiples of 128 bytes
    scratch = {
        "x": plgpu.SMEM((c.x_rows(m), c.tile_k), xq.dtype, transforms=operand),
        "w": plgpu.SMEM((c.stages, c.tile_n, c.tile_k), wq.dtype, transforms=operand),
        "out": plgpu.SMEM(
            (c.consumers, min(2, c.wg_n // epilogue_n), 64 * c.m_groups, epilogue_n),
            out_dtype,
            transforms=_transforms(epilogue_n, out_dtype),
        ),
    }
    copies = 0
    if x_kind == "vector":
        x_scale = x_scale.reshape(-1)
        scratch["xs"] = plgpu.SMEM((c.tile_m,), jnp.float32)
        copies += 1
    elif x_kind == "block":
        scratch["xs_block"] = plgpu.SMEM((c.scale_slots(), c.tile_m, SCALE_CHUNK), jnp.float32)
    else:
        x_scale = x_scale.reshape(-1)
    if w_kind == "vector":
        w_scale = w_scale.reshape(-1)
        scratch["ws"] = plgpu.SMEM((padded_n,), jnp.float32)
        copies += 1
    elif w_kind == "tensor":
        w_scale = w_scale.reshape(-1)
    if bias is not None:
        bias = bias.astype(jnp.float32)
        scratch["bias"] = plgpu.SMEM((padded_n,), jnp.float32)
        copies += 1
    arrivals = 2 + (x_kind == "block")
    released = {"num_arrivals": c.consumers, "num_barriers": c.stages}
    scratch |= {
        "full": plgpu.Barrier(num_arrivals=arrivals, num_barriers=c.stages),
        "empty": plgpu.ClusterBarrier(collective_axes=("cluster",), **released)
        if c.cluster > 1
        else plgpu.Barrier(**released),
        "scales_full": plgpu.Barrier(num_arrivals=max(1, copies)),
        "scales_empty": plgpu.Barrier(num_arrivals=c.consumers),
    }
    body = functools.partial(
        _kernel, config=c, m=m, n=n, k=k, block=block, x_kind=x_kind, w_kind=w_kind, has_bias=bias is not None
    )
    m_tiles, n_tiles = -(-m // c.tile_m), -(-n // c.tile_n)
    if c.cluster > 1:
        m_tiles, n_tiles = (
            (-(-m_tiles // c.cluster), n_tiles) if c.cluster_axis == "m" else (m_tiles, -(-n_tiles // c.cluster))
        )
    kernel = plgpu.kernel(
        lambda *refs: pl.run_scoped(
            lambda scratch: body(*refs, scratch), scratch, collective_axes="wg"
        ),
        out_type=jax.ShapeDtypeStruct((m, n), out_dtype),
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
    operands = (xq, wq, x_scale, w_scale) + (() if bias is None else (bias,))
    return kernel(*operands)
