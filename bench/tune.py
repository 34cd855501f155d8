"""Searches the ops' config spaces on the present GPU and writes pallas_kernels/tuned/<device>.json.

    python -m bench.tune [--budget SECONDS] [--groups w4a16,fp8_row,...] [--shapes 8b] [--ms 1,16,64,256,4096]
                         [--most 10] [--out FILE]

A problem is one of the bench's (bench/{matmul,quantize}_tasks.py, bench/kernel_paged_attention.py). Tracing it tells
what its op wants to have chosen (pallas_kernels/tuning.py); every candidate is compiled beforehand, checked and timed
as in the table. A process for every group compiles some problems ahead and takes the GPU in turns with the others; M by
M, so that a short budget reaches all shapes. One whose kernel hangs, or breaks its CUDA context, is started again
behind that problem. The file is written after every problem; what stands in it for others is kept. A candidate has to
win by 1 % over the heuristic's config to be written: two runs of one config differ by about that.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import functools
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.tasks import DEVICE_LOST, Task
from bench.timing import GpuLock, time_chain, yield_to_timing
from pallas_kernels import tuning
from pallas_kernels.dispatch import current_device

GROUPS = ("w4a16", "fp8_row", "fp8_block", "int8_row", "w8a16", "prefill", "decode", "quantize")
MARGIN = 0.01
AHEAD = 3  # problems of a group that compile while one is timed
HANG, HUNG = 20.0, 3  # seconds that one candidate may take, and the exit status of a process whose kernel took more


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
    if group == "quantize":
        from bench.quantize_tasks import quantize_tasks

        sizes = (256, 384) if quick else ()
        return [lambda m=m, i=i: quantize_tasks((m,), *sizes)[i] for m in ms for i in range(len(quantize_tasks((1,))))]
    from bench.matmul_tasks import KINDS, Weights, matmul_task

    kind = KINDS[group]
    weights = {shape: Weights(kind, n, k) for shape, (n, k) in shapes.items()}
    return [lambda m=m, shape=shape: matmul_task(kind, shape, weights[shape], m) for m in ms for shape in shapes]


def candidates(request: tuning.Request, most: int) -> list[Any]:
    """The heuristic's config and `most` others: the space's first (likeliest, where an op ranks it), then evenly."""
    others = request.space[1:]
    first, rest = others[: (most + 1) // 2], others[(most + 1) // 2 :]
    left = min(most - len(first), len(rest))
    step = max(1.0, len(rest) / left) if left else 1.0
    return [request.heuristic, *first, *(rest[int(i * step)] for i in range(left))]


@dataclasses.dataclass(frozen=True)
class Prepared:
    """One question of a problem and its candidates as they compile: (config, (task, compiled))."""

    request: tuning.Request
    tried: list[tuple[Any, concurrent.futures.Future[tuple[Task, Any]]]]


def prepare(make: Callable[[], Task], most: int, executor: concurrent.futures.Executor) -> list[Prepared]:
    """Traces a problem to learn what its ops ask, and has every candidate compiled."""
    with tuning.recording() as asked:
        task = make()
        compiled = task.compile()
    requests = list({(r.op, r.key): r for r in asked}.values())

    def build(request: tuning.Request, config: Any) -> tuple[Task, Any]:
        if config == request.heuristic and len(requests) == 1:
            return task, compiled  # what the trace came to
        with tuning.forcing(request.op, request.key, config):
            other = make()
            return other, other.compile()

    return [
        Prepared(r, [(config, executor.submit(build, r, config)) for config in candidates(r, most)]) for r in requests
    ]


def measure(prepared: Prepared, deadline: float, lock: GpuLock, beat: Callable[[str], None]) -> dict[str, Any]:
    """Checks and times the candidates of one question, under the GPU's lock."""
    measured: list[tuple[float, Any]] = []
    refused: list[str] = []
    request, lost = prepared.request, False
    concurrent.futures.wait([f for _, f in prepared.tried], timeout=max(0.0, deadline - time.time()))
    with lock.hold(f"{request.op} {request.key}"):
        for config, future in prepared.tried:
            if time.time() > deadline or not future.done():
                future.cancel()
                continue
            beat(f"{request.op} {request.key} {config}")
            try:
                task, compiled = future.result()
                row = task.run(compiled)
            except Exception as error:
                refused.append(f"{config}: {error!r}"[:200])
                if lost := "CUDA_ERROR" in repr(error):  # nothing works in this process any more
                    break
                continue
            if row.get("ok", True):
                measured.append((row["kernel_us"] or row["us"], config))
            else:
                refused.append(f"{config}: wrong by {row.get('error')}")
        beat("")
    return result_of(request, measured, refused) | ({"device_lost": True} if lost else {})


def tune(make: Callable[[], Task], most: int, deadline: float, executor: concurrent.futures.Executor) -> list[dict]:
    """Tunes every request of one problem, one after another; returns what was measured."""
    return [measure(p, deadline, GpuLock(None), lambda _: None) for p in prepare(make, most, executor)]


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


# --- one process a group ---


def worker(args: argparse.Namespace) -> None:
    """Tunes one group's problems in order, compiling some ahead; a line of JSON for every result, and before it the
    number of its problem, so that a successor goes on behind one that hung."""
    from bench import matmul_tasks
    from bench.bars import SHAPES

    # The kernels' durations decide, and one chain has enough of them: the wall clock is hardly needed.
    matmul_tasks.time_chain = functools.partial(time_chain, seconds=0.004, repeats=1)
    deadline, folder = args.start + args.budget, Path(args.folder)
    log = folder / f"{args.worker}.jsonl"
    begun = {row["begun"] for row in lines(log) if "begun" in row}
    makers = problems(args.worker, SHAPES["tiny" if args.quick else args.shapes], args.ms, args.quick)
    doing: list[Any] = ["", 0.0]

    def beat(what: str) -> None:
        doing[:] = what, time.time()

    def write(row: dict[str, Any]) -> None:
        with log.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def watch() -> None:
        while True:
            time.sleep(0.5)
            if doing[0] and time.time() - doing[1] > HANG:
                write({"hung": doing[0]})
                os._exit(HUNG)

    threading.Thread(target=watch, daemon=True).start()
    todo = [(i, make) for i, make in enumerate(makers) if i not in begun]
    with concurrent.futures.ThreadPoolExecutor(args.threads, initializer=yield_to_timing) as executor:
        ahead: list[concurrent.futures.Future[list[Prepared]]] = []
        for at, (i, _) in enumerate(todo):
            while len(ahead) < min(len(todo), at + AHEAD):
                ahead.append(executor.submit(prepare, todo[len(ahead)][1], args.most, executor))
            if time.time() > deadline:
                break
            write({"begun": i})
            try:
                for prepared in ahead[at].result(timeout=max(1.0, deadline - time.time())):
                    result = measure(prepared, deadline, GpuLock(folder), beat)
                    write(result)
                    if "device_lost" in result:
                        os._exit(DEVICE_LOST)
            except Exception as error:
                write({"failed": repr(error)[:300], "problem": i})
            ahead[at] = concurrent.futures.Future()  # frees its executables
        for future in ahead:
            future.cancel()
        executor.shutdown(wait=False, cancel_futures=True)
    os._exit(0)  # threads that still compile would be waited for


def lines(path: Path) -> list[dict[str, Any]]:
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def run_workers(args: argparse.Namespace, given: list[str], path: Path, frame: dict[str, Any]) -> list[dict[str, Any]]:
    """All groups side by side; merges what they write into `path` as it comes."""
    groups = args.groups.split(",")
    with tempfile.TemporaryDirectory() as folder:

        def start(group: str) -> subprocess.Popen[bytes]:
            command = [sys.executable, "-m", "bench.tune", *given, "--worker", group, "--folder", folder]
            return subprocess.Popen([*command, "--start", str(args.start)])

        running, restarts, written = {g: start(g) for g in groups}, dict.fromkeys(groups, 0), 0
        results: list[dict[str, Any]] = []
        while running or written < len(results):
            results = [row for g in groups for row in lines(Path(folder) / f"{g}.jsonl") if "begun" not in row]
            if len(results) > written:
                merge(path, results, frame)
                written = len(results)
            for group, process in list(running.items()):
                if process.poll() is None and time.time() > args.start + args.budget + 10:
                    process.kill()
                    process.wait()
                if (code := process.poll()) is None:
                    continue
                del running[group]
                if code and restarts[group] < 3 and time.time() < args.start + args.budget:
                    restarts[group] += 1
                    running[group] = start(group)
            time.sleep(0.2)
        return [row for g in groups for row in lines(Path(folder) / f"{g}.jsonl") if "begun" not in row]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=280, help="seconds")
    parser.add_argument("--groups", default=",".join(GROUPS))
    parser.add_argument("--shapes", default="8b")
    parser.add_argument("--ms", default="1,16,64,256,4096")
    parser.add_argument("--most", type=int, default=10, help="candidates of a problem, besides the heuristic's")
    parser.add_argument("--threads", type=int, default=3, help="that compile, of each group's process")
    parser.add_argument("--out", help="default: pallas_kernels/tuned/<device>.json")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to run without a GPU")
    for internal in ("--worker", "--folder"):
        parser.add_argument(internal, help=argparse.SUPPRESS)
    parser.add_argument("--start", type=float, default=time.time(), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if unknown := set(args.groups.split(",")) - set(GROUPS):
        parser.error(f"unknown groups {', '.join(sorted(unknown))}; known: {', '.join(GROUPS)}")
    args.ms = [int(m) for m in args.ms.split(",")]
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # of this process too, which only asks what the device is
    if args.worker:
        return worker(args)
    from bench.record import frame

    path = Path(args.out) if args.out else tuning.path_for(current_device())
    results = run_workers(args, sys.argv[1:], path, frame())
    for result in results:
        print(json.dumps(result))
    entries = [r["entry"] for r in results if "entry" in r]
    won = sum(e["us"] < e.get("heuristic_us", 0.0) for e in entries)
    print(f"{path}: {len(entries)} questions answered, {won} better than the heuristic")


if __name__ == "__main__":
    main()
