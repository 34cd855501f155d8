"""How long the GPU is idle between two decode steps, and within one, with command buffers on.

    python -m bench.step_gaps [--schemes fp8] [--points 1x1024,64x1024,256x1024] [--decode-steps 1,2]
                              [--dispatches 20] [--budget SECONDS] [--quick] [--out DIR]

jax.profiler turns command buffers off, so the timestamps come from torch's profiler (CUPTI sees the whole process,
whoever asks). A row per scheme, point (running sequences x context) and K, the decode steps of a dispatch:

    dispatch_us   from one dispatch's first kernel to the next one's
    between_us    of that, idle between the last kernel of one and the first of the next; between_share of dispatch_us
    within_us     idle between the kernels of a dispatch, in sum; kernels: how many it has

The recording itself costs some time a kernel: `between_us` is to be trusted, dispatch_us is bench.decode's to tell.
With `--quick`, which a CPU gets through in seconds, jax.profiler stands in for torch's, to try the script.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bench.decode import begin, end, load, points_of, step
from bench.profile import Span, device_spans


def recorded(call: Callable[[], None], plain: bool) -> list[Span]:
    """What ran on the device within `call`, which must wait for it, in order of time. plain: by jax.profiler."""
    with tempfile.TemporaryDirectory() as folder:
        if plain:
            import jax

            with jax.profiler.trace(folder):
                call()
            return device_spans(Path(folder))
        import torch.profiler

        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            call()
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    kinds = ("kernel", "gpu_memcpy", "gpu_memset")
    return sorted((float(e["ts"]), float(e["dur"]), str(e["name"])) for e in events if e.get("cat") in kinds)


def gaps(spans: list[Span], dispatches: int) -> dict[str, Any]:
    """Idle times of about so many dispatches that are alike (the recording may hold one more, or a part of one).

    A kernel that each dispatch runs once marks their period; the largest of the mean gaps within a period is taken
    for the one between two dispatches. Raises ValueError where no kernel does.
    """
    counts = collections.Counter(name for _, _, name in spans)
    marks = [name for name, count in counts.items() if dispatches - 1 <= count <= dispatches + 1]
    if not marks:
        raise ValueError(f"none of {len(counts)} kernels runs once in each of {dispatches} dispatches")
    places = [i for i, (_, _, name) in enumerate(spans) if name == marks[0]]
    lengths = [after - at for at, after in itertools.pairwise(places)]
    usual = statistics.mode(lengths)
    alike = [at for at, length in zip(places, lengths) if length == usual]
    idle: list[list[float]] = [[] for _ in range(usual)]
    for at in alike:
        for j, (before, after) in enumerate(zip(spans[at : at + usual], spans[at + 1 : at + usual + 1])):
            idle[j].append(max(0.0, after[0] - before[0] - before[1]))
    means = [statistics.fmean(found) for found in idle]
    whole = statistics.fmean(spans[at + usual][0] - spans[at][0] for at in alike)
    between = max(means)
    return {
        "dispatch_us": round(whole, 1),
        "between_us": round(between, 2),
        "between_share": round(between / whole, 4),
        "within_us": round(sum(means) - between, 2),
        "kernels": usual,
        "counted": len(alike),
    }


def rows_of(scheme: str, points: list[tuple[int, int]], args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    import jax

    decode_steps = [int(k) for k in args.decode_steps.split(",")]
    room = 64 + (args.dispatches + 8) * max(decode_steps)
    engine, _ = load(scheme, points, decode_steps, room, args)
    for batch, context in points:
        for k in decode_steps:
            engine.scheduler.steps = k
            begin(engine, batch, context, room)
            for _ in range(4):
                step(engine)

            def run() -> None:
                for _ in range(args.dispatches):
                    step(engine)
                engine.runner.dispatcher.drain()
                jax.block_until_ready(engine.runner.state.last_token)

            row: dict[str, Any] = {"scheme": scheme, "batch": batch, "context": context, "decode_steps": k}
            try:
                row |= gaps(recorded(run, args.quick), args.dispatches)
            except ValueError as error:
                row["failed"] = str(error)
            end(engine, batch)
            yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schemes", default="fp8", help="keys of bench.llama8b.SCHEMES")
    parser.add_argument("--points", default="1x1024,64x1024,256x1024")
    parser.add_argument("--decode-steps", default="1,2")
    parser.add_argument("--dispatches", type=int, default=20)
    parser.add_argument("--budget", type=float, default=300, help="seconds; no scheme is begun later")
    parser.add_argument("--kv-dtype", default="auto")
    parser.add_argument("--page-size", type=int)
    parser.add_argument("--context-length", type=int)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out")
    args = parser.parse_args()
    start = time.monotonic()
    os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", "0.92")
    if args.quick and args.points == parser.get_default("points"):
        args.points = "2x40"
    points = points_of(args.points)

    from bench.record import write

    rows: list[dict[str, Any]] = []
    for scheme in args.schemes.split(","):
        if time.monotonic() - start > args.budget:
            break
        for row in rows_of(scheme, points, args):
            rows.append(row)
            print(json.dumps(row), flush=True)
    print(write("step_gaps", rows, args.out, dispatches=args.dispatches))


if __name__ == "__main__":
    main()
