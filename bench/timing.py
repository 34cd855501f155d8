"""The one way an op is timed here.

A *chain* is one jitted program of `calls` calls of the op, each on a replica of its weights of its own, so that they
come from HBM and not from the 50 MB of L2; XLA replays it from a command buffer (a CUDA graph). The time of a call is
the slope of wall clock over the number of queued chains: launch gaps are in it, the host's one wait at the end is not.
Beside it stands the sum of the call's kernel durations by CUPTI. Processes that share the GPU take a `GpuLock` first.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import math
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

ROTATED_BYTES = 256e6  # five times an H200's L2
MOST_REPLICAS = 40
LONG, REST = 5e-4, 0.05  # seconds: a chain that draws full power, and the pause behind it


@dataclasses.dataclass(frozen=True)
class Timing:
    """us: wall clock of a call; kernel_us: its kernels' durations (None without CUPTI); both in microseconds."""

    us: float
    kernel_us: float | None
    kernels: tuple[str, ...] = ()  # their names

    def row(self) -> dict[str, Any]:
        kernel_us = None if self.kernel_us is None else round(self.kernel_us, 3)
        return {"us": round(self.us, 3), "kernel_us": kernel_us, "kernels": [n[:60] for n in self.kernels[:4]]}


def replicas(rotated_bytes: float, least: int = 2) -> int:
    """How many copies of `rotated_bytes` exceed the L2 five times."""
    return int(min(MOST_REPLICAS, max(least, math.ceil(ROTATED_BYTES / max(rotated_bytes, 1)))))


def chain(op: Callable[..., Any], *, carried: bool = False, after: bool = False, rounds: int = 1) -> Any:
    """A jitted run(fixed, rotated) that calls op(*fixed, *r) for r in rotated, `rounds` times over. Returns the last
    result, and a number of every other one, for XLA would drop what nobody reads.

    `rounds`: to hand a call over costs the host some 3 us, and each array of a chain's arguments and results as much
    again: a chain over 40 replicas of a weight takes longer to launch than a GPU takes for kernels of 8 us, one that
    goes over them more than once does not. With `carried` the first of `fixed` is replaced by each call's result, which
    is then all that is returned. With `after` each call waits for an array of the one before, which it gets as that
    keyword, and only the last result is returned: no two calls are alike, none may be left out, overlap another or need
    a kernel that reads it (for ops of 2 us those took longer than the ops).
    """
    inner = jax.jit(op)  # traced and lowered once, not per call

    def one_after_another(fixed: tuple, rotated: tuple[tuple, ...]) -> Any:
        result = inner(*fixed, *rotated[0])
        for r in (rotated * rounds)[1:]:
            result = inner(*fixed, *r, after=jax.tree.leaves(result)[0])
        return result

    def run(fixed: tuple, rotated: tuple[tuple, ...]) -> Any:
        results: list[Any] = []
        for _ in range(rounds):
            for r in rotated:
                results.append(inner(*fixed, *r))
                if carried:
                    fixed = (results.pop(), *fixed[1:])
            # Other operands to XLA, or it would compute one round only; nothing is left of it when the program runs.
            rotated = jax.lax.optimization_barrier(rotated)
        if carried:
            return fixed[0]
        one_of_each = [jax.tree.leaves(result)[0].ravel()[0].astype(jnp.float32) for result in results[:-1]]
        return results[-1], jnp.stack(one_of_each) if one_of_each else None

    return jax.jit(one_after_another if after else run)


def abstract(tree: Any) -> Any:
    """The same pytree of ShapeDtypeStructs."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), tree)


def kernel_durations(run: Callable[[], Any]) -> list[tuple[str, float]]:
    """(name, microseconds) of every kernel that `run` launches; empty where there is no CUPTI."""
    if jax.devices()[0].platform != "gpu":
        return []
    from jax._src.lib import mosaic_gpu

    extension = mosaic_gpu._mosaic_gpu_ext
    extension._cupti_init()
    try:
        jax.block_until_ready(run())
    finally:
        timings = extension._cupti_get_timings(True)
    return [(name, milliseconds * 1e3) for name, milliseconds in timings or ()]


def time_chain(run: Callable[[], Any], calls: int, *, seconds: float = 0.01, repeats: int = 5) -> Timing:
    """Times a compiled chain of `calls` calls; `run` queues it once and returns its results.

    Three warm-up runs let XLA record its command buffer. Each of `repeats` measurements queues about `seconds` of work:
    as short as the peers' seven replays, for a longer load at M = 4096 takes an H200 to its power limit (8 % slower
    after 40 ms). Behind a chain of that kind the GPU rests before the next measurement, as it does before a peer's.
    """
    for _ in range(3):
        jax.block_until_ready(run())
    kernels = kernel_durations(run)

    def wall(chains: int) -> float:
        began = time.perf_counter()
        for _ in range(chains):
            out = None  # results lie where the ones before lay: no command buffer has to be updated for them
            out = run()
        jax.block_until_ready(out)
        return time.perf_counter() - began

    slopes: list[float] = []
    with prompt_turns():
        alone = statistics.median(wall(1) for _ in range(3))
        many = int(min(400, max(2, seconds / alone)))
        for _ in range(10 * repeats):
            if alone > LONG:
                time.sleep(REST)
            if (slope := (wall(1 + many) - wall(1)) / many) > 0:  # else something else had the machine meanwhile
                slopes.append(slope)
            if len(slopes) == repeats:
                break
    if len(slopes) < repeats:
        raise RuntimeError(
            f"only {len(slopes)} of {10 * repeats} measurements were above zero: the machine is too busy"
        )
    names = tuple(sorted({name for name, _ in kernels}))
    duration = sum(us for _, us in kernels) / calls if kernels else None
    return Timing(statistics.median(slopes) / calls * 1e6, duration, names)


@contextlib.contextmanager
def prompt_turns(seconds: float = 5e-5) -> Iterator[None]:
    """Threads that trace programs meanwhile give Python back after so long, not after 5 ms, in which a GPU would have
    done all that is queued."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(seconds)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def yield_to_timing() -> None:
    """Of a thread that compiles (an executor's `initializer`): the cores go to those that launch kernels first."""
    thread = threading.get_native_id()
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, thread, min(19, os.getpriority(os.PRIO_PROCESS, thread) + 5))


def hbm_bytes_per_second(gigabytes: float = 2.0) -> float:
    """What a sum over an array far larger than the L2 reads a second."""
    x = jnp.ones((int(gigabytes * 2**30) // 8192, 4096), jnp.bfloat16)
    total = jax.jit(lambda a: jnp.sum(a, dtype=jnp.float32)).lower(x).compile()
    timing = time_chain(lambda: total(x), 1)
    return x.nbytes / ((timing.kernel_us or timing.us) * 1e-6)


class GpuLock:
    """One process at a time on the GPU; of those that wait, the lowest `rank` first.

    `folder` is shared by the processes; without one the lock is always free. While held, `held.json` names the holder,
    since when and for how many seconds at most, by which a watchdog tells a hung kernel.
    """

    def __init__(self, folder: Path | None, rank: int = 0):
        self.folder, self.rank = folder, rank

    @contextlib.contextmanager
    def hold(self, what: str, limit: float = 30.0) -> Iterator[None]:
        if self.folder is None:
            yield
            return
        want = self.folder / f"want-{self.rank:03d}-{os.getpid()}"
        want.touch()
        with (self.folder / "lock").open("w") as file:
            while True:
                first = min(p.name for p in self.folder.glob("want-*"))
                if first == want.name:
                    with contextlib.suppress(BlockingIOError):
                        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        break
                time.sleep(0.01)
            want.unlink(missing_ok=True)
            held = self.folder / "held.json"
            partial = self.folder / f"held-{os.getpid()}"
            partial.write_text(json.dumps({"pid": os.getpid(), "what": what, "since": time.time(), "limit": limit}))
            partial.replace(held)
            try:
                yield
            finally:
                held.unlink(missing_ok=True)
                fcntl.flock(file, fcntl.LOCK_UN)
