"""Tasks of a benchmark process: compiled in threads, run one after another under the GPU lock, a JSON line each."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import os
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.timing import GpuLock, yield_to_timing

DEVICE_LOST = 75  # exit status of a process whose CUDA context a kernel has broken


@dataclasses.dataclass(frozen=True)
class Task:
    """`compile` needs no GPU time and may run beside others; `run(compiled)` has the GPU and returns a row."""

    key: str
    compile: Callable[[], Any]
    run: Callable[[Any], dict[str, Any]]
    limit: float = 30.0  # seconds that `run` may take before it counts as hung
    exclusive_compile: bool = False  # `compile` uses the GPU (XLA's autotuning): it runs under the lock too


class Rows:
    """Rows as they come, in a file of JSON lines (and on stdout)."""

    def __init__(self, path: Path | None, echo: bool = True):
        self.path, self.echo, self.rows = path, echo, list[dict[str, Any]]()

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        line = json.dumps(row)
        if self.echo:
            print(line, flush=True)
        if self.path:
            with self.path.open("a") as file:
                file.write(line + "\n")


def run_tasks(
    tasks: Sequence[Task],
    rows: Rows,
    lock: GpuLock,
    *,
    deadline: float,
    threads: int = 3,
    skip: frozenset[str] = frozenset(),
) -> None:
    """Runs tasks in order until `deadline` (of time.time()). A failure becomes a row with "failed", and the rest go on;
    a task that the time did not reach, one with "skipped"."""
    todo = [task for task in tasks if task.key not in skip]
    with concurrent.futures.ThreadPoolExecutor(threads, initializer=yield_to_timing) as executor:
        futures = {t.key: executor.submit(t.compile) for t in todo if not t.exclusive_compile}
        for task in todo:
            if time.time() > deadline:
                rows.add({"key": task.key, "skipped": "out of time"})
                continue
            try:
                future = futures.get(task.key)
                compiled = future.result(timeout=max(1.0, deadline - time.time())) if future else None
                with lock.hold(task.key, task.limit):
                    row = task.run(task.compile() if future is None else compiled)
            except Exception as error:
                message = "".join(traceback.format_exception_only(error)).strip()
                row = {"failed": message[:600]}
            rows.add({"key": task.key, **row})
            if "CUDA_ERROR" in row.get("failed", ""):  # nothing works in this process any more
                os._exit(DEVICE_LOST)
        for future in futures.values():
            future.cancel()
