"""Quantization for Hopper: one thread block a row, the row stays in registers, one read and one write of memory.

A row of K elements is split over `wgs` warpgroups; each thread holds runs of 8 (16 bytes of bf16), 16 lanes a run of
128, so that a 1x128 block's maximum is four shuffles and a row's takes one exchange through shared memory. Several
blocks share a multiprocessor (8 KB of loads in flight each), which is what hides the latency of HBM.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.quantize.reference import FP8_MAX

# [4 warps, R, 2, 128]: 16 lanes x 8 elements along the last axis, two such runs a warp, R of them one after the other.
_LAYOUT = plgpu.Layout.TILED(plgpu.Tiling(((4, 1, 2, 128), (8,))), warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1)
_UNIT = 1024  # elements of one row that a warpgroup holds at R = 1


def warpgroups(m: int, k: int) -> int:
    """Warpgroups that share a row: many (short latency) for few rows, else at most 32 elements a thread."""
    options = [w for w in range(1, 9) if k % (_UNIT * w) == 0]
    if not options or k > 8 * 8 * _UNIT:
        raise NotImplementedError(f"rows must be a multiple of {_UNIT} elements and at most {64 * _UNIT}, got {k}")
    if m <= 256:
        return options[-1]
    return next((w for w in options if k // (_UNIT * w) <= 4), options[-1])


def _kernel(op: str, wgs: int, width: int, block: bool, eps: float, divisor: float, qdtype, static: bool, *args):
    refs: list[Any] = list(args)
    x_gmem = refs.pop(0)
    weight_gmem: Any = refs.pop(0) if "norm" in op else None
    residual_gmem: Any = refs.pop(0) if op == "residual_norm" else None
    static_gmem: Any = refs.pop(0) if static else None
    q_gmem = refs.pop(0)
    scale_gmem: Any = None if static else refs.pop(0)
    sum_gmem: Any = refs.pop(0) if op == "residual_norm" else None
    partial, ready = refs
    row, wg = lax.axis_index("row"), lax.axis_index("wg")

    def load(ref):
        return plgpu.load(ref, layout=_LAYOUT, optimized=False)

    def over_row(values, combine):
        """Combines one [4] array (a number a warp) per entry of `values` over all warps of the row."""
        for i, value in enumerate(values):
            partial[i, wg] = value
        plgpu.barrier_arrive(ready)
        plgpu.barrier_wait(ready)
        return [
            functools.reduce(fn, [partial[i, w, j] for w in range(wgs) for j in range(4)])
            for i, fn in enumerate(combine)
        ]

    if op == "silu":
        gate = load(x_gmem.at[row, 0, wg]).astype(jnp.float32)
        up = load(x_gmem.at[row, 1, wg]).astype(jnp.float32)
        y = gate / (1.0 + jnp.exp(-gate)) * up
    else:
        y = load(x_gmem.at[row, wg])
        if op == "residual_norm":
            y = (y.astype(jnp.float32) + load(residual_gmem.at[row, wg]).astype(jnp.float32)).astype(y.dtype)
            sum_gmem[row, wg] = y
        y = y.astype(jnp.float32)
    factor: Any = 1.0
    total = None
    if weight_gmem is not None:
        total = (y * y).sum(axis=3).sum(axis=2).sum(axis=1)
        y = y * load(weight_gmem.at[wg]).astype(jnp.float32)

    if static:
        y = y * (1.0 / static_gmem[0, 0])
    elif block:
        if total is not None:
            [total] = over_row([total], [jnp.add])
            factor = lax.rsqrt(total * (1.0 / width) + eps)
        absmax = jnp.abs(y).max(axis=3) * factor
        scale = absmax * (1.0 / divisor)
        scale = jnp.where(scale == 0.0, 1.0, scale)
        scale_gmem[row, wg] = scale
        y = y * plgpu.layout_cast(lax.broadcast_in_dim(factor / scale, y.shape, [0, 1, 2]), _LAYOUT)
    else:
        absmax = jnp.abs(y).max(axis=3).max(axis=2).max(axis=1)
        if total is not None:
            total, absmax = over_row([total, absmax], [jnp.add, jnp.maximum])
            factor = lax.rsqrt(total * (1.0 / width) + eps)
        else:
            [absmax] = over_row([absmax], [jnp.maximum])
        scale = absmax * factor * (1.0 / divisor)
        scale = jnp.where(scale == 0.0, 1.0, scale)

        @pl.when(wg == 0)
        def _():
            scale_gmem[row, 0] = scale

        y = y * (factor / scale)
    if jnp.dtype(qdtype) == jnp.int8:
        if static or divisor > 127:  # otherwise |y| <= 127 (1 + 2^-22), which rounds to 127
            y = jnp.clip(y, -128.0, 127.0)
        # Adding 1.5 * 2^23 rounds half to even and leaves the integer in the low mantissa bits.
        q_gmem[row, wg] = lax.bitcast_convert_type(y + 12582912.0, jnp.int32).astype(jnp.int8)
    else:
        q_gmem[row, wg] = (jnp.clip(y, -FP8_MAX, FP8_MAX) if static else y).astype(qdtype)


def _run(op, x, weight, residual, static_scale, *, eps=0.0, qdtype, block, divisor):
    m, k = x.shape
    if op == "silu":
        k //= 2
    if block not in (None, 128):
        raise NotImplementedError(f"takes block None or 128, got {block}")
    if m == 0:
        raise NotImplementedError("M = 0")
    wgs = warpgroups(m, k)
    parts = (wgs, 4, k // (wgs * _UNIT), 2, 128)
    operands = [x.reshape((m, 2, *parts) if op == "silu" else (m, *parts))]
    if weight is not None:
        operands.append(weight.reshape(parts))
    if residual is not None:
        operands.append(residual.reshape(m, *parts))
    outputs = [jax.ShapeDtypeStruct((m, *parts), qdtype)]
    if static_scale is not None:
        operands.append(static_scale)
    else:
        outputs.append(jax.ShapeDtypeStruct((m, *parts[:-1]) if block else (m, 1), jnp.float32))
    if residual is not None:
        outputs.append(jax.ShapeDtypeStruct((m, *parts), x.dtype))
    results = plgpu.kernel(
        functools.partial(_kernel, op, wgs, k, block is not None, eps, divisor, qdtype, static_scale is not None),
        out_type=outputs,
        scratch_types=[plgpu.SMEM((2, wgs, 4), jnp.float32), plgpu.Barrier(num_arrivals=wgs)],
        grid=(m,),
        grid_names=("row",),
        num_threads=wgs,
        thread_name="wg",
        kernel_name=f"quantize_{op}_sm90",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
        ),
    )(*operands)
    xq = results[0].reshape(m, k)
    scale = static_scale if static_scale is not None else results[1].reshape(m, -1)
    return xq, scale, (results[-1].reshape(m, k) if residual is not None else x)


def quantize_rows(x, qdtype, *, block=None, divisor: float, static_scale=None):
    """See `api.quantize_rows`; raises NotImplementedError for rows that do not fit."""
    return _run("rows", x, None, None, static_scale, qdtype=qdtype, block=block, divisor=divisor)[:2]


def rms_norm_quantize(x, weight, residual=None, *, eps: float, qdtype, block=None, divisor: float):
    """See `api.rms_norm_quantize`; raises NotImplementedError for rows that do not fit."""
    op = "norm" if residual is None else "residual_norm"
    return _run(op, x, weight, residual, None, eps=eps, qdtype=qdtype, block=block, divisor=divisor)


def silu_mul_quantize(gate_up, *, qdtype, block=None, divisor: float):
    """See `api.silu_mul_quantize`; raises NotImplementedError for rows that do not fit."""
    return _run("silu", gate_up, None, None, None, qdtype=qdtype, block=block, divisor=divisor)[:2]
