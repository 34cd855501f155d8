"""2,000 hostile requests, and messages as large as they may be, with good streams beside them: the statuses are right,
the memory is bounded, nobody else notices."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2

from bench.big_messages import OPTIONS, measure, measure_stalled, payloads, peak, reset_peak, send
from bench.fuzz_service import Report, fuzz
from bench.soak_watch import megabytes
from tests.server.program import Program, compilation_cache, eventually
from tests.server.running_server import DEMO

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).resolve().parent / "serve_fake.py"
LARGEST = 16 * 2**20


class Echo:
    """Two processes: the real front end, and the echoing engine."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        ready = folder / "ready.json"
        engine = {"info": {"max_running_requests": 128, "max_queued": 512}, "token_seconds": 0.002}
        command = [sys.executable, str(SCRIPT), str(ready), json.dumps(engine), json.dumps(settings)]
        self.log = folder / "log"
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        eventually(ready.exists, 60)
        self.facts = json.loads(ready.read_text())
        self.target, self.pid = self.facts["target"], self.facts["pid"]

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def echo(tmp_path: Path) -> Iterator[Echo]:
    server = Echo(tmp_path, model_path=str(DEMO), ids_only=False)
    yield server
    server.end()


@pytest.fixture
def large(tmp_path: Path) -> Iterator[Echo]:
    server = Echo(tmp_path, max_message_bytes=LARGEST)
    yield server
    server.end()


def judge(report: Report, count: int, log: str) -> None:
    assert report.wrong == [], report.wrong
    assert report.spoiled == [], report.spoiled
    assert report.served >= 8 and sum(report.statuses.values()) == count
    assert {"INVALID_ARGUMENT", "UNIMPLEMENTED", "CANCELLED", "RESOURCE_EXHAUSTED"} <= report.statuses.keys()
    assert report.stalled > 0 and report.quiet and report.beside
    assert max(report.beside) < 3, "a good stream stood still"
    for name, (before, most) in report.megabytes.items():
        assert most - before < 300, f"{name} grew from {before:.0f} to {most:.0f} MB"
    assert "Traceback" not in log, log[-3000:]


def test_hostile_requests_get_their_status_and_hurt_nobody(echo: Echo) -> None:
    pids = {"front end": echo.pid, "engine": echo.facts["engine_pid"]}
    report = asyncio.run(asyncio.wait_for(fuzz(echo.target, 2000, 7, pids, 2.0), 250))
    judge(report, 2000, echo.log.read_text())


def test_hostile_requests_against_the_demo_model(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Grammars that blow up, and masks beside the good streams."""
    program = Program(tmp_path, "--constraint-warmup", cache=compilation_cache(tmp_path_factory))
    try:
        program.wait_until_ready()
        pids = {"front end": program.facts["pid"], "engine": program.facts["engine_pid"]}
        report = asyncio.run(asyncio.wait_for(fuzz(program.target, 2000, 0, pids, 2.0), 250))
        judge(report, 2000, program.output())
        assert program.client.server_info().load.compilations_after_warmup == 0
    finally:
        program.end()


@pytest.mark.parametrize("kind", ["ids", "stops", "biases", "text", "unknown field"])
def test_many_of_the_largest_messages_at_once(large: Echo, kind: str) -> None:
    """64 of 16 MiB are 1 GB; as Python objects they were 12."""
    data = payloads(LARGEST)[kind]()
    row = asyncio.run(measure(large.target, large.pid, kind, data, 64, 8))
    assert row["statuses"] == {"INVALID_ARGUMENT": 64} and row["small_failed"] == []
    assert row["mb_peak"] - row["mb_before"] < 700, row


def test_uploads_that_stall_give_way(large: Echo) -> None:
    data = payloads(LARGEST)["text"]()
    row = asyncio.run(measure_stalled(large.target, large.pid, data, 48, 6.0))
    assert row["stalled"] > 0 and "RESOURCE_EXHAUSTED" in row["statuses"] and row["small_failed"] == []
    assert row["small_requests"] >= 2 and row["small_longest_s"] < 8, row
    assert row["mb_peak"] - row["mb_before"] < 700, row


def test_nothing_is_read_from_those_who_may_not_ask(tmp_path: Path) -> None:
    server = Echo(tmp_path, max_message_bytes=LARGEST, api_keys=["s3cret"])
    data = payloads(LARGEST)["text"]()

    async def knock() -> list[str]:
        async with grpc.aio.insecure_channel(server.target, options=OPTIONS) as channel:
            return await asyncio.gather(*(send(channel, data) for _ in range(32)))

    try:
        before = megabytes(server.pid)
        reset_peak(server.pid)
        assert set(asyncio.run(knock())) == {"UNAUTHENTICATED"}
        assert peak(server.pid) - before < 60
    finally:
        server.end()


def test_probes_that_stall_take_no_memory(echo: Echo) -> None:
    """They need no token. 200 of 4 MiB, each short of its last 64 KiB, were 800 MB."""
    data = health_pb2.HealthCheckRequest(service="x" * (4 * 2**20 - 4096)).SerializeToString()
    row = asyncio.run(measure_stalled(echo.target, echo.pid, data, 200, 8.0, "/grpc.health.v1.Health/Check"))
    assert row["small_failed"] == [] and row["small_requests"] >= 2, row
    assert row["mb_peak"] - row["mb_before"] < 500, row


def test_what_is_larger_than_the_limit_is_refused(echo: Echo) -> None:
    """The limit is 4 MiB. gRPC's core refuses a larger message when all of it is there, so all may be there at once:
    512 MB of these."""
    data = payloads(LARGEST)["text"]()
    row = asyncio.run(measure(echo.target, echo.pid, "text", data, 32, 4))
    assert row["statuses"] == {"RESOURCE_EXHAUSTED": 32} and row["small_failed"] == []
    assert row["mb_peak"] - row["mb_before"] < 700, row


def test_more_than_the_memory_for_messages_is_given_up(echo: Echo) -> None:
    """1.5 GB in uploads of 64 MiB that stop before their end: the core holds them all, half a GB is let in."""
    data = payloads(4 * LARGEST)["text"]()
    for seconds in (6.0, 40.0):  # a busy machine does not get so much sent in the shorter time
        row = asyncio.run(measure_stalled(echo.target, echo.pid, data, 24, seconds))
        if row["statuses"] != {"DEADLINE_EXCEEDED": 24}:
            break
    assert row["statuses"].get("RESOURCE_EXHAUSTED", 0) >= 8 and row["small_failed"] == [], row
    assert row["mb_peak"] - row["mb_before"] < 1000, row
