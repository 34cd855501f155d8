"""A short soak (python -m bench.soak --minutes 20 is the long one), and what it would call a leak."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.soak_watch import LEAST, MOST, Sample, Watch

ROOT = Path(__file__).resolve().parents[2]


def watch(**grown: float) -> Watch:
    """One life of samples in which these values rise to these heights, evenly."""
    seen, count = Watch({}, 0.0), 2 * LEAST
    for i in range(count):
        values = {name: 100.0 + grown.get(name, 0.0) * i / count for name in MOST}
        seen.samples.append(Sample(2.0 * i, 7, values))
    return seen


def test_what_grows_is_told() -> None:
    assert watch().faults() == [] and watch(front_mb=60, waiting=1000).faults() == []
    (fault,) = watch(front_mb=300).faults()
    assert fault.startswith("front_mb grew from")
    assert [f.split()[0] for f in watch(engine_fds=40, tasks=400).faults()] == ["engine_fds", "tasks"]
    assert len(watch().thinned(10)) <= 10


@pytest.mark.slow
def test_nothing_is_lost_in_a_short_soak(tmp_path: Path) -> None:
    """Twice the capacity, a step that raises every three seconds, a front end killed, a page pool that is too small."""
    command = [sys.executable, "-m", "bench.soak", "--minutes", "0.6", "--fault-seconds", "3", "--kills", "1"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "--max-gap", "5", "--out", str(tmp_path)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    (row,) = json.loads((tmp_path / "soak.json").read_text())["rows"]
    assert row["lost"] == 0 and row["requests"] == sum(row["ends"].values()) > 200
    assert row["steps_raised"] >= 3 and row["front_end_killed"] == 1 and row["preemptions_of_last_life"] > 0
    assert {"length", "cancelled", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "UNAVAILABLE"} <= row["ends"].keys()
