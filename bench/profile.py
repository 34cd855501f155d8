"""A trace of a few decode steps by jax.profiler, and its table of time by kernel.

    python -m bench.profile [--scheme fp8] [--point 64x1024] [--steps 8] [--trace DIR] [--quick] [--out DIR]

`--trace` keeps the trace (for Perfetto or TensorBoard); the table and the gaps between kernels go to the result file.
Under the profiler XLA does not use command buffers, so gaps are those of single launches: bench.decode has the true
step time, this has the order and the share of the kernels.
"""

from __future__ import annotations

import argparse
import collections
import gzip
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

Span = tuple[float, float, str]  # begin, duration in microseconds, name


def device_spans(folder: Path) -> list[Span]:
    """The kernels of a trace directory's GPU streams (on a CPU: the XLA thread's operations), in order of time."""
    spans: list[Span] = []
    for path in folder.rglob("*.trace.json.gz"):
        with gzip.open(path, "rt") as file:
            events = json.load(file)["traceEvents"]
        processes = {e["pid"]: e["args"]["name"] for e in events if e.get("name") == "process_name"}
        threads = {
            (e["pid"], e["tid"]): e["args"]["name"] for e in events if e.get("name") == "thread_name" and "tid" in e
        }
        for event in events:
            if event.get("ph") != "X":
                continue
            process = processes.get(event["pid"], "")
            thread = threads.get((event["pid"], event.get("tid")), "")
            if ("GPU" in process and "Stream" in thread) or ("CPU" in process and "XLA" in thread):
                spans.append((float(event["ts"]), float(event.get("dur", 0)), event["name"]))
    return sorted(spans)


def table(spans: list[Span], steps: int) -> list[dict[str, Any]]:
    """One row a kernel, the costliest first: launches and microseconds a step, and its share of all kernels' time."""
    count: collections.Counter[str] = collections.Counter()
    time_by: collections.defaultdict[str, float] = collections.defaultdict(float)
    for _, duration, name in spans:
        count[name] += 1
        time_by[name] += duration
    total = sum(time_by.values()) or 1
    return [
        {
            "kernel": name,
            "launches": round(count[name] / steps, 2),
            "us": round(time_by[name] / steps, 2),
            "share": round(time_by[name] / total, 4),
        }
        for name in sorted(time_by, key=time_by.__getitem__, reverse=True)
    ]


def idle(spans: list[Span]) -> dict[str, float]:
    """Microseconds between the first kernel's begin and the last one's end in which none ran, and their share."""
    if not spans:
        return {"span_us": 0.0, "idle_us": 0.0, "idle_share": 0.0}
    end, gaps = spans[0][0], 0.0
    for begin, duration, _ in spans:
        gaps += max(0.0, begin - end)
        end = max(end, begin + duration)
    whole = end - spans[0][0]
    return {"span_us": round(whole, 1), "idle_us": round(gaps, 1), "idle_share": round(gaps / whole, 4) if whole else 0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scheme", default="fp8", help="a key of bench.llama8b.SCHEMES")
    parser.add_argument("--point", default="64x1024", help="sequences x context")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--kv-dtype", default="auto")
    parser.add_argument("--page-size", type=int)
    parser.add_argument("--context-length", type=int)
    parser.add_argument("--trace", help="folder that keeps the trace")
    parser.add_argument("--budget", type=float, default=300, help="seconds; nothing is traced when loading took longer")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--name", default="profile")
    parser.add_argument("--out")
    args = parser.parse_args()
    start = time.monotonic()
    os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", "0.92")
    if args.quick and args.point == parser.get_default("point"):
        args.point = "2x40"
    batch, context = (int(n) for n in args.point.split("x"))

    import jax

    from bench.decode import begin, load, step
    from bench.record import write

    room = 64 + args.steps
    engine, facts = load(args.scheme, [(batch, context)], [1], room, args)
    if time.monotonic() - start > args.budget:
        raise SystemExit(f"loading and compiling took longer than --budget {args.budget:g} s")
    begin(engine, batch, context, room)
    for _ in range(4):
        step(engine)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(args.trace or scratch)
        with jax.profiler.trace(str(folder)):
            for _ in range(args.steps):
                step(engine)
            engine.runner.dispatcher.drain()  # else its thread may be giving the state away just now
            jax.block_until_ready(engine.runner.state.last_token)
        spans = device_spans(folder)
    rows = table(spans, args.steps)
    for row in rows[:30]:
        print(f"{row['us']:10.2f} us  {row['share']:6.1%}  {row['launches']:7.2f} x  {row['kernel'][:90]}")
    more = {"scheme": args.scheme, "point": args.point, "steps": args.steps, **idle(spans), **facts}
    print(write(args.name, rows, args.out, **more))


if __name__ == "__main__":
    main()
