"""What handing programs over costs the host when they take turns: a prompt's step, its draw and a decode step.

    python -m bench.launch_trace [--scheme fp8] [--prompt 1000] [--variants as is,no places] [--quick] [--out DIR]

An engine serves prompts one after the other, two tokens each, so that no program follows itself; XLA's own host events
(jax.profiler without device events, which would turn command buffers off) tell what became of the time. A process per
variant; "no places" is an engine without `jqserve/engine/places`. Rows, medians in microseconds:

    program, dispatch_us    all of a call, as Python sees it
    prepare_us, update_us   XLA's preparation of every kernel; the update of command buffers after a change of address
    graph_us                cuGraphLaunch
    ttft_ms                 (a row of its own) of these prompts, untraced
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

VARIANTS = ("as is", "no places")
PROMPTS = 6
PARTS = {"Thunks::Prepare": "prepare_us", "command_buffer::update": "update_us", "cuGraphLaunch": "graph_us"}

Event = tuple[float, float, str]  # begin, duration in microseconds, name


def rows_of(events: Iterable[Event]) -> list[dict[str, Any]]:
    """The events of one thread -> a row a program: medians over its calls of the whole and of each part within it."""
    calls: dict[str, list[dict[str, float]]] = collections.defaultdict(list)
    current: dict[str, float] = {}
    end = float("-inf")
    for begin, duration, name in sorted(events, key=lambda e: (e[0], -e[1])):
        if name.startswith("PjitFunction(jit(") and begin >= end:
            current, end = {"dispatch_us": duration}, begin + duration
            calls[name.removeprefix("PjitFunction(jit(").rstrip(")")].append(current)
        elif begin < end:
            for part, key in PARTS.items():
                if name.startswith(part):
                    current[key] = current.get(key, 0.0) + duration
    keys = ("dispatch_us", *PARTS.values())
    return [
        {"program": name, "calls": len(of), **{k: round(statistics.median(c.get(k, 0.0) for c in of)) for k in keys}}
        for name, of in calls.items()
    ]


def threads_of(folder: Path) -> list[list[Event]]:
    """The host's threads in a trace directory."""
    import jax

    found = []
    for path in folder.rglob("*.xplane.pb"):
        for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
            if "CPU" in plane.name:
                for line in plane.lines:
                    found.append([(e.start_ns / 1e3, e.duration_ns / 1e3, e.name) for e in line.events])
    return found


def measure(args: argparse.Namespace) -> None:
    """One variant in this process; its rows go to stdout."""
    os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", "0.92")
    import jax

    from bench.first_token import ttft
    from bench.llama8b import QUICK, make_checkpoint
    from bench.workload import random_items
    from jqserve.engine import load as loading
    from jqserve.engine.config import EngineConfig

    if args.variant == "no places":
        loading.hold_places = lambda device: []
    length = 40 if args.quick else args.prompt
    with tempfile.TemporaryDirectory() as folder:
        path = make_checkpoint(Path(folder), args.scheme, **(QUICK if args.quick else {}))
        engine = loading.load_engine(
            EngineConfig(
                model_path=str(path),
                load_format="dummy",
                max_running_requests=4 if args.quick else 256,
                context_length=length + 64,
                num_pages=4 * (1 + length // 16),
                disable_warmup=True,
                self_test=False,
            )
        )
    items = random_items(3 * PROMPTS, length, 2, vocabulary=engine.limits.vocab_size, ratio=1.0, seed=7)
    ttft(engine, items[:PROMPTS])
    first = statistics.median(ttft(engine, items[PROMPTS : 2 * PROMPTS]))
    print("ROW " + json.dumps({"prompt": length, "ttft_ms": round(first * 1e3, 3)}), flush=True)
    options = jax.profiler.ProfileOptions()
    options.host_tracer_level, options.python_tracer_level, options.device_tracer_level = 3, 0, 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            ttft(engine, items[2 * PROMPTS :])
        for thread in threads_of(Path(folder)):
            for row in rows_of(thread):
                print("ROW " + json.dumps(row), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scheme", default="fp8", help="a key of bench.llama8b.SCHEMES")
    parser.add_argument("--prompt", type=int, default=1000, help="tokens")
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out")
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.variant:
        return measure(args)
    rows: list[dict[str, Any]] = []
    for variant in args.variants.split(","):
        if variant not in VARIANTS:
            parser.error(f"unknown variant {variant!r}; known: {', '.join(VARIANTS)}")
        command = [sys.executable, "-m", "bench.launch_trace", "--variant", variant, "--scheme", args.scheme]
        command += ["--prompt", str(args.prompt), *(["--quick"] if args.quick else [])]
        done = subprocess.run(command, capture_output=True, text=True, timeout=150)
        if done.returncode:
            rows.append({"variant": variant, "failed": done.stderr[-800:]})
        rows += [{"variant": variant, **json.loads(x[4:])} for x in done.stdout.splitlines() if x.startswith("ROW ")]
    for row in rows:
        print(json.dumps(row), flush=True)
    from bench.record import write

    print(write("launch_trace", rows, args.out, scheme=args.scheme))
    return None


if __name__ == "__main__":
    main()
