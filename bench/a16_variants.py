"""Variants of the w4a16 and w8a16 kernels beside what the heuristics pick, on this GPU, in one run.

    python -m bench.a16_variants [--budget 330] [--out DIR] [--only check,u4,s8g:64] [--m 1,16,64,256,4096]

A process for every kind of weight and layer: it compiles all its variants in threads, waits until all processes have
compiled, then takes turns on the GPU (a file lock). `s8g:64+256` takes these M instead of --m's. Every variant is first
compared with XLA on the same weights (and with itself, twice), then timed: CUPTI kernel time, median of 16 calls,
weights rotated over 300 MB. The heuristic's config is timed first and last. A kernel that hangs ends its process (15
s); the parent starts the rest of the list again without it, so every case has a row: `us`, `WRONG`, `refused`, `failed`
or `HUNG`. Rows go to DIR/a16_variants.<group>.jsonl as they come and to
DIR/a16_variants.json in the end, with the best of each case and the
sums beside the bars; DIR/clocks.csv has the GPU's clock and power meanwhile.

Without a GPU: --dry compiles every variant for an H200 (registers and spills to DIR); --reference goes the whole way
with XLA in the kernels' place and wall clock for CUPTI (--shapes quick: one small layer).
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import json
import math
import os
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.kernel_a16 import (
    BARS,
    MS,
    WEIGHTS,
    Log,
    Turn,
    distinct,
    kernel_times,
    op_of,
    plan_of,
    random_bytes,
    reference,
    shapes_of,
)
from bench.kernel_a16 import packed as packed_case
from pallas_kernels.a16 import decode_config, decode_sm90, held_config, held_sm90, wgmma_config, wgmma_sm90
from pallas_kernels.a16.cases import CASES, LLAMA_8B, make, worst
from pallas_kernels.a16.problem import Problem
from pallas_kernels.a16.stored import KINDS

SHAPES = {"8b": LLAMA_8B, "quick": {"small": (1024, 1024)}}
CHECKS = ("held", "wgmma", "groups")
RESTARTS = 3


def legal(plan: Any) -> bool:
    try:
        plan.check()
    except NotImplementedError:
        return False
    return True


# --- what is tried ---


def held_configs(problem: Problem) -> list[Any]:
    """All of K over 16 or 8 warps (14 or 7 of a K that 7 divides), in as few parts as the registers allow."""
    found = []
    for warps in (16, 8, 14, 7):
        for parts in (1, 2, 4):
            for pieces in (1, 2, 7) if warps in (14, 7) else (1, 2, 4):
                found += [held_sm90.Config(warps, pieces, parts, lift=lift) for lift in (False, True)]
    plans = [held_sm90.Plan(**vars(problem), config=c) for c in found]
    plans = [p for p in plans if legal(p) and p.stages > p.config.pieces and p.stage_bytes <= 40 << 10]
    fewest = min((p.config.parts for p in plans), default=1)
    plans = [p for p in plans if p.config.parts in (fewest, 2 * fewest)]
    return [c.config for c in sorted(plans, key=lambda p: (p.config.parts, p.config.pieces, -p.config.warps))][:10]


def group_configs(m: int) -> list[Any]:
    """Warpgroups along K: a layer of few rows fills the multiprocessors with fewer parts of K, or none, whose sums XLA
    would add in a kernel of its own (some 2 us of a down projection's 14 at M = 16)."""
    m_tile = min(64, -(-m // 16) * 16)
    shapes = ((4, 256, 4), (4, 256, 2), (4, 128, 2), (2, 256, 2), (2, 128, 2))
    return [
        wgmma_sm90.Config(warpgroups, m_tile, k_step, split, k_groups=k_groups)
        for warpgroups, k_step, k_groups in shapes
        for split in (1, 2)
    ]


def fills(plan: Any) -> bool:
    """Whether most multiprocessors have a block."""
    return plan.clusters * plan.config.split >= 0.7 * plan.sms


def variants(weights: str, m: int, n: int, k: int) -> list[tuple[Any, Any]]:
    """(module, plan): the heuristic's choice, then what is to beat it."""
    decode, wgmma = plan_of(decode_sm90, weights, m, n, k), plan_of(wgmma_sm90, weights, m, n, k)
    problem = Problem(**{f.name: getattr(wgmma, f.name) for f in dataclasses.fields(Problem)})
    decodes = decode_config.search_space(decode) if m <= 16 else []
    wgmmas = wgmma_config.search_space(wgmma)
    out: list[tuple[Any, Any]] = []
    small = decodes and (m <= 8 or decode_config.best_estimate(decode) <= wgmma_config.best_estimate(wgmma))
    held = held_sm90.Plan(**vars(problem), config=held_sm90.Config())
    try:
        held_config.check_faster(held)
        out.append((held_sm90, held_config.heuristic(held)))
    except NotImplementedError:
        out.append((decode_sm90, decodes[0]) if small else (wgmma_sm90, wgmmas[0]))
    if m <= 16:
        out += [(held_sm90, c) for c in held_configs(problem)]
        out += [(decode_sm90, c) for c in decodes if c.split == 1 and c.unit > 1][:2]
    if m >= 16:
        families = distinct(wgmmas, lambda c: (c.warpgroups, c.m_tile, c.k_step, c.split, c.parts), 1, 99)
        several = {16: 4, 64: 8, 256: 7, 4096: 3}.get(m, 4)
        picked = [*families[:several], *distinct(families, lambda c: (c.warpgroups, c.m_tile), 1, several)]
        if m >= 256:  # twice the sums a warpgroup: half the conversions
            picked += [wgmma_sm90.Config(2, 256, 64), wgmma_sm90.Config(2, 256, 128), wgmma_sm90.Config(4, 128, 64)]
            picked += [wgmma_sm90.Config(3, 128, 64), wgmma_sm90.Config(4, 128, 128)]
        picked = list(dict.fromkeys(picked))
        out += [(wgmma_sm90, c) for c in picked]
        if m <= 64:
            plans_of = [(c, dataclasses.replace(wgmma, config=c)) for c in group_configs(m)]
            out += [(wgmma_sm90, c) for c, plan in plans_of if legal(plan) and fills(plan)]
    if m == 16:
        out += [(decode_sm90, c) for c in decodes if c.split == 2 and c.unit > 1][:3]
    plans = {decode_sm90: decode, wgmma_sm90: wgmma, held_sm90: plan_of(held_sm90, weights, m, n, k)}
    found = [(module, dataclasses.replace(plans[module], config=config)) for module, config in dict.fromkeys(out)]
    return [(module, plan) for module, plan in found if legal(plan)]


def name_of(module: Any) -> str:
    return module.__name__.rsplit(".", 1)[1]


def key_of(weights: str, shape: str, m: int, module: Any, plan: Any) -> str:
    default = type(plan.config)()
    told = {k: v for k, v in dataclasses.asdict(plan.config).items() if v != getattr(default, k)}
    return f"{weights} {shape} {m} {name_of(module)} {json.dumps(told)}"


# --- small cases: tails, zero points, types, NaN ---


def variant_of(what: str, problem: Problem) -> tuple[Any, Any]:
    """(module, plan) of a small case. Raises NotImplementedError where the variant does not take it."""
    if what == "held":
        problem = dataclasses.replace(problem, sms=6)  # several tiles a block
        for config in held_configs(problem):
            return held_sm90, held_sm90.Plan(**vars(problem), config=config)
        raise NotImplementedError("no held config")
    plan = wgmma_sm90.Plan(**vars(problem), config=wgmma_sm90.Config())
    for config in group_configs(problem.m)[::-1] if what == "groups" else wgmma_config.search_space(plan):
        if legal(found := dataclasses.replace(plan, config=config)):
            return wgmma_sm90, found
    raise NotImplementedError(f"no {what} config")


def compiled_case(what: str, case: Any, as_xla: bool) -> tuple[Any, Callable[[], Any]]:
    """Data of a case and a call of the variant on it."""
    from pallas_kernels.a16 import run

    data = make(case)
    (x, q, s, z), kwargs = packed_case(case, data)
    op, four = ("w4a16", True) if case.qtype == "uint4" else ("w8a16", False)

    def call(x: Any, q: Any, s: Any, z: Any, offset: Any, perm: Any) -> Any:
        p = run.prepare(op, x, q, s, z, offset, perm, kwargs["group_size"], kwargs["layout"], four)
        module, plan = variant_of(what, p.problem)
        if as_xla:
            return op_of(case)[0](x, q, s, z, **({"offset": offset} if four else {}), perm=perm, **static)
        return module.matmul(plan, p.x, *p.arrays)[:, : p.n]

    static = {"group_size": kwargs["group_size"], "layout": kwargs["layout"], "implementation": "xla"}
    args = (x, q, s, z, kwargs.get("offset"), kwargs["perm"])
    fn = jax.jit(call).lower(*args).compile()
    return data, lambda: np.asarray(fn(*args).astype(jnp.float32))


def check(log: Log, what: str, done: set[str], ready: Callable[[], None], as_xla: bool) -> None:
    cases = [c for c in CASES if f"check {what} {c}" not in done and c.m and (what != "held" or c.m <= 16)]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(compiled_case, what, case, as_xla) for case in cases]
        concurrent.futures.wait(futures)
    ready()
    with Turn(log):
        for case, future in zip(cases, futures):
            key = f"check {what} {case}"
            log.beat(key)
            if log.left < 2:
                return log(key=key, failed="out of time")
            try:
                data, call = future.result()
                got = call()
                ratio, same = worst(case, data, got), bool(np.array_equal(got, call(), equal_nan=True))
                log(key=key, ratio=round(ratio, 4), same=same, **({} if ratio <= 1 and same else {"WRONG": True}))
            except NotImplementedError as error:
                log(key=key, refused=str(error)[:160])
            except Exception as error:
                log(key=key, failed=f"{type(error).__name__}: {str(error)[:300]}")


# --- speed ---


def build(weights: str, module: Any, plan: Any, as_xla: bool) -> Any:
    fn = reference(weights, plan) if as_xla else lambda *a: module.matmul(plan, *a)
    return jax.jit(fn).lower(*shapes_of(plan)).compile()


def timed(log: Log, weights: str, shape: str, args: Any, done: set[str], ready: Callable[[], None]) -> None:
    n, k = SHAPES[args.shapes][shape]
    jobs = [(m, module, plan) for m in args.ms_of[weights] for module, plan in variants(weights, m, n, k)]
    keys = [key_of(weights, shape, *job) for job in jobs]
    firsts = {job[0]: i for i, job in reversed(list(enumerate(jobs)))}
    todo = [i for i in range(len(jobs)) if keys[i] not in done or i in firsts.values()]
    buffers = max(2, math.ceil(300e6 / (n * k * KINDS[WEIGHTS[weights][0]].words / 2)))
    refer = lambda p: jax.jit(reference(weights, p)).lower(*shapes_of(p)).compile()  # noqa: E731
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        futures = {i: pool.submit(build, weights, *jobs[i][1:], args.reference) for i in todo}
        xla = {m: pool.submit(refer, jobs[i][2]) for m, i in firsts.items()}
        concurrent.futures.wait([*futures.values(), *xla.values()])
    log(compiled=len(todo))
    ready()
    with Turn(log):
        log.beat("weights")
        _, w_shape, s_shape = shapes_of(jobs[0][2])
        ws = [random_bytes(w_shape, i) for i in range(buffers)]
        scale = jax.random.uniform(jax.random.key(5), s_shape.shape, jnp.float32, 1e-3, 1e-2).astype(s_shape.dtype)
        last = {m: max(i for i in todo if jobs[i][0] == m) for m in {jobs[i][0] for i in todo}}
        want: Any = None
        for i in todo:
            m, module, plan = jobs[i]
            base = i == firsts[m]
            x = jax.random.normal(jax.random.key(m), (m, k), jnp.bfloat16)
            row = {"key": keys[i], "w": weights, "shape": shape, "m": m, "kernel": name_of(module), "base": base}
            row |= {"config": dataclasses.asdict(plan.config), "stages": plan.stages}
            log.beat(keys[i])
            if log.left < 2:
                log(**row, failed="out of time")
                continue
            try:
                if base:
                    want = jax.block_until_ready(xla[m].result()(x, ws[0], scale).astype(jnp.float32))
                row |= one(futures[i].result(), x, ws, scale, want, m)
            except Exception as error:
                row["failed"] = f"{type(error).__name__}: {str(error)[:300]}"
            log(**row)
            if i == last[m] and m in firsts:  # the heuristic's again, for the spread
                try:
                    again = one(futures[firsts[m]].result(), x, ws, scale, want, m)
                    log(**{**row, "key": keys[firsts[m]] + " again", "base": True, "config": {}, "again": True} | again)
                except Exception as error:
                    log(key=keys[firsts[m]] + " again", failed=str(error)[:300])


def one(fn: Any, x: Any, ws: list[Any], scale: Any, want: Any, m: int) -> dict[str, Any]:
    """Checked, then timed."""
    y = fn(x, ws[0], scale).astype(jnp.float32)
    error = float(jnp.linalg.norm(y - want) / jnp.linalg.norm(want))
    peak = float(jnp.abs(y - want).max() / jnp.abs(want).max())
    same = all(bool((y == fn(x, ws[0], scale).astype(jnp.float32)).all()) for _ in range(2))
    del y
    out = {"err": round(error, 5), "peak": round(peak, 5), "same": same}
    if not (error < 6e-3 and peak < 0.02 and same):
        return out | {"WRONG": True}
    times, kernels = kernel_times(lambda i: fn(x, ws[i % len(ws)], scale), 18)
    if not kernels:
        began = time.perf_counter()
        jax.block_until_ready([fn(x, w, scale) for w in ws])
        return out | {"us": round((time.perf_counter() - began) / len(ws) * 1e6, 2), "wall": True}
    return out | {"us": round(statistics.median(times[2:]), 2), "low": round(min(times[2:]), 2), "kernels": kernels}


# --- without a GPU ---


def dry(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Compiles every variant for an H200. A row says registers and spills, or what failed."""
    from tests.pallas_kernels.aot import compile_for_h200
    from tests.pallas_kernels.test_a16 import overwritten_operands

    rows = []
    for weights, shape, m, module, plan in every(args):
        row: dict[str, Any] = {"key": key_of(weights, shape, m, module, plan), "stages": plan.stages}
        try:
            c = compile_for_h200(lambda *a, module=module, plan=plan: module.matmul(plan, *a), *shapes_of(plan))
            row |= {"registers": c.registers, "spills": c.spill_bytes}
            if "serialized" in c.report:
                row["failed"] = "ptxas serialized the products"
            if bad := overwritten_operands(c.sass):
                row["failed"] = f"writes what a product may still read: {bad[:2]}"
        except Exception as error:
            row["failed"] = f"{type(error).__name__}: {str(error)[:300]}"
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def every(args: argparse.Namespace) -> Iterator[tuple[str, str, int, Any, Any]]:
    cases = [
        (weights, shape, m, module, plan)
        for weights in args.only
        if weights in WEIGHTS
        for shape, (n, k) in SHAPES[args.shapes].items()
        for m in args.ms_of[weights]
        for module, plan in variants(weights, m, n, k)
    ]
    yield from cases[:: args.every]


# --- processes ---


def rows_of(path: Path) -> list[dict[str, Any]]:
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def worker(args: argparse.Namespace) -> None:
    folder = Path(args.out)
    path = folder / f"a16_variants.{args.group}.jsonl"
    before = rows_of(path)
    done = {row["key"] for row in before if "key" in row} | {row["HUNG"] for row in before if "HUNG" in row}
    log = Log(None, args.start, args.budget, args.group)
    log.file = path.open("a")

    def ready() -> None:
        """All compile before any is timed: a busy machine would stretch the gaps between kernels."""
        (folder / f"ready.{args.group}").touch()
        while not done and time.time() < args.start + args.compile_s:
            if all((folder / f"ready.{group}").exists() for group in args.groups.split(",")):
                return
            time.sleep(0.2)

    what, _, rest = args.group.partition("-")
    try:
        if what == "check":
            check(log, rest, done, ready, args.reference)
        else:
            timed(log, what, rest, args, done, ready)
    except Exception:
        log(crash=traceback.format_exc()[-1500:])
    log(end=True)


def start(args: argparse.Namespace, group: str, groups: list[str]) -> subprocess.Popen[bytes]:
    env = os.environ | {
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", "") + " --xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false",
    }
    command = [sys.executable, "-m", "bench.a16_variants", "--group", group, "--groups", ",".join(groups)]
    command += ["--budget", str(args.budget), "--start", str(args.start), "--compile-s", str(args.compile_s)]
    command += ["--only", ",".join(args.only_given), "--m", args.m, "--out", args.out, "--shapes", args.shapes]
    command += ["--reference"] * args.reference
    with (Path(args.out) / f"a16_variants.{group}.log").open("ab") as log:
        return subprocess.Popen(command, env=env, stdout=log, stderr=log)


def run_all(args: argparse.Namespace) -> list[dict[str, Any]]:
    from bench.variant_workers import watch_clocks

    folder = Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    for old in [*folder.glob("ready.*"), *folder.glob("a16_variants.*")]:
        old.unlink()
    groups = [f"check-{what}" for what in CHECKS if "check" in args.only]
    groups += [f"{w}-{shape}" for shape in SHAPES[args.shapes] for w in args.only if w in WEIGHTS]
    clocks = watch_clocks(folder / "clocks.csv", args.start)
    running = {group: start(args, group, groups) for group in groups}
    restarts = dict.fromkeys(groups, 0)
    ended: list[dict[str, Any]] = []
    while running:
        for group, process in list(running.items()):
            code: int | str | None = process.poll()
            if code is None and time.time() > args.start + args.budget + 10:
                process.kill()
                process.wait()
                code = "killed: out of time"
            if code is None:
                continue
            del running[group]
            if code and code != "killed: out of time" and restarts[group] < RESTARTS:
                restarts[group] += 1
                running[group] = start(args, group, groups)
            elif code:
                ended.append({"group": group, "ended": code})
        time.sleep(0.2)
    if clocks is not None:
        clocks.kill()
    return [row for group in groups for row in rows_of(folder / f"a16_variants.{group}.jsonl")] + ended


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per kind, M and layer the heuristic's time and the best; their sums beside the bars."""
    out: list[dict[str, Any]] = []
    timings = [r for r in rows if "us" in r and "WRONG" not in r]
    for w, m in sorted({(r["w"], r["m"]) for r in timings}):
        found: dict[str, dict[str, Any]] = {}
        for shape in dict.fromkeys(r["shape"] for r in timings if (r["w"], r["m"]) == (w, m)):
            mine = [r for r in timings if (r["w"], r["m"], r["shape"]) == (w, m, shape)]
            first = min(mine, key=lambda r: r["us"])
            bases = [r["us"] for r in mine if r.get("base")]
            found[shape] = {"base": bases, "best": first["us"], "key": first["key"]}
        bar = dict(zip(MS, BARS.get(w, ()))).get(m)
        base = round(sum(min(f["base"], default=0.0) for f in found.values()), 1)
        best = round(sum(f["best"] for f in found.values()), 1)
        out.append({"w": w, "m": m, "layers": found, "base": base, "best": best, "bar": bar})
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=330, help="seconds for all")
    parser.add_argument("--compile-s", type=float, default=120, help="seconds after which timing starts in any case")
    parser.add_argument("--out", default=os.environ.get("OUT", "/tmp/a16_variants"))
    parser.add_argument("--only", default="check,u4,s8g")
    parser.add_argument("--m", default=",".join(map(str, MS)))
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--reference", action="store_true")
    parser.add_argument("--every", type=int, default=1, help="of --dry: every so manyth variant")
    parser.add_argument("--shapes", default="8b", choices=sorted(SHAPES))
    for hidden in ("--group", "--groups"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--start", type=float, default=time.time(), help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.only_given = args.only.split(",")
    told = {name: ms for name, _, ms in (given.partition(":") for given in args.only_given)}
    args.only = list(told)
    args.ms_of = {name: [int(m) for m in (ms.split("+") if ms else args.m.split(","))] for name, ms in told.items()}
    if args.group:
        worker(args)
        return
    rows = dry(args) if args.dry else run_all(args)
    bad = [r for r in rows if any(w in r for w in ("WRONG", "failed", "crash", "HUNG", "ended"))]
    for row in bad:
        print("BAD", json.dumps(row)[:400])
    result: dict[str, Any] = {"summary": summary(rows), "bad": len(bad), "rows": rows}
    if not args.dry:
        from bench.record import frame

        result = {**frame(), **result}
    Path(args.out).mkdir(parents=True, exist_ok=True)
    name = "a16_variants.dry.json" if args.dry else "a16_variants.json"
    (Path(args.out) / name).write_text(json.dumps(result, indent=1))
    for line in result["summary"]:
        print(json.dumps(line))
    print(len(rows), "rows,", len(bad), "bad")


if __name__ == "__main__":
    main()
