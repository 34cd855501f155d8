"""Cycles of fp8 matmuls with block scales by Nsight Compute, which holds the clock still, and their time without it.

    python -m bench.kernel_cycles [--m 4096] [--shapes gate_up,down] [--peers DIR] [--quick] [--out DIR]

At M = 4096 an H200 runs into its power limit, and a kernel's time says as much of the runs before it as of the kernel.
A row per shape and config (and DeepGEMM's, where --peers has it): `us`, the median duration of single launches by CUPTI
with the device idle between two; `cycles`, what ncu counts at its base clock, and what part of them the tensor cores
were busy. All of ncu's numbers are in OUT/kernel_cycles_ncu*.csv. Results are compared with the first config's.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import csv
import functools
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench.bars import SHAPES
from bench.peer_tasks import Peers

SECTIONS = ("SpeedOfLight", "WarpStateStats", "ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis_Tables")
CYCLES = "sm__cycles_elapsed.max"
TENSOR = "sm__inst_executed_pipe_tensor"  # a prefix: its ending differs between devices


def configs(m: int, n: int, k: int) -> dict[str, Any]:
    from pallas_kernels.scaled_matmul.config import Config, fill_stages, heuristic

    rows256: dict[str, Any] = dict(wgs_m=2, m_groups=2, epilogue_n=64, out_slots=2, one_commit=True, overwrite=True)
    share_x: dict[str, Any] = dict(cluster=2, cluster_axis="n")
    found = {
        "heuristic": heuristic(m, n, k, block=True),
        "256 rows": Config(128, **rows256),
        "256 rows, pairs share w": Config(128, cluster=2, stripe=4, **rows256),
        "256 rows, pairs share x": Config(128, stripe=4, **share_x, **rows256),
    }
    return {name: fill_stages(config, m, k, 2, True) for name, config in found.items()}


def programs(args: argparse.Namespace) -> list[tuple[str, str, Any, Any]]:
    """(shape, config's name, executable, its arguments)"""
    import jax
    import jax.numpy as jnp

    from pallas_kernels.scaled_matmul import mosaic_sm90, reference

    fp8 = jnp.float8_e4m3fn
    shapes = SHAPES["tiny"] if args.quick else {s: SHAPES["8b"][s] for s in args.shapes.split(",")}
    found = []
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for shape, (n, k) in shapes.items():
            keys = jax.random.split(jax.random.key(0), 4)
            x, w = (
                (jax.random.normal(key, size) * 64).astype(fp8)  # fp8 ends at 448
                for key, size in zip(keys, ((args.m, k), (n, k)))
            )
            xs = jax.random.uniform(keys[2], (args.m, k // 128)) + 0.5
            ws = jax.random.uniform(keys[3], (-(-n // 128), k // 128)) + 0.5
            for name, config in configs(args.m, n, k).items():
                kernel = functools.partial(mosaic_sm90.scaled_matmul, config=config)
                op = jax.jit(reference.scaled_matmul if args.quick else kernel)
                found.append((shape, name, pool.submit(op.lower(x, w, xs, ws).compile), (x, w, xs, ws)))
    return [(shape, name, future.result(), arguments) for shape, name, future, arguments in found]


def once(args: argparse.Namespace) -> None:
    """What ncu watches: every program once, in order."""
    import jax

    for _, _, program, arguments in programs(args):
        jax.block_until_ready(program(*arguments))


def timed(args: argparse.Namespace) -> list[dict[str, Any]]:
    import jax
    import numpy as np

    from bench.timing import kernel_durations

    rows: list[dict[str, Any]] = []
    first: dict[str, Any] = {}
    for shape, name, program, arguments in programs(args):
        got = np.asarray(program(*arguments)[: 4096 * 16 : 16, :512], np.float32)
        want = first.setdefault(shape, got)
        error = float(np.linalg.norm(got - want) / np.linalg.norm(want))
        call = functools.partial(program, *arguments)
        for _ in range(3):
            jax.block_until_ready(call())
        each = [sum(us for _, us in kernel_durations(call)) for _ in range(args.launches)]
        row = {"shape": shape, "config": name, "m": args.m, "us": round(statistics.median(each), 2)}
        rows.append(row | {"least_us": round(min(each), 2), "differs": round(error, 6)})
        print(rows[-1], flush=True)
    return rows


def watched(command: list[str], path: Path, launches: int, kernel: str, env: dict[str, str]) -> list[dict[str, str]]:
    """ncu's rows, a launch each; none without ncu."""
    ncu = shutil.which("ncu") or next(map(str, Path("/usr/local").glob("cuda*/bin/ncu")), None)
    if ncu is None:
        return []
    options = [arg for section in SECTIONS for arg in ("--section", section)]
    options += ["--metrics", f"{CYCLES},sm__cycles_active.avg"]
    options += ["--csv", "--page", "raw", "--kernel-name", f"regex:{kernel}", "--launch-count", str(launches)]
    try:
        done = subprocess.run([ncu, *options, *command], capture_output=True, text=True, env=env, timeout=150)
        text = done.stdout
    except subprocess.TimeoutExpired as error:
        text = error.stdout.decode() if isinstance(error.stdout, bytes) else str(error.stdout or "")
    lines = [line for line in text.splitlines() if line.startswith('"')]
    path.write_text("\n".join(lines) + "\n" + ("" if lines else text[-3000:]))
    rows = list(csv.DictReader(io.StringIO("\n".join(lines))))
    return rows[1:]  # behind the units


def deepgemm(args: argparse.Namespace, out: Path, env: dict[str, str]) -> list[dict[str, Any]]:
    """Its rows: timed by graph replay (the script's own way), then counted."""
    peers, rows = Peers(args.peers), []
    peers.unpack()
    env = env | peers.env
    for shape in args.shapes.split(","):
        command = peers.command(sys.executable, "deepgemm", {shape: SHAPES["8b"][shape]}, [args.m])
        said = subprocess.run(command, capture_output=True, text=True, env=env, timeout=90).stdout
        us = [json.loads(line)["us"] for line in said.splitlines() if '"us"' in line]
        row = {"shape": shape, "config": "DeepGEMM", "m": args.m, "us": us[0] if us else None}
        for counted in watched(command, out / f"kernel_cycles_ncu_{shape}.csv", 1, "sm90_fp8_gemm", env):
            add(row, counted)
        rows.append(row)
    return rows


def add(row: dict[str, Any], counted: dict[str, str]) -> None:
    row["cycles"] = int(float(counted[CYCLES].replace(",", "")))
    row |= {key: value for key, value in counted.items() if key.startswith(TENSOR) and "pct" in key}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--m", type=int, default=4096)
    parser.add_argument("--shapes", default="gate_up,down")
    parser.add_argument("--launches", type=int, default=15)
    parser.add_argument("--peers", type=Path, help="folder with DeepGEMM, as bench.kernels takes")
    parser.add_argument("--quick", action="store_true", help="tiny, on a CPU: checks the script")
    parser.add_argument("--out", default="bench/results")
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.once:
        return once(args)
    out = Path(args.out)
    env = {**os.environ, "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_enable_command_buffer="}
    env["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # ncu keeps a copy of all that is allocated
    env.setdefault("JAX_COMPILATION_CACHE_DIR", "/tmp/kernel_cycles")
    os.environ.update(env, JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0")
    from bench import record

    if args.quick:
        args.m, args.launches = 256, 1
    rows = timed(args)
    record.write("kernel_cycles", rows, args.out)
    again = [sys.executable, "-m", "bench.kernel_cycles", "--once", "--m", str(args.m), "--shapes", args.shapes]
    for row, counted in zip(rows, watched(again, out / "kernel_cycles_ncu.csv", len(rows), "scaled_matmul", env)):
        add(row, counted)
    record.write("kernel_cycles", rows, args.out)
    if args.peers:
        rows += deepgemm(args, out, env)
    for row in rows:
        print(row)
    print(record.write("kernel_cycles", rows, args.out))


if __name__ == "__main__":
    main()
