"""What handing a decode step to the GPU costs the host, and what could make it less.

    python -m bench.launch_cost [--scheme w4a16] [--points 1x1024,64x1024] [--variants as is,log,...] [--budget SECONDS]
                                [--quick] [--out DIR]

A captured step of some 300 kernels takes 2.2 to 2.8 ms of a core to launch where 0.3 to 0.9 would do (KERNELS.md's
proxies). XLA updates a command buffer before a launch wherever a buffer's address has changed since the last one, and a
Mosaic call's update captures it anew, or exchanges a child graph. Every call uses the one temporary buffer of its
program, so that all of them are updated when BFC gives that another address. The other suspect: XLA calls the FFI
handlers "prepare" and "initialize" of each Mosaic call on each execution, captured or not, and they have something to
do for collectives only; what the log has for its updates tells the two apart. Steps in a loop of one program (K) share
either cost. A process per variant:

    as is           the engine as it is served
    log             the same with XLA's own account of a few launches: what was updated, what was skipped, how long
    no places       without the places for small buffers that the engine holds (`jqserve/engine/places`)
    separate color  temporary buffers come from an allocator of their own, at the same address each time
    skip temp       temporary buffers are mapped to fixed addresses (takes XLA's VMM allocator)
    skip profiled   the same, and whatever else had a stable address in the first launches
    exclusive lock  nobody else may launch meanwhile, by which XLA spares itself some bookkeeping
    trace cache     64 captures are kept for each Mosaic call, where 16 are usual
    off             no command buffers

Rows: scheme, batch, context, step_ms, and dispatch_ms, what the thread that launches was busy for, a step.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.decode import begin, end, load, points_of, step

if TYPE_CHECKING:
    from jqserve.engine.engine import EngineCore

#: variant -> XLA_FLAGS
VARIANTS = {
    "as is": "",
    "log": "",
    "no places": "",
    "separate color": "--xla_gpu_temp_buffer_use_separate_color=true",
    "skip temp": "--xla_gpu_command_buffer_update_mode=SKIP_TEMP",
    "skip profiled": "--xla_gpu_command_buffer_update_mode=SKIP_PROFILED",
    "exclusive lock": "--xla_gpu_require_exclusive_lock=true",
    "trace cache": "--xla_cmd_buffer_trace_cache_size=64",
    "off": "--xla_gpu_enable_command_buffer=",
}
LOG = {
    "TF_CPP_MIN_LOG_LEVEL": "0",
    "TF_CPP_VMODULE": "command_buffer_thunk=3,command_executor=1,command_buffer_cmd=1,traced_command_buffer=6",
}
WINDOWS = 5


def measure(engine: EngineCore, batch: int, context: int, steps: int) -> dict[str, Any]:
    begin(engine, batch, context, 16 + (WINDOWS + 1) * steps)
    for _ in range(8):
        step(engine)
    walls, dispatch = [], []
    for _ in range(WINDOWS):
        before, began = engine.runner.dispatcher.seconds, time.perf_counter()
        for _ in range(steps):
            step(engine)
        walls.append((time.perf_counter() - began) / steps)
        dispatch.append((engine.runner.dispatcher.seconds - before) / steps)
    end(engine, batch)
    return {
        "step_ms": round(statistics.median(walls) * 1e3, 4),
        "dispatch_ms": round(statistics.median(dispatch) * 1e3, 4),
    }


def child(args: argparse.Namespace) -> None:
    """One variant, its rows on stdout."""
    points = points_of(args.points)
    steps = 4 if args.variant == "log" or args.quick else 40
    if args.variant == "no places":
        from jqserve.engine import load as loading

        loading.hold_places = lambda device: []
    engine, facts = load(args.scheme, points, [1], 32 + (WINDOWS + 1) * steps, args)
    for batch, context in points:
        row = {"variant": args.variant, "scheme": args.scheme, "batch": batch, "context": context}
        print("ROW " + json.dumps(row | measure(engine, batch, context, steps)), flush=True)
        print(f"{args.variant}: {batch} x {context} measured", file=sys.stderr, flush=True)
    print("ROW " + json.dumps({"variant": args.variant, **facts, "places": len(engine.runner.places)}), flush=True)


def told(log: str) -> dict[str, Any]:
    """What XLA says of its updates: the last launches of the log, which are of a warm engine."""
    updates = re.findall(r"executions since last update; num_commands=(\d+); updated_allocs=(\d+)", log)[-8:]
    skipped = re.findall(r"Updated (\d+) commands in (\d+) \S+ \(skipped (\d+) command updates\)", log)[-8:]
    traces = collections.Counter(re.findall(r"Command buffer trace cache (hit|create|does replacement)", log))
    return {"updates": updates, "commands_us_skipped": skipped, "traces": dict(traces)}


def run(variant: str, args: argparse.Namespace, limit: float) -> list[dict[str, Any]]:
    flags = " ".join(filter(None, (os.environ.get("XLA_FLAGS"), VARIANTS[variant])))
    environment = {**os.environ, "XLA_FLAGS": flags, **(LOG if variant == "log" else {})}
    command = [sys.executable, "-m", "bench.launch_cost", "--variant", variant, "--scheme", args.scheme]
    command += ["--points", args.points, *(["--quick"] if args.quick else []), "--kv-dtype", args.kv_dtype]
    for flag, value in (("--page-size", args.page_size), ("--context-length", args.context_length)):
        command += [flag, str(value)] if value else []
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired as error:
        return [{"variant": variant, "failed": f"took longer than {limit:.0f} s", "said": str(error.stderr)[-500:]}]
    rows = [json.loads(line[4:]) for line in done.stdout.splitlines() if line.startswith("ROW ")]
    if variant == "log":
        rows.append({"variant": variant, **told(done.stderr)})
        if args.out:
            (Path(args.out) / "launch.log").write_text(done.stderr[-2_000_000:])
    if done.returncode:
        rows.append({"variant": variant, "failed": f"exit {done.returncode}", "said": done.stderr[-1500:]})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scheme", default="w4a16", help="a key of bench.llama8b.SCHEMES")
    parser.add_argument("--points", default="1x1024,64x1024")
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--budget", type=float, default=400, help="seconds; no variant is begun later")
    parser.add_argument("--kv-dtype", default="auto")
    parser.add_argument("--page-size", type=int)
    parser.add_argument("--context-length", type=int)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out")
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.quick and args.points == parser.get_default("points"):
        args.points = "2x40"
    if args.variant:
        return child(args)
    if unknown := set(args.variants.split(",")) - set(VARIANTS):
        parser.error(f"unknown variants {', '.join(sorted(unknown))}; known: {', '.join(VARIANTS)}")
    start = time.monotonic()
    rows: list[dict[str, Any]] = []
    for variant in args.variants.split(","):
        left = args.budget - (time.monotonic() - start)
        if left < 20:
            break
        for row in run(variant, args, min(left, 120)):
            rows.append(row)
            print(json.dumps(row), flush=True)
    from bench.record import write

    print(write("launch_cost", rows, args.out, scheme=args.scheme))
    return None


if __name__ == "__main__":
    main()
