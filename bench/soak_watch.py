"""What a server holds while it runs, sampled, and whether it grows: the soak's eyes."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import statistics
import time
import urllib.request
from pathlib import Path
from typing import Any

SETTLE = 0.25  # of a life: memory may grow until caches and pools have their size
LEAST = 24  # samples of a life in which growth is looked for
#: what is sampled -> how much more of it the last third of a life may hold than the first (None: it may vary)
MOST: dict[str, float | None] = {
    "front_mb": 40.0,
    "engine_mb": 60.0,
    "front_fds": 8.0,
    "engine_fds": 4.0,
    "tasks": 40.0,
    "calls": 20.0,
    "pages_used": None,
    "running": None,
    "waiting": None,
}
METRICS = {"tasks": "tasks", "streams": "calls", "num_running_reqs": "running", "num_queue_reqs": "waiting"}


@dataclasses.dataclass(frozen=True)
class Sample:
    """seconds: since the soak began; life: the front end's process id; values: by the names of MOST."""

    seconds: float
    life: int
    values: dict[str, float]


def megabytes(pid: int) -> float:
    """Resident memory."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE") / 2**20


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def scrape(port: int) -> dict[str, float]:
    """Our gauges by name, without the prefix."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        lines = answer.read().decode().splitlines()
    pairs = (line.rpartition(" ") for line in lines if line.startswith("jqserve:"))
    return {name.partition("{")[0].removeprefix("jqserve:"): float(value) for name, _, value in pairs}


async def look(facts: dict[str, Any], since: float) -> Sample:
    """One sample of the server that `facts` (its ready file) names. Raises OSError when it is gone."""
    found = await asyncio.to_thread(scrape, facts["metrics_port"])
    values: dict[str, float] = {ours: found[name] for name, ours in METRICS.items()}
    values["pages_used"] = found["num_used_tokens"]
    for name, pid in (("front", facts["pid"]), ("engine", facts["engine_pid"])):
        values[f"{name}_mb"], values[f"{name}_fds"] = round(megabytes(pid), 1), descriptors(pid)
    return Sample(round(time.monotonic() - since, 1), facts["pid"], values)


class Watch:
    """Looks every `every` seconds at whatever server `facts` holds just then."""

    def __init__(self, facts: dict[str, Any], since: float, every: float = 2.0) -> None:
        self.samples: list[Sample] = []
        self._facts, self._since, self._every = facts, since, every

    async def run(self) -> None:
        """For ever."""
        while True:
            await asyncio.sleep(self._every)
            with contextlib.suppress(OSError, IndexError, KeyError):  # between two lives
                self.samples.append(await look(dict(self._facts), self._since))

    def growth(self) -> list[dict[str, Any]]:
        """Of each life long enough: by name the medians of its first and last third after it has settled."""
        rows = []
        for life in dict.fromkeys(sample.life for sample in self.samples):
            mine = [sample for sample in self.samples if sample.life == life]
            settled = mine[int(len(mine) * SETTLE) :]
            if len(settled) < LEAST:
                continue
            third = len(settled) // 3
            row: dict[str, Any] = {"seconds": [settled[0].seconds, settled[-1].seconds]}
            for name in MOST:
                parts = settled[:third], settled[-third:]
                row[name] = [round(statistics.median(s.values[name] for s in part), 1) for part in parts]
            rows.append(row)
        return rows

    def faults(self) -> list[str]:
        """What grew by more than it may."""
        return [
            f"{name} grew from {row[name][0]} to {row[name][1]} between {row['seconds'][0]} and {row['seconds'][1]} s"
            for row in self.growth()
            for name, most in MOST.items()
            if most is not None and row[name][1] - row[name][0] > most
        ]

    def thinned(self, count: int = 80) -> list[dict[str, float]]:
        """At most so many samples, for a file."""
        step = max(1, -(-len(self.samples) // count))
        return [{"seconds": s.seconds, "life": s.life, **s.values} for s in self.samples[::step]]
