"""bench/ahead.py runs on a CPU, where nothing is asked for; no time is judged here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration


def test_quick(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench.ahead", "--quick", "--schemes", "w4a16,none such", "--batches", "2"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([*command, "--out", str(tmp_path)], check=True, env=environment, capture_output=True, timeout=250)
    *rows, failed = json.loads((tmp_path / "ahead.json").read_text())["rows"]
    assert [sum(row["ahead"].values()) >> 20 for row in rows] == [0, 8, 8]
    assert all(row["same"] and row["layer_us"] > 0 for row in rows)
    assert "none such" in failed["scheme"] and failed["failed"]
