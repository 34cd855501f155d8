"""bench/plan_time.py runs, and README's sentence is made of what it writes. No time is judged here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import readme, readme_table


def test_quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = [sys.executable, "-m", "bench.plan_time", "--quick", "--runs", "1", "--out", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run(command, check=True, env=environment, capture_output=True, timeout=250)
    result = json.loads((tmp_path / "plan_time.json").read_text())
    assert len(result["rows"]) == 6 and all(row["cpu_seconds"] > 0 for row in result["rows"])
    monkeypatch.setattr(readme_table, "RESULTS", tmp_path)
    sentence = readme.plan_time()
    assert f"{result['rows'][0]['wall_seconds']:.2f} s (" in sentence
    assert "8B model's 49 tensors" in sentence  # of the small stand-in: two layers
