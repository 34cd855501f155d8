"""Quantization for Hopper: one thread block a row, the row stays in registers, one read and one write of memory.

A row of K elements is split over `wgs` warpgroups; each thread holds runs of 8 (16 bytes of bf16), 16 lanes a run of
128, so that a 1x128 block's maximum is four shuffles and a row's takes one exchange through shared memory. Several
blocks share a multiprocessor (8 KB of loads in flight each), which is what hides the latency of HBM. Rows that are a
multiple of 512 only are held in runs of 4. Quotients are rounded once, as in the reference (see `exact`).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import tuning
from pallas_kernels.ahead import BLOCKS, Ahead, ask, spare_blocks
from pallas_kernels.dispatch import current_device
from pallas_kernels.quantize import exact, exchange
from pallas_kernels.quantize.reference import FP8_MAX, divide

_SHARED = "silu and rows"
_MOST_PER_THREAD = 64  # elements of a row in one thread's registers


@dataclasses.dataclass(frozen=True)
class Split:
    """How a row lies in registers: [blocks, wgs, 4 warps, repeats, runs, 128]."""

    wgs: int  # warpgroups of a block
    runs: int  # 128-runs that a warp holds side by side: 2 (8 elements a lane) or 1 (4)
    repeats: int
    blocks: int = 1  # a cluster that shares the row, of SiLU and plain rows; see `exchange`
    persistent: bool = False  # as many blocks as multiprocessors, each with the next row's loads in flight
    lean: bool = False  # fewer instructions: `exact.widen`, `exact.reciprocal`, `exchange.row_maximum`

    def clustered(self, qdtype: Any, block: bool, static: bool) -> bool:
        """Whether the blocks that share a row have something to tell each other: its scale."""
        return self.blocks > 1 and qdtype is not None and not (block or static)

    @property
    def per_thread(self) -> int:
        """Elements."""
        return 4 * self.runs * self.repeats

    @property
    def layout(self) -> Any:
        """Of one warpgroup's [4, repeats, runs, 128]: lanes along runs and the last axis, a vector each."""
        return plgpu.Layout.TILED(
            plgpu.Tiling(((4, 1, self.runs, 128), (4 * self.runs,))),
            warp_dims=(-5,),
            lane_dims=(-3, -2) if self.runs > 1 else (-2,),
            vector_dim=-1,
        )


def splits(k: int) -> list[Split]:
    """All ways to hold a row of k elements, by warpgroups."""
    runs = 2 if k % 1024 == 0 else 1
    unit = 512 * runs
    return [
        Split(w, runs, k // (unit * w))
        for w in range(1, 9)
        if k % (unit * w) == 0 and k // (128 * w) <= _MOST_PER_THREAD
    ]


def split(op: str, m: int, k: int) -> Split:
    """A config for rows of k elements. Times are CUPTI's on an H200 (bench/results/quantize_splits.json).

    SiLU (K = 14,336): up to 256 rows are shared by a cluster, 16 elements a thread (M = 1, 16, 64: 1.5, 1.7, 2.5 us
    against 3.0, 3.0, 3.3 of a block each). More are walked by as many blocks as there are multiprocessors, each with
    its next row on the way (M = 4,096: 70 us against 92; a ring in shared memory took 72).
    Others (K = 4,096): many warpgroups a row (short latency) for few rows, else as few as leave at most 32 elements a
    thread.
    """
    options = [dataclasses.replace(s, lean=True) for s in splits(k)]
    if not options:
        raise NotImplementedError(
            f"rows must be a multiple of 512 that 8 warpgroups share, {_MOST_PER_THREAD} elements a thread: got {k}"
        )
    widest = options[-1]
    if op == "silu" and m > 256 and widest.per_thread <= 16:
        return dataclasses.replace(widest, persistent=True)
    if m <= 256:
        return next(iter(_shared(k)), widest) if op == "silu" else widest
    return next((s for s in options if s.per_thread <= 32), widest)


def _shared(k: int) -> list[Split]:
    """Rows over clusters: most blocks first, 16 elements a thread."""
    found = [(blocks, s) for blocks in range(8, 1, -1) if k % blocks == 0 for s in splits(k // blocks)]
    return [dataclasses.replace(s, blocks=blocks, lean=True) for blocks, s in found if s.per_thread == 16]


def _space(op: str, k: int) -> list[Split]:
    """Configs worth timing."""
    found = [dataclasses.replace(s, lean=True) for s in splits(k)]
    if op == "silu":
        found += [dataclasses.replace(s, persistent=True) for s in found if s.per_thread <= 16] + _shared(k)
    return found


def _kernel(
    op: str, s: Split, width: int, block: bool, eps: float, divisor: float, qdtype, static: bool, interpretable: bool,
    early_launch: bool, rows: int, asking: Any, *args,
):  # fmt: skip
    refs: list[Any] = list(args)
    if asking is not None:
        asking(refs.pop(0))
    x_gmem = refs.pop(0)
    weight_gmem: Any = refs.pop(0) if "norm" in op else None
    residual_gmem: Any = refs.pop(0) if op == "residual_norm" else None
    static_gmem: Any = refs.pop(0) if static else None
    q_gmem = refs.pop(0)
    scale_gmem: Any = None if static or qdtype is None else refs.pop(0)
    sum_gmem: Any = refs.pop(0) if op == "residual_norm" else None
    partial_, ready, words_ = refs[-3:]
    lean = s.lean and not interpretable
    wg = lax.axis_index("wg")
    part = lax.axis_index("part") if s.blocks > 1 else 0
    layout = s.layout

    def load(ref):
        return plgpu.load(ref, layout=layout, optimized=False)

    def wide(x):
        return exact.widen(x, layout) if lean else x.astype(jnp.float32)

    if s.clustered(qdtype, block, static):
        exchange.announce(words_.at[0], warps=4 * s.wgs, blocks=s.blocks)

    # All loads are issued before anything waits: one latency of memory, not two.
    weight = None if weight_gmem is None else load(weight_gmem.at[part, wg])
    if early_launch:  # see `scaled_matmul.mosaic_sm90`; nobody writes the weight
        plgpu.griddepcontrol_launch_dependents()
        plgpu.griddepcontrol_wait()

    def over_row(values, combine, partial):
        """Combines one [4] array (a number a warp) per entry of `values` over all warps of the row."""
        for i, value in enumerate(values):
            partial[i, wg] = value
        plgpu.barrier_arrive(ready)
        plgpu.barrier_wait(ready)
        return [
            functools.reduce(fn, [partial[i, w, j] for w in range(s.wgs) for j in range(4)])
            for i, fn in enumerate(combine)
        ]

    def spread(value, axes):
        """A number a row (axes []) or a number a run (axes [0, 1, 2]) to all elements."""
        shape = (4, s.repeats, s.runs, 128)
        return plgpu.layout_cast(lax.broadcast_in_dim(value, shape, axes), layout)

    def loads(row):
        if op == "silu":
            return [load(x_gmem.at[row, half, part, wg]) for half in (0, 1)]
        return [load(ref.at[row, part, wg]) for ref in (x_gmem, residual_gmem) if ref is not None]

    def process(row, loaded, turn):
        partial = partial_.at[turn]
        if op == "silu":
            gate, up = (wide(value) for value in loaded)
            y = gate * (1.0 / (1.0 + jnp.exp(-gate)) if interpretable else exact.sigmoid(gate, layout))
            if qdtype is None:  # rounded where Hugging Face's tensors are
                y = y.astype(x_gmem.dtype).astype(jnp.float32)
            y = y * up
        else:
            y = loaded[0]
            if op == "residual_norm":
                y = (y.astype(jnp.float32) + loaded[1].astype(jnp.float32)).astype(y.dtype)
                sum_gmem[row, part, wg] = y
            y = wide(y)
        total: Any = None
        if weight is not None:
            # A lane's own elements first, then 32 lanes once: a fourth of the shuffles.
            total = (y * y).sum(axis=1).sum(axis=2).sum(axis=1)
            if qdtype is not None:
                y = y * weight.astype(jnp.float32)
        if qdtype is None:
            if weight is not None:
                [total] = over_row([total], [jnp.add], partial)
                y = (y * lax.rsqrt(total * (1.0 / width) + eps)).astype(x_gmem.dtype).astype(jnp.float32)
                y = y * weight.astype(x_gmem.dtype).astype(jnp.float32)
            q_gmem[row, part, wg] = y.astype(x_gmem.dtype)
            return

        # max|y| is taken before the norm's factor: rounding is monotonic, so that factor * max|y| = max|factor * y|.
        # A row's maximum without a sum beside it has an exchange of its own.
        direct = not (static or block) and total is None and (lean or s.blocks > 1)
        magnitude: Any = None
        if block:
            magnitude = jnp.abs(y).max(axis=3)
        elif not (static or direct):
            magnitude = jnp.abs(y).max(axis=1).max(axis=2).max(axis=1)
        elif direct:
            magnitude = exchange.row_maximum(y, words_.at[turn], layout, warps=4 * s.wgs, blocks=s.blocks, rank=part)
        if total is not None and block:
            [total] = over_row([total], [jnp.add], partial)
        elif total is not None:
            total, magnitude = over_row([total, magnitude], [jnp.add, jnp.maximum], partial)
        elif magnitude is not None and not (block or direct):
            [magnitude] = over_row([magnitude], [jnp.maximum], partial)
        if total is not None:
            factor = lax.rsqrt(total * (1.0 / width) + eps)
            y, magnitude = y * factor, magnitude * factor
        axes = [0, 1, 2] if block else []
        if static:
            scale = static_gmem[0, 0]
        else:
            if interpretable:
                scale = divide(magnitude, jnp.broadcast_to(jnp.float32(divisor), magnitude.shape))
            else:
                scale = exact.divide_by(magnitude, divisor, layout.reduce((3,)) if block else exact.SCALAR)
            scale = jnp.where(scale == 0.0, 1.0, scale)
            if block:
                scale_gmem[row, part, wg] = scale
            else:

                @pl.when(jnp.logical_and(wg == 0, part == 0) if s.blocks > 1 else wg == 0)
                def _():
                    scale_gmem[row, 0] = scale

        if interpretable:
            y = divide(y, spread(scale, axes))
        elif lean and op != "rows" and jnp.dtype(qdtype) != jnp.int8 and not static:
            inverse = exact.reciprocal(scale, layout.reduce((3,)) if block else exact.SCALAR)
            y = y * spread(inverse, axes)
        else:
            lift = exact.lift(scale)
            y = exact.divide(y * spread(lift, axes), spread(scale * lift, axes), layout)
        if jnp.dtype(qdtype) == jnp.int8:
            if static or divisor > 127:  # otherwise |y| <= 127 (1 + 2^-22), which rounds to 127
                y = jnp.clip(y, -128.0, 127.0)
            # Adding 1.5 * 2^23 rounds half to even and leaves the integer in the low mantissa bits.
            q_gmem[row, part, wg] = lax.bitcast_convert_type(y + 12582912.0, jnp.int32).astype(jnp.int8)
        else:
            q_gmem[row, part, wg] = (jnp.clip(y, -FP8_MAX, FP8_MAX) if static else y).astype(qdtype)

    first = lax.axis_index("row")
    if asking is not None:

        @pl.when(first < rows)
        def _():
            process(first, loads(first), 0)

        return
    if not s.persistent:
        process(first, loads(first), 0)
        return
    step = lax.axis_size("row")
    count = lax.div(rows - first + (step - 1), step)

    def one(i, loaded):
        row = first + i * step
        following = loads(lax.min(row + step, jnp.int32(rows - 1)))  # the last row once more behind the end
        process(row, loaded, lax.rem(i, jnp.int32(2)))  # in turns: nobody waits for all to have read the last
        return following

    lax.fori_loop(0, count, one, loads(first))


def _run(
    op: str, x, weight, residual, static_scale, *, eps: float = 0.0, qdtype, block, divisor: float,
    config: Split | None = None, interpretable: bool = False, early_launch: bool = False, after=None,
    ahead: Ahead | None = None,
):  # fmt: skip
    """Runs one op -> (xq, scale, x + residual); with qdtype None (y in x's dtype, None, x + residual).

    config         None chooses.
    interpretable  divides with Pallas' own operation, for interpret mode.
    early_launch   starts beside the kernel before; see `scaled_matmul.mosaic_sm90`.
    ahead          see `pallas_kernels.ahead`; left out where rows are many or the interpreter runs.
    after          an array that is waited for and not read: benchmarks chain calls by it.
    """
    m, k = x.shape
    if op == "silu":
        k //= 2
    if block not in (None, 128):
        raise NotImplementedError(f"takes block None or 128, got {block}")
    if 0 in (m, k):
        raise NotImplementedError(f"{'M' if m == 0 else 'K'} = 0: nothing to compute")
    s = config or tuning.choose(
        f"quantize_{op}",
        tuning.key(m=tuning.bucket(m), k=k, dtype=jnp.dtype(qdtype or x.dtype).name, block=block),
        heuristic=lambda: split("rows" if interpretable else op, m, k),  # clusters do not run in interpret mode
        space=lambda: _space(op, k),
    )
    parts = (s.blocks, s.wgs, 4, s.repeats, s.runs, 128)
    operands = [x.reshape((m, 2, *parts) if op == "silu" else (m, *parts))]
    if weight is not None:
        operands.append(weight.reshape(parts))
    if residual is not None:
        operands.append(residual.reshape(m, *parts))
    outputs = [jax.ShapeDtypeStruct((m, *parts), qdtype or x.dtype)]
    if static_scale is not None:
        operands.append(static_scale)
    elif qdtype is not None:
        outputs.append(jax.ShapeDtypeStruct((m, *parts[:-1]) if block else (m, 1), jnp.float32))
    if residual is not None:
        outputs.append(jax.ShapeDtypeStruct((m, *parts), x.dtype))
    static = static_scale is not None
    shared = s.clustered(qdtype, block is not None, static)
    if (s.blocks > 1 and ("norm" in op or s.persistent)) or (shared and interpretable):
        raise NotImplementedError(f"clusters share rows of {_SHARED}, one row each, on a device; not {op} with {s}")
    rows = min(m, current_device().core_count or 132) if s.persistent else m
    asking, spare = None, 0
    request = None if ahead is None or m > BLOCKS or s.persistent or interpretable else ahead.request()
    if ahead is not None and request is not None:
        spare = -(-spare_blocks(m * s.blocks) // s.blocks)
        asking = ask(request, (m + spare) * s.blocks)
        operands.insert(0, ahead.weight)
    kernel = functools.partial(
        _kernel, op, s, k, block is not None, eps, divisor, qdtype, static, interpretable, early_launch, m, asking
    )
    given, turns = len(operands), 2 if s.persistent else 1
    if after is not None:
        operands.append(after)
    rows += spare
    places: dict[str, Any] = dict(grid=(rows,), grid_names=("row",))
    if shared:
        places |= dict(cluster=(s.blocks,), cluster_names=("part",))
    elif s.blocks > 1:
        places = dict(grid=(rows, s.blocks), grid_names=("row", "part"))
    results = plgpu.kernel(
        lambda *refs: kernel(*refs[:given], *refs[len(operands) :]),
        out_type=outputs,
        scratch_types=[
            plgpu.SMEM((turns, 2, s.wgs, 4), jnp.float32),
            plgpu.Barrier(num_arrivals=s.wgs),
            plgpu.SMEM((turns, exchange.words_of(s.blocks, 4 * s.wgs)), jnp.uint32),
        ],
        **places,
        num_threads=s.wgs,
        thread_name="wg",
        kernel_name=f"quantize_{op}_sm90",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
        ),
    )(*operands)
    xq = results[0].reshape(m, k)
    scale = static_scale if static_scale is not None or qdtype is None else results[1].reshape(m, -1)
    return xq, scale, (results[-1].reshape(m, k) if residual is not None else x)


def rms_norm(x, weight, residual=None, *, eps: float, **internal: Any):
    """See `rows.api.rms_norm`; `internal` of `_run`. Raises NotImplementedError for rows that do not fit."""
    op = "norm" if residual is None else "residual_norm"
    y, _, total = _run(op, x, weight, residual, None, eps=eps, qdtype=None, block=None, divisor=1.0, **internal)
    return y, total


def silu_mul(gate_up, **internal: Any):
    """See `rows.api.silu_mul`; `internal` of `_run`. Raises NotImplementedError for rows that do not fit."""
    return _run("silu", gate_up, None, None, None, qdtype=None, block=None, divisor=1.0, **internal)[0]


def quantize_rows(x, qdtype, *, block=None, divisor: float, static_scale=None, **internal: Any):
    """See `api.quantize_rows`; `internal` of `_run`. Raises NotImplementedError for rows that do not fit."""
    return _run("rows", x, None, None, static_scale, qdtype=qdtype, block=block, divisor=divisor, **internal)[:2]


def rms_norm_quantize(x, weight, residual=None, *, eps: float, qdtype, block=None, divisor: float, **internal: Any):
    """See `api.rms_norm_quantize`; `internal` of `_run`. Raises NotImplementedError for rows that do not fit."""
    op = "norm" if residual is None else "residual_norm"
    return _run(op, x, weight, residual, None, eps=eps, qdtype=qdtype, block=block, divisor=divisor, **internal)


def silu_mul_quantize(gate_up, *, qdtype, block=None, divisor: float, **internal: Any):
    """See `api.silu_mul_quantize`; `internal` of `_run`. Raises NotImplementedError for rows that do not fit."""
    return _run("silu", gate_up, None, None, None, qdtype=qdtype, block=block, divisor=divisor, **internal)[:2]
