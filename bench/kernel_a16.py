"""w4a16 and w8a16 kernels on this GPU: correctness first, then microseconds per call over configurations.

    python -m bench.kernel_a16 [--budget SECONDS] [--out DIR] [--only check,u4,s8g,s8c,fp8c] [--m 1,16,...] [--dry]

One process per group of variants, so that a hang costs that group only (its watchdog ends it); they compile side by
side and take turns on the GPU by a file lock. Kernel time is CUPTI's, weights rotate over 300 MB; the best
configurations are then timed as a chain of calls that XLA replays from a command buffer (wall clock per call).
Lines of JSON go to DIR/a16.<group>.jsonl as they come, and all of them to DIR/a16.jsonl in the end. --dry compiles
for an H200 on a machine without a GPU and prints registers and spills.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import fcntl
import json
import math
import os
import statistics
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.timing import kernel_durations
from pallas_kernels.a16 import decode_config, decode_sm90, wgmma_config, wgmma_sm90
from pallas_kernels.a16.cases import CASES, LLAMA_8B, Case, make, worst
from pallas_kernels.a16.stored import KINDS

MS = (1, 16, 64, 256, 4096)
# What a sweep multiplies by: stored kind and group (None: one scale per row).
WEIGHTS = {"u4": ("u4", 128), "s8g": ("s8", 128), "s8c": ("s8", None), "fp8c": ("e4m3", None)}
BARS = {"u4": (50, 52, 75, 180, 2390), "s8g": (72, 74, 85, 190, 2390), "s8c": (72, 74, 85, 190, 2390)}  # us, 4 shapes
LOCK = "/tmp/kernel_a16.lock"
HANG = 15.0  # seconds without a sign of life while the GPU is ours


class Log:
    """JSON lines, flushed; and the watchdog, which ends the process when a kernel does."""

    def __init__(self, path: Path | None, start: float, budget: float, group: str):
        self.file = path.open("w") if path else None
        self.start, self.budget, self.group = start, budget, group
        self.doing, self.since = "", 0.0
        threading.Thread(target=self._watch, daemon=True).start()

    def __call__(self, **row: Any) -> None:
        line = json.dumps({"group": self.group, **row, "at": round(time.time() - self.start, 1)}, default=str)
        print(line, flush=True)
        if self.file:
            self.file.write(line + "\n")
            self.file.flush()

    def beat(self, doing: str) -> None:
        self.doing, self.since = doing, time.time()

    def rest(self) -> None:
        self.since = 0.0

    def _watch(self) -> None:
        while True:
            time.sleep(0.5)
            if self.since and time.time() - self.since > HANG:
                self(HUNG=self.doing)
                os._exit(3)

    @property
    def left(self) -> float:
        return self.budget - (time.time() - self.start)


def kernel_times(call: Callable[[int], Any], n: int) -> tuple[list[float], int]:
    """Microseconds of the kernels of each of n calls (CUPTI), and kernels per call."""
    timings = kernel_durations(lambda: [call(i) for i in range(n)])
    each = len(timings) // n
    return [sum(us for _, us in timings[i * each : (i + 1) * each]) for i in range(n)], each


class Turn:
    """The GPU for one process at a time."""

    def __init__(self, log: Log):
        self.log = log

    def __enter__(self) -> None:
        self.file = open(LOCK, "w")
        fcntl.flock(self.file, fcntl.LOCK_EX)

    def __exit__(self, *_: Any) -> None:
        self.log.rest()
        fcntl.flock(self.file, fcntl.LOCK_UN)
        self.file.close()


# --- correctness ---


def op_of(case: Case) -> tuple[Callable[..., Any], list[str]]:
    from pallas_kernels.w4a16.api import w4a16_matmul
    from pallas_kernels.w8a16.api import w8a16_matmul

    return (w4a16_matmul if case.qtype == "uint4" else w8a16_matmul), ["decode_sm90", "wgmma_sm90", "xla"]


def packed(case: Case, data: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The op's arguments in the layout that this device prefers."""
    import pallas_kernels.w4a16.layout as four
    import pallas_kernels.w8a16.layout as eight

    arrays = [None if a is None else jnp.asarray(a) for a in (data.qweight, data.scale, data.zero, data.offset)]
    kwargs: dict[str, Any] = {"perm": None if data.perm is None else jnp.asarray(data.perm)}
    kwargs["group_size"] = case.group_size
    if case.qtype == "uint4":
        layout = four.preferred_layout(case.n, case.k, case.group_size, case.zero)
        q, s, z, o = four.to_layout(*arrays, layout, case.group_size)
        kwargs["offset"] = o
    else:
        layout = eight.preferred_layout(case.n, case.k, case.group_size, case.zero)
        q, s, z = eight.to_layout(*arrays[:3], layout, case.group_size)
    return (jnp.asarray(data.x), q, s, z), kwargs | {"layout": layout}


def check(log: Log, names: list[str]) -> None:
    """Every case through the named implementations, as compiled by the op itself."""
    jobs = []

    def build(case: Case, name: str) -> Any:
        data = make(case)
        args, kwargs = packed(case, data)
        traced = {k: v for k, v in kwargs.items() if k in ("perm", "offset") and v is not None}
        static = {k: v for k, v in kwargs.items() if k not in traced}
        op = op_of(case)[0]
        fn = jax.jit(lambda a, t: op(*a, **t, **static, implementation=name))
        return data, fn.lower(args, traced).compile(), (args, traced)

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for case in CASES:
            for name in names:
                jobs.append((case, name, pool.submit(build, case, name)))
        concurrent.futures.wait([f for *_, f in jobs])
    bad = ok = refused = 0
    with Turn(log):
        for case, name, future in jobs:
            try:
                data, fn, args = future.result()
                log.beat(f"{name} {case}")
                got = np.asarray(fn(*args).astype(jnp.float32))
                ratio = worst(case, data, got)
                same = bool(np.array_equal(got, np.asarray(fn(*args).astype(jnp.float32)), equal_nan=True))
                ok, bad = ok + (ratio <= 1 and same), bad + (not (ratio <= 1 and same))
                note = {} if ratio <= 1 and same else {"WRONG": True}
                log(check=name, case=str(case), ratio=round(ratio, 4), same=same, **note)
            except NotImplementedError as e:
                refused += 1
                log(check=name, case=str(case), refused=str(e)[:160])
            except Exception as e:
                bad += 1
                log(check=name, case=str(case), failed=f"{type(e).__name__}: {str(e)[:300]}")
    log(checked=names, ok=ok, bad=bad, refused=refused)


# --- speed ---


def plan_of(module: Any, weights: str, m: int, n: int, k: int) -> Any:
    kind, group = WEIGHTS[weights]
    return module.Plan(
        m, n, k, KINDS[kind], "bf16", "bf16", group or k, group is None, False, False, False, 132, module.Config()
    )


def shapes_of(plan: Any) -> tuple[jax.ShapeDtypeStruct, ...]:
    """x, weight, scale."""
    dtype = {"u4": jnp.uint8, "s8": jnp.int8, "e4m3": jnp.float8_e4m3fn}[plan.kind.name]
    scale = (plan.n, 1) if plan.scales_in_epilogue else (plan.n // 16, plan.groups, 8, 2)
    return (
        jax.ShapeDtypeStruct((plan.m, plan.k), jnp.bfloat16),
        jax.ShapeDtypeStruct((plan.n // 16, plan.k * 8 * plan.kind.words), dtype),
        jax.ShapeDtypeStruct(scale, jnp.bfloat16),
    )


def distinct(configs: list[Any], key: Callable[[Any], Any], each: int, most: int) -> list[Any]:
    """The first `each` of every family, in order, `most` in all."""
    seen: dict[Any, int] = {}
    out = []
    for config in configs:
        seen[key(config)] = seen.get(key(config), 0) + 1
        if seen[key(config)] <= each:
            out.append(config)
    return out[:most]


def candidates(weights: str, m: int, n: int, k: int, few: bool) -> list[tuple[Any, Any]]:
    """(module, plan) to time: the best estimates, and the best of every family of tiles."""
    out = []
    if m <= 16:
        plan = plan_of(decode_sm90, weights, m, n, k)
        configs = [c for c in decode_config.search_space(plan) if c.unit > 1]
        families = distinct(configs, lambda c: (c.row_tiles, c.row_warps, c.k_warps, c.split), 1, 99)
        limit = 3 if few else (7 if m == 1 else 14)
        picked = list(dict.fromkeys([*configs[:1], *(c for c in families if c.split <= (1 if m == 1 else 4))]))[:limit]
        out += [(decode_sm90, dataclasses.replace(plan, config=c)) for c in picked]
    if m >= 16:
        plan = plan_of(wgmma_sm90, weights, m, n, k)
        wide = wgmma_config.search_space(plan)
        limit = (2 if few else 4) if m == 16 else (5 if few else 10)
        chosen = distinct(wide, lambda c: (c.warpgroups, c.m_tile, c.split, c.parts), 1, limit)
        chosen = list(dict.fromkeys([*wide[:2], *chosen]))[: limit + 1]
        out += [(wgmma_sm90, dataclasses.replace(plan, config=c)) for c in chosen]
    return out


def random_bytes(shape: Any, seed: int) -> jax.Array:
    bits = jax.random.bits(jax.random.key(seed), shape.shape, jnp.uint8)
    if shape.dtype == jnp.float8_e4m3fn:
        bits = jnp.where(bits & 0x7F == 0x7F, 0, bits)
    return jax.lax.bitcast_convert_type(bits, shape.dtype)


def reference(weights: str, plan: Any) -> Callable[..., jax.Array]:
    import pallas_kernels.w4a16.reference as four
    import pallas_kernels.w8a16.reference as eight

    group = WEIGHTS[weights][1] or -1
    op = four.w4a16_matmul if plan.kind.name == "u4" else eight.w8a16_matmul
    return lambda x, w, s: op(x, w, s, group_size=group, layout="sm90")


def chain_of(module: Any, plan: Any, calls: int) -> Callable[..., jax.Array]:
    """`calls` products, each ordered behind the one before, over the given weights in turn."""
    inner = jax.jit(lambda x, w, s, y: module.matmul(plan, x, w, s, after=y))

    def run(x, s, y, *ws):
        for i in range(calls):
            y = inner(x, ws[i % len(ws)], s, y)
        return y

    return run


def chain_shapes(plan: Any, buffers: int) -> tuple[Any, ...]:
    x, w, s = shapes_of(plan)
    return x, s, jax.ShapeDtypeStruct((plan.m, plan.n), x.dtype), *[w] * buffers


def build(module: Any, plan: Any) -> Any:
    return jax.jit(lambda *a: module.matmul(plan, *a)).lower(*shapes_of(plan)).compile()


def timed(log: Log, weights: str, shape: str, ms: list[int], few: bool) -> None:
    n, k = LLAMA_8B[shape]
    jobs = [(m, module, plan) for m in ms for module, plan in candidates(weights, m, n, k, few)]
    buffers = max(2, math.ceil(300e6 / (n * k * KINDS[WEIGHTS[weights][0]].words / 2)))
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        futures = [pool.submit(build, module, plan) for _, module, plan in jobs]
        first = {m: plan for m, _, plan in reversed(jobs)}
        xla = {m: pool.submit(lambda p: jax.jit(reference(weights, p)).lower(*shapes_of(p)).compile(), p)
               for m, p in first.items()}  # fmt: skip
        dense_w = jax.ShapeDtypeStruct((n, k), jnp.bfloat16)
        multiply = lambda x, w: jax.lax.dot_general(x, w, (((1,), (1,)), ((), ())))  # noqa: E731
        dense = {m: pool.submit(lambda p: jax.jit(multiply).lower(shapes_of(p)[0], dense_w).compile(), p)
                 for m, p in first.items() if m >= 256 and weights == "u4"}  # fmt: skip
        concurrent.futures.wait([*futures, *xla.values(), *dense.values()])
    log(compiled=len(jobs))
    best: dict[int, list[tuple[float, Any, Any]]] = {m: [] for m in ms}
    with Turn(log):
        if log.left < 3:
            log(out_of_time=shape)
            return
        log.beat("weights")
        _, w_shape, s_shape = shapes_of(jobs[0][2])
        ws = [random_bytes(w_shape, i) for i in range(buffers)]
        scale = jax.random.uniform(jax.random.key(5), s_shape.shape, jnp.float32, 1e-3, 1e-2).astype(s_shape.dtype)
        wants: dict[int, Any] = {}
        for (m, module, plan), future in zip(jobs, futures):
            if log.left < 2:
                log(out_of_time=(shape, m))
                break
            name = module.__name__.rsplit(".", 1)[1]
            row = {"w": weights, "shape": shape, "m": m, "kernel": name, "config": dataclasses.asdict(plan.config)}
            x = jax.random.normal(jax.random.key(m), (m, k), jnp.bfloat16)
            try:
                log.beat(str(row))
                if m not in wants:
                    f = xla[m].result()
                    wants[m] = jax.block_until_ready(f(x, ws[0], scale).astype(jnp.float32))
                    times, kernels = kernel_times(lambda i, f=f, x=x: f(x, ws[i % buffers], scale), 4)
                    log(w=weights, shape=shape, m=m, kernel="xla", us=round(statistics.median(times[2:]), 2), n=kernels)
                    if m in dense:
                        wd = jax.random.normal(jax.random.key(1), (n, k), jnp.bfloat16)
                        f = dense[m].result()
                        times, _ = kernel_times(lambda i, f=f, x=x, wd=wd: f(x, wd), 5)
                        del wd
                        log(shape=shape, m=m, kernel="dense bf16", us=round(statistics.median(times[2:]), 2))
                f = future.result()
                y = f(x, ws[0], scale).astype(jnp.float32)
                error = float(jnp.linalg.norm(y - wants[m]) / jnp.linalg.norm(wants[m]))
                peak = float(jnp.abs(y - wants[m]).max() / jnp.abs(wants[m]).max())
                same = bool((y == f(x, ws[0], scale).astype(jnp.float32)).all())
                del y
                times, _ = kernel_times(lambda i, f=f, x=x: f(x, ws[i % buffers], scale), 16 if m <= 256 else 8)
                us = statistics.median(times[2:])
                note = {} if error < 6e-3 and peak < 0.02 and same else {"WRONG": True}
                if not note:
                    best[m].append((us, module, plan))
                log(**row, stages=plan.stages, us=round(us, 2), low=round(min(times[2:]), 2), err=round(error, 5),
                    peak=round(peak, 5), same=same, **note)  # fmt: skip
            except Exception as e:
                log(**row, failed=f"{type(e).__name__}: {str(e)[:300]}")
    chains(log, weights, shape, best, buffers, ws, scale)


def chains(log: Log, weights: str, shape: str, best: dict, buffers: int, ws: list, scale: jax.Array) -> None:
    """Wall clock per call of the best configuration at each M, with and without programmatic launch."""
    jobs = []
    for m, found in best.items():
        if not found:
            continue
        _, module, plan = min(found, key=lambda f: f[0])
        plans = [plan]
        if module is decode_sm90:
            plans.append(dataclasses.replace(plan, config=dataclasses.replace(plan.config, pdl=True)))
        jobs += [(m, module, p) for p in plans]
    log.rest()
    calls = 2 * buffers
    if log.left < 8:
        log(no_time_for_chains=shape)
        return

    def compile_chain(module: Any, plan: Any) -> Any:
        lowered = jax.jit(chain_of(module, plan, calls)).lower(*chain_shapes(plan, buffers))
        return lowered.compile()

    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        futures = [pool.submit(compile_chain, module, plan) for _, module, plan in jobs]
        concurrent.futures.wait(futures)
    with Turn(log):
        for (m, module, plan), future in zip(jobs, futures):
            if log.left < 2:
                log(out_of_time=("chain", shape, m))
                return
            row = {"w": weights, "shape": shape, "m": m, "chain": module.__name__.rsplit(".", 1)[1]}
            row["config"] = dataclasses.asdict(plan.config)
            try:
                log.beat(str(row))
                fn = future.result()
                x = jax.random.normal(jax.random.key(m), (m, plan.k), jnp.bfloat16)
                y = jnp.zeros((m, plan.n), jnp.bfloat16)
                for _ in range(3):
                    jax.block_until_ready(fn(x, scale, y, *ws))
                repeats = 40 if m <= 64 else (15 if m <= 256 else 2)
                walls = []
                for _ in range(5):
                    begin = time.perf_counter()
                    out = None
                    for _ in range(repeats):
                        out = fn(x, scale, y, *ws)
                    jax.block_until_ready(out)
                    walls.append((time.perf_counter() - begin) / (repeats * calls) * 1e6)
                log(**row, wall_us=round(statistics.median(walls), 2), low=round(min(walls), 2), calls=calls)
            except Exception as e:
                log(**row, failed=f"{type(e).__name__}: {str(e)[:300]}")


# --- without a GPU ---


def dry(names: list[str], ms: list[int], few: bool, every: int) -> None:
    """Compiles every `every`th candidate for an H200 and prints what ptxas made of it."""
    from tests.pallas_kernels.aot import compile_for_h200

    jobs = [
        (weights, shape, m, module, plan)
        for weights in names
        for shape, (n, k) in LLAMA_8B.items()
        for m in ms
        for module, plan in candidates(weights, m, n, k, few or weights != "u4")
    ]
    print(len(jobs), "candidates")
    for weights, shape, m, module, plan in jobs[::every]:
        start = time.time()
        try:
            c = compile_for_h200(lambda *a, module=module, plan=plan: module.matmul(plan, *a), *shapes_of(plan))
            said = f"registers {c.registers} spills {c.spill_bytes}"
        except Exception as e:
            said = f"FAILED {type(e).__name__}: {str(e)[:200]}"
        print(weights, shape, m, plan.config, plan.stages, said, f"{time.time() - start:.1f} s", flush=True)


# --- processes ---


def worker(args: argparse.Namespace) -> None:
    path = Path(args.out) / f"a16.{args.group}.jsonl" if args.out else None
    log = Log(path, args.start, args.budget, args.group)
    try:
        what, _, rest = args.group.partition("-")
        if what == "check":
            check(log, [rest])
        else:
            timed(log, what, rest, args.ms, args.few or what != "u4")
    except Exception:
        log(crash=traceback.format_exc()[-1500:])
    log(end=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--budget", type=float, default=110)
    parser.add_argument("--out")
    parser.add_argument("--only", default="check,u4,s8g,s8c")
    parser.add_argument("--m", default=",".join(map(str, MS)))
    parser.add_argument("--few", action="store_true")
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--group", help=argparse.SUPPRESS)
    parser.add_argument("--start", type=float, default=time.time(), help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.ms = [int(m) for m in args.m.split(",")]
    only = args.only.split(",")
    if args.dry:
        dry([w for w in only if w in WEIGHTS], args.ms, args.few, args.every)
        return
    if args.group:
        worker(args)
        return
    groups = [f"check-{name}" for name in ("decode_sm90", "wgmma_sm90") if "check" in only]
    groups += [f"{w}-{shape}" for w in only if w in WEIGHTS for shape in LLAMA_8B]
    env = os.environ | {
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", "") + " --xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false",
    }
    command = [sys.executable, "-m", "bench.kernel_a16", "--budget", str(args.budget), "--start", str(args.start)]
    command += ["--m", args.m] + (["--few"] if args.few else []) + (["--out", args.out] if args.out else [])
    folder = Path(args.out or "/tmp")
    processes = []
    for group in groups:
        with open(folder / f"a16.{group}.log", "w") as errors:
            processes.append(subprocess.Popen([*command, "--group", group], env=env, stdout=errors, stderr=errors))
    for group, process in zip(groups, processes):
        try:
            code: int | str = process.wait(max(1.0, args.budget + 5 - (time.time() - args.start)))
        except subprocess.TimeoutExpired:
            process.kill()
            code = "killed: out of time"
        if code:
            print(json.dumps({"group": group, "ended": code}))
    if args.out:
        lines = [p.read_text() for p in sorted(folder.glob("a16.*.jsonl"))]
        (folder / "a16.jsonl").write_text("".join(lines))
        summary("".join(lines).splitlines())


def summary(lines: list[str]) -> None:
    """Best time of each shape and M, their sums against the bars, and everything that went wrong."""
    best: dict[tuple[str, int], dict[str, float]] = {}
    for line in lines:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if any(word in row for word in ("WRONG", "failed", "crash", "HUNG", "checked")):
            print(line[:400])
        if row.get("kernel") in ("decode_sm90", "wgmma_sm90") and "us" in row and "WRONG" not in row:
            shapes = best.setdefault((row["w"], row["m"]), {})
            shapes[row["shape"]] = min(row["us"], shapes.get(row["shape"], 1e9))
    for (weights, m), shapes in sorted(best.items()):
        bar = dict(zip(MS, BARS.get(weights, ()))).get(m)
        print(weights, "M", m, shapes, "sum", round(sum(shapes.values()), 1), "bar", bar)


if __name__ == "__main__":
    main()
