"""scaled_matmul and quantize_rows on this GPU: correctness first, then microseconds per call.

    python -m bench.kernel_scaled [--out DIR] [--budget SECONDS] [--only WORKER,...] [--ms M,...] [--sweep] [--variants]
                                  [--dry]

A call's time is a jitted chain of calls, each with a weight (an input) of its own so that it comes from HBM and each
waiting for the one before, replayed by XLA from a command buffer: wall clock / calls. Beside it the sum of CUPTI kernel
durations. Up to M = 64 the inputs of the quantization ops are those that the last op left in L2, as in a server.

One process per shape and mode compiles on the CPU at the same time as the others. They take the GPU in turns, first for
the heuristic's choice at every M, then, with `--sweep`, for the alternatives; one whose kernel hangs ends after 12 s,
no other. The worker "mlp" times a decoder's MLP (norm, gate_up, SiLU, down) as a chain; "mlp-stream" does so without
command buffers, where `early_launch` can work. Rows of JSON go to DIR/scaled.jsonl as they come, and in the end
to DIR/scaled.json (DIR/scaled_variants.json). `--dry` compiles everything for an H200 where there is no GPU, and runs
nothing.

`--variants` times the structures of bench/kernel_variants.py instead of `--sweep`'s, the heuristic's choice once more
behind them, and at M = 4096 also on zeros and on random bits (what the power limit costs); DIR/clocks.csv has the GPU's
clock and power meanwhile (seconds since the start, MHz, W, reasons). It adds the worker "prefill" and, where torch is
installed, "torch" (_scaled_mm, row-wise), and leaves out int8 and the MLP. With `--ms` no zeros and bits.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench import record, variant_workers
from bench.kernel_mlp import mlp_worker
from bench.kernel_quantize import quant_worker
from bench.kernel_scaled_matmul import MS, cases_worker, matmul_worker
from bench.kernel_session import Session, compiler

MODES = ("row", "block", "int8")
SHAPES = ("qkv", "o", "gate_up", "down")
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
            chosen = {r["shape"]: r for r in best if r.get("heuristic")}
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
    parser.add_argument("--ms", help="of the products: rows of x; default: all")
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
        command += ["--variants"] * args.variants + ["--ms", args.ms] * bool(args.ms)
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
    if not args.dry:
        print(record.write("scaled_variants" if args.variants else "scaled", rows, args.out))


if __name__ == "__main__":
    main()
