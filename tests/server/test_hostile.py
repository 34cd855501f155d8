"""A sample of the hostile requests (python -m bench.fuzz_service sends thousands), and 8 good streams beside them."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.fuzz_service import fuzz
from tests.server.program import eventually
from tests.server.running_server import DEMO

SCRIPT = Path(__file__).resolve().parent / "serve_fake.py"


@pytest.fixture
def served(tmp_path: Path) -> Iterator[dict[str, Any]]:
    """Two processes: the real front end with the demo's tokenizer, and the echoing engine."""
    ready = tmp_path / "ready.json"
    settings = {"model_path": str(DEMO), "ids_only": False}
    engine = {"info": {"max_running_requests": 128, "max_queued": 512}, "token_seconds": 0.002}
    command = [sys.executable, str(SCRIPT), str(ready), json.dumps(engine), json.dumps(settings)]
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        eventually(ready.exists, 60)
        yield json.loads(ready.read_text()) | {"log": tmp_path / "log"}
    finally:
        process.kill()
        process.wait()


def test_hostile_requests_get_their_status_and_hurt_nobody(served: dict[str, Any]) -> None:
    pids = {"front end": served["pid"], "engine": served["engine_pid"]}
    report = asyncio.run(asyncio.wait_for(fuzz(served["target"], 250, 7, pids), 200))
    assert report.wrong == [] and report.spoiled == []
    assert report.served >= 8 and sum(report.statuses.values()) == 250
    assert {"INVALID_ARGUMENT", "UNIMPLEMENTED", "CANCELLED"} <= report.statuses.keys()
    for name, (before, after) in report.megabytes.items():
        assert after - before < 200, f"{name} grew from {before:.0f} to {after:.0f} MB"
    assert "Traceback" not in served["log"].read_text(), served["log"].read_text()[-3000:]
