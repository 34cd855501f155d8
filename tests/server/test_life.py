"""Two real processes with the fake engine: start, drain, both deaths. Nothing hangs, every caller gets a status."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from jqserve.client import Client, ServerError
from jqserve.server.app import SERVICE
from jqserve.server.config import ServerConfig
from jqserve.server.pb import jqserve_pb2 as pb
from tests.server.fake_engine import SLOW, STUCK
from tests.server.running_server import Running

SCRIPT = Path(__file__).resolve().parent / "serve_fake.py"


class Program:
    """serve_fake.py, ready."""

    def __init__(self, folder: Path, *, wait: bool = True, **engine: object) -> None:
        self.ready_file = folder / "ready.json"
        command = [sys.executable, str(SCRIPT), str(self.ready_file), json.dumps(engine)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        if wait:
            eventually(self.ready_file.exists, 30)
            facts = json.loads(self.ready_file.read_text())
            self.engine_pid: int = facts["engine_pid"]
            assert facts["pid"] == self.process.pid
            self.client = Client(f"127.0.0.1:{facts['port']}")

    def end(self, timeout: float = 20) -> tuple[int, str]:
        """Exit status and standard error."""
        _, errors = self.process.communicate(timeout=timeout)
        return self.process.returncode, errors


@pytest.fixture
def program(tmp_path: Path) -> Iterator[Program]:
    running = Program(tmp_path)
    yield running
    running.client.close()
    running.process.kill()
    running.process.communicate()


def eventually(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] not in "ZX"
    except FileNotFoundError:
        return False


def test_the_program_under_test_is_this_checkouts(program: Program, tmp_path: Path) -> None:
    """A checkout beside the installed one tested the installed one's server."""
    root = str(SCRIPT.parents[2])
    code = f"import runpy; runpy.run_path({str(SCRIPT)!r}); import jqserve; print(jqserve.__file__)"
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == f"{root}/jqserve/__init__.py"
    environment = Path(f"/proc/{program.engine_pid}/environ").read_text().split("\0")
    assert any(variable.startswith(f"PYTHONPATH={root}") for variable in environment)


def in_background(stream: Iterator[str]) -> tuple[threading.Thread, list[object]]:
    """Reads a stream on a thread; the list ends with what ended it."""
    seen: list[object] = []

    def read() -> None:
        try:
            seen.extend(stream)
            seen.append("done")
        except ServerError as error:
            seen.append(error)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    return thread, seen


def test_sigterm_drains(program: Program) -> None:
    client, ids = program.client, [5, 6, 7]
    stream = client.generate(ids, max_new_tokens=60, seed=SLOW, flush_tokens=1)
    next(stream.events())
    program.process.send_signal(signal.SIGTERM)
    eventually(lambda: client.server_info().state == pb.SERVER_STATE_DRAINING)
    with pytest.raises(ServerError) as caught:
        client.generate(ids, max_new_tokens=1).wait()
    assert caught.value.code is grpc.StatusCode.UNAVAILABLE and "shutting down" in caught.value.details
    with grpc.insecure_channel(f"127.0.0.1:{json.loads(program.ready_file.read_text())['port']}") as channel:
        health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=SERVICE))
        assert health.status == health_pb2.HealthCheckResponse.NOT_SERVING
    result = stream.wait()
    assert len(result.token_ids) == 60 and result.finish_reason == "length"
    code, errors = program.end()
    assert code == 0, errors
    assert not alive(program.engine_pid)


def test_a_second_sigterm_ends_what_runs(program: Program) -> None:
    thread, seen = in_background(iter(program.client.generate([5], max_new_tokens=400, seed=STUCK)))
    eventually(lambda: program.client.server_info().load.running == 1)
    os.kill(program.engine_pid, signal.SIGTERM)  # a service manager may send it to both: the engine leaves it to us
    for _ in range(2):
        program.process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
    thread.join(10)
    assert isinstance(seen[-1], ServerError) and seen[-1].code is grpc.StatusCode.UNAVAILABLE
    assert program.end()[0] == 0


def test_killing_the_engine_ends_streams_with_a_status_and_the_server(program: Program) -> None:
    client = program.client
    running = client.generate([5, 6], max_new_tokens=400, seed=SLOW)
    next(running.events())
    thread, queued = in_background(iter(client.generate([5], max_new_tokens=400, seed=STUCK)))
    eventually(lambda: client.server_info().load.running == 2)
    began = time.monotonic()
    os.kill(program.engine_pid, signal.SIGKILL)
    with pytest.raises(ServerError) as caught:
        running.wait()
    assert caught.value.code is grpc.StatusCode.INTERNAL and "died" in caught.value.details
    thread.join(5)
    assert isinstance(queued[-1], ServerError) and queued[-1].code is grpc.StatusCode.UNAVAILABLE
    assert time.monotonic() - began < 2
    with pytest.raises(ServerError) as caught:
        client.generate([5], max_new_tokens=1, timeout=5).wait()
    assert caught.value.code is grpc.StatusCode.UNAVAILABLE
    code, errors = program.end()
    assert code == 1 and "killed by SIGKILL" in errors


@pytest.mark.parametrize("load_seconds", [0, 30], ids=["serving", "loading"])
def test_killing_the_front_end_ends_the_engine(tmp_path: Path, load_seconds: float) -> None:
    if load_seconds:
        program = Program(tmp_path, wait=False, load_seconds=load_seconds)
        children = Path(f"/proc/{program.process.pid}/task/{program.process.pid}/children")
        eventually(lambda: bool(children.read_text().split()), 30)
        engine_pid = int(children.read_text().split()[0])
        eventually(lambda: b"fake_engine" in Path(f"/proc/{engine_pid}/cmdline").read_bytes())
        time.sleep(0.5)
    else:
        program = Program(tmp_path)
        engine_pid = program.engine_pid
    assert alive(engine_pid)
    program.process.kill()
    program.end()
    eventually(lambda: not alive(engine_pid), 5)


def test_unavailable_while_starting_then_sigterm(tmp_path: Path) -> None:
    program = Program(tmp_path, wait=False, load_seconds=30)
    lines: list[str] = []
    assert program.process.stderr is not None
    for line in program.process.stderr:
        lines.append(line)
        if "bound to" in line:
            break
    target = lines[-1].split("bound to ")[1].split(";")[0]
    with Client(target) as client:
        assert client.server_info().state == pb.SERVER_STATE_STARTING
        for call in (lambda: client.generate([5]).wait(), client.model_info):
            with pytest.raises(ServerError) as caught:
                call()
            assert caught.value.code is grpc.StatusCode.UNAVAILABLE and "starting" in caught.value.details
    program.process.send_signal(signal.SIGTERM)
    code, said = program.end()
    assert code == 0 and "told to stop before it was ready (starting" in said


@pytest.mark.parametrize(
    ("engine", "code", "text"),
    [
        ({"fail": "model.safetensors is truncated"}, 2, "model.safetensors is truncated"),
        ({"die": True}, 1, "exit status 3"),
    ],
)
def test_an_engine_that_cannot_start(tmp_path: Path, engine: dict[str, object], code: int, text: str) -> None:
    program = Program(tmp_path, wait=False, **engine)
    status, errors = program.end(30)
    assert status == code and text in errors and "Traceback" not in errors


@pytest.mark.parametrize(
    ("engine", "text"),
    [({"fail": "no config.json there"}, "no config.json there"), ({}, "no tokenizer could be loaded from")],
    ids=["no checkpoint", "no tokenizer"],
)
def test_what_is_no_checkpoint_is_not_told_to_lack_a_tokenizer(
    tmp_path: Path, engine: dict[str, object], text: str, caplog: pytest.LogCaptureFixture
) -> None:
    running = Running(ServerConfig(str(tmp_path), port=0, engine=engine), wait=False)
    assert running.over.wait(30) and running.code == 2
    assert [r.message for r in caplog.records if r.levelname == "ERROR" and text in r.message]


def test_a_ready_file_that_cannot_be_written_is_told_before_the_model_loads(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = ServerConfig("/models/echo", port=0, ids_only=True, ready_file=str(tmp_path / "no" / "ready.json"))
    running = Running(config, wait=False)
    assert running.over.wait(10) and running.code == 2
    assert "no/ready.json: no file can be written there" in caplog.text and not running.announced
