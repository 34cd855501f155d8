"""What the worker processes of `bench.kernel_scaled` share: the log, the GPU in turns, chains of calls, their times."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bench.timing import GpuLock, kernel_durations


class Session:
    """What a worker shares with the others: the log, the clock, the GPU's lock, the watchdog."""

    def __init__(self, worker: str, args: argparse.Namespace):
        self.worker, self.start, self.budget, self.dry = worker, args.start, args.budget, args.dry
        self.sweep, self.variants = args.sweep, args.variants
        self.ms: tuple[int, ...] | None = tuple(map(int, args.ms.split(","))) if args.ms else None
        self.folder = Path(args.folder)
        self.log_file = os.open(args.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        self.beat, self.doing = 0.0, ""
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            time.sleep(0.5)
            if self.beat and time.time() - self.beat > 12:
                self.log(HUNG=self.doing)
                os._exit(3)

    def log(self, **row: Any) -> None:
        row = {"worker": self.worker, **row, "at": round(time.time() - self.start, 1)}
        os.write(self.log_file, (json.dumps(row, default=str) + "\n").encode())  # one write: appended whole

    @property
    def left(self) -> float:
        return self.budget - (time.time() - self.start)

    def doing_now(self, what: Any) -> None:
        self.beat, self.doing = time.time(), str(what)

    def wait_for_others(self) -> None:
        """Until all have compiled (a busy CPU would show in the wall clock), or half of the time is gone."""
        (self.folder / f"ready.{self.worker}").touch()
        expected = len((self.folder / "workers").read_text().split())
        while len(list(self.folder.glob("ready.*"))) < expected and self.left > self.budget * 0.45:
            time.sleep(0.2)

    @contextlib.contextmanager
    def gpu(self, rank: int) -> Iterator[None]:
        """The GPU alone; of those that wait the lowest rank first."""
        with GpuLock(self.folder, rank).hold(self.worker):
            self.doing_now("start")
            try:
                yield
            finally:
                self.beat = 0.0


def compiler(session: Session) -> Callable[..., Any]:
    """lower-and-compile of (fn, *shapes): for this GPU, or for an absent H200."""
    import jax

    if not session.dry:
        return lambda fn, *shapes: jax.jit(fn).lower(*shapes).compile()
    from tests.pallas_kernels.aot import compile_for_h200

    def compile_dry(fn: Any, *shapes: Any) -> Any:
        compiled = compile_for_h200(fn, *shapes)
        if compiled.spill_bytes or "serialized" in compiled.report:
            serialized = "serialized" in compiled.report  # ptxas awaits each product by itself
            session.log(spill_bytes=compiled.spill_bytes, registers=compiled.registers, serialized=serialized)
        return compiled

    return compile_dry


def kernel_times(call: Callable[[], Any]) -> tuple[float, int]:
    """(sum of kernel durations in us, kernels) of one call, by CUPTI."""
    durations = kernel_durations(call)
    return sum(us for _, us in durations), len(durations)


def measure(fn: Any, args: tuple[Any, ...], calls: int, seconds: float) -> dict[str, Any]:
    """us per call: wall clock (median of 3 bursts of about `seconds`) and kernel durations."""
    import jax

    for _ in range(3):
        jax.block_until_ready(fn(*args))
    begin = time.perf_counter()
    jax.block_until_ready(fn(*args))
    chains = max(2, min(200, int(seconds / (time.perf_counter() - begin))))
    walls = []
    for _ in range(3):
        out = None
        begin = time.perf_counter()
        for _ in range(chains):
            del out  # the same addresses every time: the command buffer needs no update
            out = fn(*args)
        jax.block_until_ready(out)
        walls.append((time.perf_counter() - begin) / (chains * calls) * 1e6)
    kernels = [kernel_times(lambda: fn(*args)) for _ in range(5)]
    kernel = statistics.median(us for us, _ in kernels) / calls
    return {
        "us": round(statistics.median(walls), 2),
        "kernel_us": round(kernel, 2),
        "kernels": round(kernels[0][1] / calls, 2),
    }


def chain(fn: Callable[..., Any], shared: int, rounds: int) -> Callable[..., Any]:
    """fn(*first `shared` arguments, w, after=result before) for every further argument w, `rounds` times over.

    Only the last result is returned: dozens of outputs would cost the host more than such kernels take.
    """
    import jax

    inner = jax.jit(fn)

    def run(*args: Any) -> Any:
        result = inner(*args[:shared], args[shared])
        for w in (args[shared:] * rounds)[1:]:
            result = inner(*args[:shared], w, after=jax.tree.leaves(result)[0])
        return result

    return run
