"""Searches the ops' config spaces on the present GPU and writes pallas_kernels/tuned/<device>.json.

    python -m bench.tune [--budget SECONDS] [--groups w4a16,fp8_row,...] [--shapes 8b] [--ms 1,16,64,256,4096]
                         [--most 24] [--out FILE]

A problem is one of the bench's (bench/matmul_tasks.py, bench/kernel_paged_attention.py). Tracing it tells what its op
wants to have chosen (pallas_kernels/tuning.py); every candidate is compiled beforehand in threads, checked and timed as
in the table. The file is written after every problem; what stands in it for others is kept. A candidate has to win by
1 % over the heuristic's config to be written: two runs of one config differ by about that.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import itertools
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.tasks import Task
from pallas_kernels import tuning
from pallas_kernels.dispatch import current_device

GROUPS = ("w4a16", "fp8_row", "fp8_block", "int8_row", "w8a16", "prefill", "decode")
MARGIN = 0.01


def problems(group: str, shapes: dict[str, tuple[int, int]], ms: Sequence[int], quick: bool = False) -> list[Callable]:
    """Makers of the group's tasks. Every call of one gives a fresh task, so that nothing traced before is reused."""
    if group in ("prefill", "decode"):
        from bench import kernel_paged_attention as attention

        make: Callable[[], list[Task]] = (
            (lambda: attention.prefill_tasks(quick=quick))
            if group == "prefill"
            else (lambda: attention.decode_tasks(quick=quick))
        )
        return [lambda i=i: make()[i] for i in range(len(make()))]
    from bench.matmul_tasks import KINDS, Weights, matmul_task

    kind = KINDS[group]
    weights = {shape: Weights(kind, n, k) for shape, (n, k) in shapes.items()}
    return [lambda m=m, shape=shape: matmul_task(kind, shape, weights[shape], m) for m in ms for shape in shapes]


def candidates(request: tuning.Request, most: int) -> list[Any]:
    """The heuristic's config and `most` others, evenly over the search space."""
    others = request.space[1:]
    step = max(1.0, len(others) / most)
    chosen = [others[int(i * step)] for i in range(min(most, len(others)))]
    return [request.heuristic, *chosen]


def tune(make: Callable[[], Task], most: int, deadline: float, executor: concurrent.futures.Executor) -> list[dict]:
    """Tunes every request of one problem, one after another; returns what was measured."""
    with tuning.recording() as requests:
        make().compile()
    results = []
    for request in {(r.op, r.key): r for r in requests}.values():

        def build(config: Any, request: tuning.Request = request) -> tuple[Task, Any]:
            with tuning.forcing(request.op, request.key, config):
                task = make()
                return task, task.compile()

        tried = candidates(request, most)
        measured: list[tuple[float, Any]] = []
        refused: list[str] = []
        futures = [executor.submit(build, config) for config in tried]
        for config, future in zip(tried, futures):
            if time.time() > deadline:
                future.cancel()
                continue
            try:
                task, compiled = future.result()
                row = task.run(compiled)
            except Exception as error:
                refused.append(f"{config}: {error!r}"[:200])
                continue
            if row.get("ok", True):
                measured.append((row["kernel_us"] or row["us"], config))
            else:
                refused.append(f"{config}: wrong by {row.get('error')}")
        results.append(result_of(request, measured, refused))
    return results


def result_of(request: tuning.Request, measured: list[tuple[float, Any]], refused: list[str]) -> dict[str, Any]:
    """What to write for one request: the fastest config, unless the heuristic's is as good."""
    base = next((us for us, config in measured if config == request.heuristic), None)
    result: dict[str, Any] = {"op": request.op, "key": request.key, "tried": len(measured), "refused": refused}
    if not measured:
        return result
    us, best = min(measured, key=lambda pair: pair[0])
    if base is not None and us > base * (1 - MARGIN):
        us, best = base, request.heuristic
    entry = {"config": dataclasses.asdict(best), "us": round(us, 3)}
    if base is not None:
        entry["heuristic_us"] = round(base, 3)
    return result | {"entry": entry}


def merge(path: Path, results: Sequence[dict[str, Any]], frame: dict[str, Any]) -> None:
    """Writes the entries of `results` over those of the file, whole or not at all."""
    found = json.loads(path.read_text())["entries"] if path.exists() else {}
    for result in results:
        if "entry" in result:
            found.setdefault(result["op"], {})[result["key"]] = result["entry"]
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({**frame, "entries": found}, indent=1, sort_keys=True) + "\n")
    partial.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=280, help="seconds")
    parser.add_argument("--groups", default=",".join(GROUPS))
    parser.add_argument("--shapes", default="8b")
    parser.add_argument("--ms", default="1,16,64,256,4096")
    parser.add_argument("--most", type=int, default=24, help="candidates of a problem, besides the heuristic's")
    parser.add_argument("--threads", type=int, default=min(16, os.cpu_count() or 1))
    parser.add_argument("--out", help="default: pallas_kernels/tuned/<device>.json")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to run without a GPU")
    args = parser.parse_args()
    from bench.bars import SHAPES
    from bench.record import frame

    deadline = time.time() + args.budget
    path = Path(args.out) if args.out else tuning.path_for(current_device())
    shapes = SHAPES["tiny" if args.quick else args.shapes]
    ms = [int(m) for m in args.ms.split(",")]
    by_group = [problems(g, shapes, ms, args.quick) for g in args.groups.split(",")]
    # The groups take turns, so that a short budget reaches all of them.
    makers = [m for row in itertools.zip_longest(*by_group) for m in row if m is not None]
    results: list[dict[str, Any]] = []
    with concurrent.futures.ThreadPoolExecutor(args.threads) as executor:
        for make in makers:
            if time.time() > deadline:
                break
            for result in tune(make, args.most, deadline, executor):
                print(json.dumps(result), flush=True)
                results.append(result)
            merge(path, results, frame())
    print(path)


if __name__ == "__main__":
    main()
