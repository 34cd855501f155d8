"""scaled_matmul and quantize_rows on this GPU: correctness first, then microseconds per call.

    python -m bench.kernel_scaled [--out DIR] [--budget SECONDS] [--only WORKER,...] [--sweep] [--variants] [--dry]

A call's time is a jitted chain of calls, each with a weight (an input) of its own so that it comes from HBM and each
waiting for the one before, replayed by XLA from a command buffer: wall clock / calls. Beside it the sum of CUPTI kernel
durations. Up to M = 64 the inputs of the quantization ops are those that the last op left in L2, as in a server.

One process per shape and mode compiles on the CPU at the same time as the others. They take the GPU in turns, first for
the heuristic's choice at every M, then, with `--sweep`, for the alternatives; one whose kernel hangs ends after 12 s,
no other. The worker "mlp" times a decoder's MLP (norm, gate_up, SiLU, down) as a chain; "mlp-stream" does so without
command buffers, where `early_launch` can work. Rows of JSON go to DIR/scaled.jsonl as they come. `--dry` compiles
everything for an H200 where there is no GPU, and runs nothing.

`--variants` times the structures of bench/kernel_variants.py instead of `--sweep`'s, the heuristic's choice once more
behind them, and at M = 4096 also on zeros and on random bits (what the power limit costs); DIR/clocks.csv has the GPU's
clock and power meanwhile (seconds since the start, MHz, W, reasons). It adds the worker "prefill" and, where torch is
installed, "torch" (_scaled_mm, row-wise), and leaves out int8 and the MLP.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import dataclasses
import functools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bench import kernel_variants, variant_workers
from bench.timing import GpuLock, kernel_durations

MODES = ("row", "block", "int8")
SHAPES = ("qkv", "o", "gate_up", "down")
MS = (16, 1, 64, 256, 4096)
# The bars: us, sum over the four shapes.
BARS = {
    "row": {1: 66, 16: 66, 64: 68, 256: 100, 4096: 1195},
    "block": {1: 70, 16: 70, 64: 75, 256: 110, 4096: 1320},
    "int8": {1: 68, 16: 68, 64: 70, 256: 105, 4096: 1155},
}
WORKERS = (
    "mlp",
    "mlp-stream",
    "cases",
    "quant",
    *(f"{shape}-{mode}" for mode in MODES for shape in ("gate_up", "down", "qkv", "o")),
)
VARIANT_WORKERS = ("cases", "quant", "prefill", "torch", *(w for w in WORKERS if w.endswith(("-row", "-block"))))
# Relative Frobenius error against float32: bf16's rounding is 0.00166; fp8 sums that are never promoted add to it.
ERROR = {"promoted": 0.0022, "fast": 0.0045}


class Session:
    """What a worker shares with the others: the log, the clock, the GPU's lock, the watchdog."""

    def __init__(self, worker: str, args: argparse.Namespace):
        self.worker, self.start, self.budget, self.dry = worker, args.start, args.budget, args.dry
        self.sweep, self.variants = args.sweep, args.variants
        self.folder = Path(args.folder)
        self.log_file = os.open(args.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        self.beat, self.doing = 0.0, ""
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            time.sleep(0.5)
            if self.beat and time.time() - self.beat > 12:
                self.log(HUNG=self.doing)
                os._exit(3)

    def log(self, **row: Any) -> None:
        row = {"worker": self.worker, **row, "at": round(time.time() - self.start, 1)}
        os.write(self.log_file, (json.dumps(row, default=str) + "\n").encode())  # one write: appended whole

    @property
    def left(self) -> float:
        return self.budget - (time.time() - self.start)

    def doing_now(self, what: Any) -> None:
        self.beat, self.doing = time.time(), str(what)

    def wait_for_others(self) -> None:
        """Until all have compiled (a busy CPU would show in the wall clock), or half of the time is gone."""
        (self.folder / f"ready.{self.worker}").touch()
        expected = len((self.folder / "workers").read_text().split())
        while len(list(self.folder.glob("ready.*"))) < expected and self.left > self.budget * 0.45:
            time.sleep(0.2)

    @contextlib.contextmanager
    def gpu(self, rank: int) -> Iterator[None]:
        """The GPU alone; of those that wait the lowest rank first."""
        with GpuLock(self.folder, rank).hold(self.worker):
            self.doing_now("start")
            try:
                yield
            finally:
                self.beat = 0.0


def compiler(session: Session) -> Callable[..., Any]:
    """lower-and-compile of (fn, *shapes): for this GPU, or for an absent H200."""
    import jax

    if not session.dry:
        return lambda fn, *shapes: jax.jit(fn).lower(*shapes).compile()
    from tests.pallas_kernels.aot import compile_for_h200

    def compile_dry(fn: Any, *shapes: Any) -> Any:
        compiled = compile_for_h200(fn, *shapes)
        if compiled.spill_bytes:
            session.log(spill_bytes=compiled.spill_bytes, registers=compiled.registers)
        return compiled

    return compile_dry


def kernel_times(call: Callable[[], Any]) -> tuple[float, int]:
    """(sum of kernel durations in us, kernels) of one call, by CUPTI."""
    durations = kernel_durations(call)
    return sum(us for _, us in durations), len(durations)


def measure(fn: Any, args: tuple[Any, ...], calls: int, seconds: float) -> dict[str, Any]:
    """us per call: wall clock (median of 3 bursts of about `seconds`) and kernel durations."""
    import jax

    for _ in range(3):
        jax.block_until_ready(fn(*args))
    begin = time.perf_counter()
    jax.block_until_ready(fn(*args))
    chains = max(2, min(200, int(seconds / (time.perf_counter() - begin))))
    walls = []
    for _ in range(3):
        out = None
        begin = time.perf_counter()
        for _ in range(chains):
            del out  # the same addresses every time: the command buffer needs no update
            out = fn(*args)
        jax.block_until_ready(out)
        walls.append((time.perf_counter() - begin) / (chains * calls) * 1e6)
    kernels = [kernel_times(lambda: fn(*args)) for _ in range(2)]
    kernel = min(us for us, _ in kernels) / calls
    return {
        "us": round(statistics.median(walls), 2),
        "kernel_us": round(kernel, 2),
        "kernels": round(kernels[0][1] / calls, 2),
    }


def chain(fn: Callable[..., Any], shared: int, rounds: int) -> Callable[..., Any]:
    """fn(*first `shared` arguments, w, after=result before) for every further argument w, `rounds` times over.

    Only the last result is returned: dozens of outputs would cost the host more than such kernels take.
    """
    import jax

    inner = jax.jit(fn)

    def run(*args: Any) -> Any:
        result = inner(*args[:shared], args[shared])
        for w in (args[shared:] * rounds)[1:]:
            result = inner(*args[:shared], w, after=jax.tree.leaves(result)[0])
        return result

    return run


# --- matmuls ---------------------------------------------------------------------------------------------------------


def alternatives(shape: str, m: int, mode: str) -> list[Any]:
    """Configs worth timing beside the heuristic's, from what earlier runs left open."""
    from pallas_kernels.scaled_matmul.cases import LLAMA_8B
    from pallas_kernels.scaled_matmul.config import SMEM_BYTES, Config, fill_stages

    block, small = mode == "block", shape in ("o", "down")
    k = LLAMA_8B[shape][1]
    found: list[Any] = []

    def add(wg_n: int, m_n_k: str = "111", tile_k: int = 128, most: int = 32, **more: Any) -> None:
        wgs_m, wgs_n, wgs_k = map(int, m_n_k)
        epilogue_n = next(e for e in (64, 32, 16) if e <= most and wg_n % e == 0)
        config = Config(wg_n, wgs_m, wgs_n, wgs_k, tile_k=tile_k, epilogue_n=epilogue_n, promote=m <= 64, **more)
        config = fill_stages(config, m, k, 2, block)
        if config.smem_bytes(m, k, 2, block) <= SMEM_BYTES and config not in found:
            found.append(config)

    if m == 1:
        return []
    if m <= 64:
        if small:
            add(32, "112", 512), add(32, "112", 256), add(32, "111", 1024), add(64, "111", 256)
            add(32, "111", 512, cluster=2, cluster_axis="n")
        elif shape == "qkv":
            add(48, "112", 512), add(48, "112", 256), add(48, "111", 512), add(64, "112", 512)
            add(48, "111", 256, cluster=2, cluster_axis="n")
        else:
            add(112, "121", 128), add(112, "121", 256), add(112, "112", 256), add(112, "112", 128), add(64, "121", 256)
            add(112, "111", 256), add(112, "121", 128, cluster=2, cluster_axis="n"), add(64, "112", 512)
    elif m == 256:
        tile = {"qkv": 96, "o": 64, "down": 64, "gate_up": 112 if block else 224}[shape]
        add(tile, "211", 128), add(tile, "211", 256), add(tile, "211", 128, cluster=2)
        if tile < 200:
            add(tile, "212", 128)
        add(tile, "211", 128, cluster=2, cluster_axis="n")
        if shape == "gate_up":
            add(128, "211", 128, m_groups=1 if block else 2), add(112, "211", 128, m_groups=1 if block else 2)
            add(128, "221", 128, 16)
        else:
            add(tile, "212", 256, 16), add(tile, "211", 128, cluster=4, cluster_axis="n"), add(128, "211", 256)
            add(tile, "411", 128)
    elif block:
        add(128, "211"), add(128, "211", 256), add(128, "211", 128, cluster=2, stripe=16)
        add(128, "211", 128, cluster=2, cluster_axis="n"), add(64, "221", 128, 16), add(128, "311")
        add(128, "211", 256, cluster=2, stripe=16), add(64, "221", 128, 16, cluster=2)
    else:
        add(256, "211"), add(256, "211", stripe=4), add(256, "211", cluster=2, stripe=16)
        add(256, "211", cluster=2, cluster_axis="n", stripe=16), add(256, "211", cluster=2)
        add(128, "211", m_groups=2, cluster=2)
    return sorted(found, key=lambda c: c.cluster)  # those that share tiles may hang: last


def operand_shapes(m: int, n: int, k: int, mode: str, weights: int) -> list[Any]:
    import jax
    import jax.numpy as jnp

    dtype = jnp.int8 if mode == "int8" else jnp.float8_e4m3fn
    kb, nb = k // 128, n // 128
    S = jax.ShapeDtypeStruct
    block = mode == "block"
    x_scale = S((m, kb) if block else (m, 1), jnp.float32)
    w_scale = S((nb, kb) if block else (n, 1), jnp.float32)
    return [S((m, k), dtype), x_scale, w_scale, *[S((n, k), dtype)] * weights]


def random_values(shape: tuple[int, ...], dtype: Any, seed: Any) -> Any:
    import jax
    import jax.numpy as jnp

    key = jax.random.key(seed)
    if dtype == jnp.int8:
        return jax.random.randint(key, shape, -127, 128, jnp.int8)
    return (jax.random.normal(key, shape, jnp.bfloat16) * 64).astype(dtype)


def exact_product(x: Any, x_scale: Any, w_scale: Any, w: Any) -> Any:
    import jax.numpy as jnp

    x, w = x.astype(jnp.float32), w.astype(jnp.float32)
    if x_scale.shape[1] > 1:
        x = x * jnp.repeat(x_scale, 128, 1)
        w = w * jnp.repeat(jnp.repeat(w_scale, 128, 0), 128, 1)
        return jnp.matmul(x, w.T, precision="highest")
    return jnp.matmul(x, w.T, precision="highest") * x_scale * w_scale.T


def matmul_worker(session: Session, shape: str, mode: str) -> None:
    import jax
    import jax.numpy as jnp

    from pallas_kernels.scaled_matmul import mosaic_sm90
    from pallas_kernels.scaled_matmul.cases import LLAMA_8B
    from pallas_kernels.scaled_matmul.config import fill_stages, heuristic

    n, k = LLAMA_8B[shape]
    ms = kernel_variants.MS if session.variants else MS
    weights = max(6, math.ceil(300e6 / (n * k)))
    block = mode == "block"
    compile_ = compiler(session)
    jobs: list[tuple[int, Any, bool]] = []
    for m in ms:
        best = fill_stages(heuristic(m, n, k, block=block), m, k, 2, block)
        jobs.append((m, best, True))
        if session.sweep:
            jobs += [(m, config, False) for config in alternatives(shape, m, mode) if config != best]
        if session.variants:
            others = kernel_variants.matmul_variants(shape, n, k, mode, m)
            jobs += [(m, config, False) for config in others if config != best]

    def calls_of(m: int) -> int:
        return weights if m <= 256 else 4

    def build(job: tuple[int, Any, bool]) -> Any:
        m, config, _ = job

        def op(x: Any, x_scale: Any, w_scale: Any, w: Any, after: Any = None) -> Any:
            return mosaic_sm90.scaled_matmul(x, w, x_scale, w_scale, config=config, after=after)

        try:
            shapes = operand_shapes(m, n, k, mode, 1 if session.dry else calls_of(m))
            return compile_(chain(op, 3, 1), *shapes)
        except Exception as error:
            session.log(shape=shape, mode=mode, m=m, config=str(config), failed=repr(error)[:300])
            return None

    with concurrent.futures.ThreadPoolExecutor(1 if session.dry else 3) as pool:
        jobs.sort(key=lambda job: not job[2])
        built = list(pool.map(build, jobs))
    session.log(compiled=sum(b is not None for b in built), of=len(jobs))
    if session.dry:
        return
    dtype = jnp.int8 if mode == "int8" else jnp.float8_e4m3fn
    make = jax.jit(random_values, static_argnums=(0, 1))
    reference = jax.jit(exact_product)
    with session.gpu(0):
        ws = [jax.block_until_ready(make((n, k), dtype, seed)) for seed in range(weights)]
        for rows in (1, 16, 64):
            session.doing_now(f"reference {rows}")
            reference.lower(*operand_shapes(rows, n, k, mode, 1)).compile()
    session.wait_for_others()
    pairs = list(zip(jobs, built))
    passes = [[p for p in pairs if p[0][2]], [p for p in pairs if not p[0][2]]]
    if session.variants:  # those that might hang last, and between them the heuristic's choice once more
        risks = [[p for p in passes[1] if kernel_variants.risk(p[0][1]) == risk] for risk in range(3)]
        passes = [passes[0], risks[0] + passes[0], risks[1], risks[2]]
    for rank, some in enumerate(passes):
        with session.gpu(3 * rank):
            time_matmuls(session, shape, mode, some, ws, calls_of, make, reference)
        if rank == 0 and session.variants:
            with session.gpu(1):
                time_data(session, shape, mode, some, ws, calls_of)


def time_data(session: Session, shape: str, mode: str, pairs: Any, ws: Any, calls_of: Any) -> None:
    """The heuristic's kernel at M = 4096 on other data: what switching bits cost under the power limit."""
    import jax
    import jax.numpy as jnp

    n, k = ws[0].shape
    [fn] = [fn for (m, *_), fn in pairs if m == 4096]
    if fn is None or mode == "int8":
        return
    bits = jax.jit(
        lambda shape, seed: jax.lax.bitcast_convert_type(
            jax.random.bits(jax.random.key(seed), shape, jnp.uint8) & jnp.uint8(0xBF), jnp.float8_e4m3fn
        ),
        static_argnums=0,
    )
    x_, xs_, wsc_, *_ = operand_shapes(4096, n, k, mode, 1)
    for kind in ("zeros", "bits"):
        session.doing_now(f"{shape} {mode} {kind}")
        row = {"op": "data", "shape": shape, "mode": mode, "m": 4096, "data": kind}
        try:
            other = (lambda s, i: jnp.zeros(s, x_.dtype)) if kind == "zeros" else bits
            weights = [other((n, k), i) for i in range(calls_of(4096))]
            args = (other(x_.shape, 99), jnp.ones(xs_.shape), jnp.ones(wsc_.shape), *weights)
            row |= measure(fn, args, calls_of(4096), 0.02)
        except Exception as error:
            row["failed"] = repr(error)[:300]
        session.log(**row)


def time_matmuls(
    session: Session, shape: str, mode: str, pairs: Any, ws: Any, calls_of: Any, make: Any, reference: Any
) -> None:
    import jax
    import jax.numpy as jnp
    import numpy as np

    n, k = ws[0].shape
    for m in MS:
        session.beat = 0.0
        mine = [(job, fn) for job, fn in pairs if job[0] == m and fn is not None]
        if not mine:
            continue
        x_, xs_, wsc_, *_ = operand_shapes(m, n, k, mode, 1)
        session.doing_now(f"data {m}")
        x = make(x_.shape, x_.dtype, 99)
        x_scale = jax.random.uniform(jax.random.key(5), xs_.shape) * 0.01 + 0.001
        w_scale = jax.random.uniform(jax.random.key(6), wsc_.shape) * 0.01 + 0.001
        rows = np.arange(m) if m <= 64 else np.linspace(0, m - 1, 64).astype(int)
        calls = calls_of(m)
        want = np.asarray(reference(x[rows], x_scale[rows], w_scale, ws[calls - 1]))
        args = (x, x_scale, w_scale, *ws[:calls])
        for (_, config, chosen), fn in mine:
            if session.left < 2:
                session.log(out_of_time=f"{shape} {mode} {m}")
                return
            session.doing_now(f"{shape} {mode} {m} {config}")
            row: dict[str, Any] = dict(op="scaled_matmul", shape=shape, mode=mode, m=m, heuristic=chosen)
            try:
                one, two = fn(*args), fn(*args)
                got = np.asarray(one[rows].astype(jnp.float32))
                error = float(np.linalg.norm(got - want) / np.linalg.norm(want))
                row["error"], row["repeats"] = round(error, 5), bool((one == two).all())
                fast = mode == "row" and not config.promote
                if not error < ERROR["fast" if fast else "promoted"] or not row["repeats"]:
                    row["WRONG"] = True
                del one, two
                row |= measure(fn, args, calls, 0.02 if chosen or m == 4096 else 0.006)
                row["TBs"] = round(n * k / row["us"] / 1e6, 2)
                row["TFLOPs"] = round(2 * m * n * k / row["us"] / 1e6)
            except Exception as error:
                row["failed"] = repr(error)[:300]
            session.log(**row, config=str(config))


# --- quantization ----------------------------------------------------------------------------------------------------


def quant_worker(session: Session) -> None:
    import jax
    import jax.numpy as jnp

    from pallas_kernels.quantize import mosaic_sm90, reference

    compile_ = compiler(session)
    kinds = {"row fp8": (jnp.float8_e4m3fn, None, 448.0), "block fp8": (jnp.float8_e4m3fn, 128, 448.0)}
    kinds["row int8"] = (jnp.int8, None, 127.0)
    widths = {"quantize_rows": 4096, "residual_norm": 4096, "silu": 14336}
    S = jax.ShapeDtypeStruct

    def op_of(module: Any, op: str, kind: str, **more: Any) -> Callable[..., Any]:
        qdtype, block, divisor = kinds[kind]
        common = dict(block=block, divisor=divisor, **more)
        if op == "quantize_rows":
            return lambda weight, x, **after: module.quantize_rows(x[0], qdtype, **common, **after)
        if op == "silu":
            return lambda weight, x, **after: module.silu_mul_quantize(x[0], qdtype=qdtype, **common, **after)
        return lambda weight, x, **after: module.rms_norm_quantize(
            x[0], weight, x[1], eps=1e-5, qdtype=qdtype, **common, **after
        )

    jobs: list[tuple[str, str, int, Any]] = []
    for m in (16, 1, 64, 4096, 16384):
        for op, k in widths.items():
            for kind in kinds:
                jobs.append((op, kind, m, None))
            if (
                session.sweep and m in (1, 64) and op != "quantize_rows"
            ):  # a row shared by the blocks of a cluster: may hang, so late
                shares = ((2, 2), (4, 1)) if op == "residual_norm" else ((2, 7), (7, 2))
                more = [mosaic_sm90.Split(wgs, 2, k // (1024 * wgs * blocks), blocks) for blocks, wgs in shares]
                jobs += [(op, "row fp8", m, s) for s in more if s.wgs * s.blocks * s.repeats * 1024 == k]
            if session.sweep and m in (16, 4096):
                best = mosaic_sm90.split(m, k)
                for runs in (1, 2):
                    for wgs in (1, 2, 4, 7, 8):
                        unit = 512 * runs * wgs
                        other = mosaic_sm90.Split(wgs, runs, k // unit)
                        if k % unit == 0 and 4 <= k // (128 * wgs) <= 64 and other != best:
                            jobs.append((op, "row fp8", m, other))

    if session.variants:
        ms = (16, 1, 64, 4096)
        jobs = [job for job in jobs if job[2] in ms and job[1] != "row int8"]
        jobs += [
            (op, kind, m, split)
            for m in ms
            for op in widths
            for kind in ("row fp8", "block fp8")
            for split in kernel_variants.quant_variants(op, m)
            if split != mosaic_sm90.split(m, widths[op])
        ]

    def shapes_of(op: str, m: int) -> tuple[int, Any, Any]:
        """(inputs in the chain, the weight, one input)"""
        k = widths[op]
        width = 2 * k if op == "silu" else k
        count = 8 if m <= 64 else max(3, math.ceil(300e6 / (2 * m * width)))
        return count, S((k,), jnp.bfloat16), (S((m, width), jnp.bfloat16),) * (2 if op == "residual_norm" else 1)

    def build(job: tuple[str, str, int, Any]) -> Any:
        op, kind, m, split = job
        count, weight, x = shapes_of(op, m)
        fn = op_of(mosaic_sm90, op, kind, config=split)
        rounds = 1 if session.dry or m > 64 else 4
        timed = compile_(chain(fn, 1, rounds), weight, *[x] * (1 if session.dry else count))
        check = None if (split and not session.variants) or m > 4096 or session.dry else check_of(op, kind, m)
        return timed, check, rounds

    @functools.cache
    def check_of(op: str, kind: str, m: int) -> Any:
        _, weight, x = shapes_of(op, m)
        return compile_(op_of(reference, op, kind), weight, x)

    def try_build(job: Any) -> Any:
        try:
            return build(job)
        except Exception as error:
            session.log(op=job[0], kind=job[1], m=job[2], split=str(job[3]), failed=repr(error)[:300])
            return None

    with concurrent.futures.ThreadPoolExecutor(1 if session.dry else 4) as pool:
        built = list(pool.map(try_build, jobs))
    session.log(compiled=sum(b is not None for b in built), of=len(jobs))
    if session.dry:
        return
    session.wait_for_others()
    built_jobs = [(job, b) for job, b in zip(jobs, built) if b is not None]
    blocks: tuple[int | None, ...] = (None, 1, 2)  # the op's choice; a row in one block; in a cluster, which may hang
    for rank, count in enumerate(blocks):
        some = [(j, b) for j, b in built_jobs if (None if j[3] is None else min(2, j[3].blocks)) == count]
        with session.gpu(1 + 2 * rank):
            time_quants(session, some, shapes_of)


def time_quants(session: Session, pairs: Any, shapes_of: Any) -> None:
    import jax
    import jax.numpy as jnp

    normal = jax.jit(lambda seed, shape: jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16), static_argnums=1)
    made: dict[Any, Any] = {}
    for job, (fn, check, rounds) in pairs:
        op, kind, m, split = job
        if session.left < 2:
            session.log(out_of_time=f"quant {m}")
            return
        session.doing_now(job)
        count, weight_, x_ = shapes_of(op, m)
        row: dict[str, Any] = dict(op=op, kind=kind, m=m, heuristic=split is None)
        try:
            if (op, m) not in made:
                made.clear()
                inputs = [tuple(normal(17 * i + j, x.shape) for j, x in enumerate(x_)) for i in range(count)]
                made[op, m] = (normal(3, weight_.shape), *inputs)
            row |= time_quant(job, fn, check, made[op, m], rounds)
        except Exception as error:
            row["failed"] = repr(error)[:300]
        session.log(**row, split=str(split))


def time_quant(job: Any, fn: Any, check: Any, args: tuple[Any, ...], rounds: int) -> dict[str, Any]:
    import jax.numpy as jnp

    op, _, m, _ = job
    row: dict[str, Any] = {}
    if check is not None:
        got, want = fn(*args), check(args[0], args[-1])
        a, b = got[0].astype(jnp.float32), want[0].astype(jnp.float32)
        row["differing"] = float((a != b).mean())  # 0 for quantize_rows; the others' sums and exponentials differ
        row["worst"] = float((jnp.abs(a - b) / jnp.maximum(jnp.abs(b), 1)).max())
        row["scale_error"] = float(jnp.abs(got[1] / want[1] - 1).max())
        if op == "residual_norm":
            row["residual_equal"] = bool((got[2] == want[2]).all())
        # One step of fp8 is 1/8 of a value at most, one of int8 is 1.
        if row["worst"] > 1 or row["scale_error"] > 1e-5 or (op == "quantize_rows" and row["differing"] > 0):
            row["WRONG"] = True
    row |= measure(fn, args, (len(args) - 1) * rounds, 0.01)
    moved = m * args[0].shape[0] * {"quantize_rows": 3, "silu": 5, "residual_norm": 7}[op]
    row["TBs"] = round(moved / row["us"] / 1e6, 2)
    row["kernel_TBs"] = round(moved / row["kernel_us"] / 1e6, 2)
    return row


# --- a decoder's MLP as a chain --------------------------------------------------------------------------------------


def mlp_worker(session: Session) -> None:
    """norm + quantize, gate_up, SiLU + quantize, down; with and without `early_launch`."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from pallas_kernels.quantize import mosaic_sm90 as quantize
    from pallas_kernels.scaled_matmul import mosaic_sm90 as matmul
    from pallas_kernels.scaled_matmul.config import fill_stages, heuristic

    d, f, layers, rounds = 4096, 14336, 3, 4
    f8, S = jnp.float8_e4m3fn, jax.ShapeDtypeStruct
    compile_ = compiler(session)

    def config(m: int, n: int, k: int, early: bool, spare: int) -> Any:
        c = fill_stages(heuristic(m, n, k, block=False), m, k)
        # A multiprocessor that still runs a block of the kernel before has a little less shared memory.
        return dataclasses.replace(c, early_launch=early, stages=max(2, c.stages - spare))

    def layer(x: Any, residual: Any, norm: Any, up: Any, up_scale: Any, down: Any, down_scale: Any, how: Any) -> Any:
        m, (early, spare) = x.shape[0], how
        options = dict(qdtype=f8, divisor=448.0, early_launch=early)
        xq, scale, residual = quantize.rms_norm_quantize(x, norm, residual, eps=1e-5, **options)
        y = matmul.scaled_matmul(xq, up, scale, up_scale, config=config(m, 2 * f, d, early, spare))
        yq, scale = quantize.silu_mul_quantize(y, **options)
        return matmul.scaled_matmul(yq, down, scale, down_scale, config=config(m, d, f, early, spare)), residual

    def build(job: Any) -> Any:
        m, how = job
        inner = jax.jit(functools.partial(layer, how=how))

        def run(x: Any, residual: Any, norm: Any, up_scale: Any, down_scale: Any, *ws: Any) -> Any:
            for _ in range(1 if session.dry else rounds):
                for i in range(0, len(ws), 2):
                    x, residual = inner(x, residual, norm, ws[i], up_scale, ws[i + 1], down_scale)
            return x

        bf, f32 = jnp.bfloat16, jnp.float32
        weights = [S((2 * f, d), f8), S((d, f), f8)] * (1 if session.dry else layers)
        fixed = S((m, d), bf), S((m, d), bf), S((d,), bf), S((2 * f, 1), f32), S((d, 1), f32)
        return compile_(run, *fixed, *weights)

    jobs = [(m, how) for m in (1, 16, 64) for how in ((False, 0), (True, 0), (True, 1))]
    with concurrent.futures.ThreadPoolExecutor(1 if session.dry else 4) as pool:
        built = list(pool.map(build, jobs))
    session.log(compiled=len(built))
    if session.dry:
        return
    make = jax.jit(random_values, static_argnums=(0, 1))
    session.wait_for_others()
    with session.gpu(0):
        ws = [make(s, f8, i) for i in range(layers) for s in ((2 * f, d), (d, f))]
        up_scale, down_scale = (jnp.full((n, 1), 1 / (64 * k**0.5), jnp.float32) for n, k in ((2 * f, d), (d, f)))
        plain: dict[int, Any] = {}
        for (m, how), fn in zip(jobs, built):
            session.doing_now(f"mlp {m} {how}")
            x = jax.random.normal(jax.random.key(1), (m, d), jnp.bfloat16)
            args = (x, x * 0.5, jnp.ones((d,), jnp.bfloat16), up_scale, down_scale, *ws)
            got = np.asarray(fn(*args).astype(jnp.float32))
            row: dict[str, Any] = {"op": "mlp", "m": m, "early_launch": how[0], "stages_less": how[1]}
            if not np.array_equal(plain.setdefault(m, got), got) or not np.isfinite(got).all():
                row["WRONG"] = True
            row |= measure(fn, args, layers * rounds, 0.02)
            session.log(**row)


# --- the test tables -------------------------------------------------------------------------------------------------


def cases_worker(session: Session) -> None:
    """Every case of the tests' table on this device, against float64; refusals with their reason."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from pallas_kernels.scaled_matmul import mosaic_sm90
    from pallas_kernels.scaled_matmul.cases import CASES, DEVICE_CASES, error_bound, expected, make

    compile_ = compiler(session)
    ready = []
    checks: list[tuple[Any, Any]] = [(case, None) for case in (*CASES, *DEVICE_CASES)]
    if session.variants:
        checks = list(kernel_variants.CHECKS)
    for case, config in checks:
        session.beat = 0
        operands = make(case)
        shapes = [jax.ShapeDtypeStruct(o.shape, o.dtype) for o in operands if o is not None]
        try:
            fn = functools.partial(mosaic_sm90.scaled_matmul, out_dtype=case.out_dtype, config=config)
            ready.append(((case, config), operands, compile_(fn, *shapes)))
        except NotImplementedError as error:
            session.log(case=str((case, config)), refused=str(error)[:150])
        except Exception as error:
            session.log(case=str((case, config)), failed=repr(error)[:300])
    session.log(compiled=len(ready))
    if session.dry:
        return
    session.wait_for_others()
    with session.gpu(1):
        for (case, config), operands, fn in ready:
            session.doing_now((case, config))
            try:
                got = np.asarray(fn(*[jnp.asarray(o) for o in operands if o is not None])).astype(np.float64)
                want, magnitude = expected(*operands)
                worst = float((np.abs(got - want) / error_bound(case, want, magnitude, tensor_cores=True)).max())
                row: dict[str, Any] = {} if worst <= 1 else {"WRONG": True}
                session.log(case=str((case, config)), worst_over_bound=round(worst, 3), **row)
            except Exception as error:
                session.log(case=str((case, config)), failed=repr(error)[:300])


# --- all of it -------------------------------------------------------------------------------------------------------


def run_worker(args: argparse.Namespace) -> None:
    session = Session(args.worker, args)
    try:
        if args.worker == "cases":
            cases_worker(session)
        elif args.worker == "quant":
            quant_worker(session)
        elif args.worker == "prefill":
            variant_workers.prefill_worker(session, compiler(session))
        elif args.worker == "torch":
            variant_workers.torch_worker(session)
        elif args.worker.startswith("mlp"):
            mlp_worker(session)
        else:
            matmul_worker(session, *args.worker.split("-"))
    except Exception as error:
        session.log(crashed=repr(error)[:1000])
        raise
    finally:
        (session.folder / f"ready.{args.worker}").touch()


def summary(rows: list[dict[str, Any]]) -> None:
    for mode in MODES:
        for m in sorted(MS):
            best = [r for r in rows if r.get("mode") == mode and r["m"] == m and "us" in r and not r.get("WRONG")]
            chosen = {r["shape"]: r for r in best if r["heuristic"]}
            fastest = {s: min((r["us"] for r in best if r["shape"] == s), default=math.nan) for s in SHAPES}
            total = sum(chosen[s]["us"] if s in chosen else math.nan for s in SHAPES)
            kernel = sum(chosen[s]["kernel_us"] if s in chosen else math.nan for s in SHAPES)
            print(
                f"{mode:5} M={m:<5} bar {BARS[mode][m]:5}  heuristic {total:8.1f} (kernels {kernel:8.1f})  "
                f"fastest {sum(fastest.values()):8.1f}"
            )
    for r in rows:
        if any(key in r for key in ("WRONG", "HUNG", "failed", "crashed", "out_of_time")):
            print({key: value for key, value in r.items() if key != "split"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=os.environ.get("OUT", "."))
    parser.add_argument("--budget", type=float, default=110)
    parser.add_argument("--only", help=f"of {', '.join(dict.fromkeys(WORKERS + VARIANT_WORKERS))}")
    parser.add_argument("--sweep", action="store_true", help="other configs too (their compilation takes a minute)")
    parser.add_argument("--variants", action="store_true", help="structures of bench/kernel_variants.py")
    parser.add_argument("--dry", action="store_true", help="compile for an absent H200, run nothing")
    for internal in ("--worker", "--folder", "--log"):
        parser.add_argument(internal, help=argparse.SUPPRESS)
    parser.add_argument("--start", type=float, default=time.time(), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return run_worker(args)
    known = VARIANT_WORKERS if args.variants else WORKERS
    names = args.only.split(",") if args.only else list(known)
    if unknown := set(names) - set(WORKERS + VARIANT_WORKERS):
        parser.error(f"unknown workers {', '.join(sorted(unknown))}; known: {', '.join(known)}")
    log = Path(args.out) / "scaled.jsonl"
    log.write_text("")
    flags = "--xla_gpu_autotune_level=0 --xla_gpu_command_buffer_scheduling_mode=SERIALIZE"
    environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false", "XLA_FLAGS": flags}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "workers").write_text(" ".join(names))
        command = [sys.executable, "-m", "bench.kernel_scaled", "--folder", folder, "--log", str(log)]
        command += (
            ["--budget", str(args.budget), "--start", str(args.start)] + ["--dry"] * args.dry + ["--sweep"] * args.sweep
        )
        command += ["--variants"] * args.variants
        clocks = (
            variant_workers.watch_clocks(Path(args.out) / "clocks.csv", args.start)
            if args.variants and not args.dry
            else None
        )
        workers = []
        for name in names:
            with open(f"{folder}/{name}.err", "w") as errors:
                stream = {"XLA_FLAGS": flags + " --xla_gpu_enable_command_buffer="} if name == "mlp-stream" else {}
                call = [*command, "--worker", name]
                workers.append(subprocess.Popen(call, env={**environment, **stream}, stderr=errors))
        for name, worker in zip(names, workers):
            try:
                worker.wait(timeout=max(1, args.start + args.budget + 3 - time.time()))
            except subprocess.TimeoutExpired:
                worker.kill()
            if worker.returncode:
                print(name, "ended with", worker.returncode, Path(f"{folder}/{name}.err").read_text()[-600:])
        if clocks is not None:
            clocks.terminate()
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    summary(rows)
    if args.variants:
        variant_workers.best_variants(rows)


if __name__ == "__main__":
    main()
