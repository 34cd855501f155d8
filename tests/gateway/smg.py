"""A real smg (extra [gateway]) in front of workers, for the tests."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "server" / "serve_fake.py"
DEMO = Path(__file__).resolve().parents[2] / "jqserve" / "demo" / "model"


def program() -> str:
    """JQSERVE_TEST_SMG, or the one beside this Python, or on the path. Skips the test when there is none."""
    beside = Path(sys.executable).parent / "smg"
    found = os.environ.get("JQSERVE_TEST_SMG") or (str(beside) if beside.exists() else shutil.which("smg"))
    if not found:
        pytest.skip("smg is not installed: pip install '.[gateway]', or name it in JQSERVE_TEST_SMG")
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def eventually(condition: Callable[[], Any], seconds: float, what: str = "it") -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what} did not happen in time"
        time.sleep(0.05)


class Gateway:
    """smg itself; `post` speaks JSON to it."""

    def __init__(self, url: str, process: subprocess.Popen[bytes] | None = None) -> None:
        self.url, self.process = url, process

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.url + path, timeout=10) as answer:
            return json.load(answer)

    def post(self, path: str, body: dict[str, Any], timeout: float = 60) -> tuple[int, Any]:
        """(status, JSON); never raises for a status."""
        data = json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"content-type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            text = error.read()
            with contextlib.suppress(ValueError):
                return error.code, json.loads(text)
            return error.code, text

    def stream(self, path: str, body: dict[str, Any], timeout: float = 60) -> Iterator[Any]:
        """The events of an SSE stream, as JSON."""
        data = json.dumps({**body, "stream": True}).encode()
        request = urllib.request.Request(self.url + path, data, {"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            for line in answer:
                if line.startswith(b"data: ") and b"[DONE]" not in line:
                    yield json.loads(line[6:])

    def ready_workers(self) -> int:
        workers = self.get("/workers")["workers"]
        return sum(1 for w in workers if str(w.get("status", w.get("is_healthy"))).lower() in ("ready", "true"))

    def models(self) -> list[str]:
        with contextlib.suppress(urllib.error.URLError, ConnectionError):
            return [entry["id"] for entry in self.get("/v1/models")["data"]]
        return []


@contextlib.contextmanager
def gateway(folder: Path, urls: list[str], model: str, *flags: str) -> Iterator[Gateway]:
    """Ready, with every worker."""
    port = free_port()
    command = [program(), "launch", "--host", "127.0.0.1", "--port", str(port), "--worker-urls", *urls]
    command += ["--prometheus-host", "127.0.0.1", "--prometheus-port", str(free_port()), "--log-level", "warn"]
    # As `jqserve gateway`, and faster: smg's breaker opens after ten failures and stays so for 60 s by default.
    command += ["--health-check-interval-secs", "1", "--cb-timeout-duration-secs", "3", *flags]
    with open(folder / "smg.log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
    running = Gateway(f"http://127.0.0.1:{port}", process)
    try:
        eventually(lambda: model in running.models() or process.poll() is not None, 60, "smg's registration")
        assert process.poll() is None, (folder / "smg.log").read_text()
        eventually(lambda: running.ready_workers() == len(urls), 30, "every worker's registration")
        probe = {"model": model, "prompt": "one", "max_tokens": 1}  # the tokenizer loads after the registration
        eventually(lambda: running.post("/v1/completions", probe)[0] == 200, 30, "the first answer")
        yield running
    finally:
        process.kill()  # asked politely, it takes five seconds
        process.wait()


class Worker:
    """A jqserve front end and the echoing engine, two processes. smg reads the demo model's tokenizer itself."""

    def __init__(self, folder: Path, name: str, *, port: int = 0, **engine: Any) -> None:
        self.ready_file = folder / f"{name}.json"
        self.ready_file.unlink(missing_ok=True)
        self.port = port or free_port()
        settings = {"model_path": str(DEMO), "served_model_name": "echo", "port": self.port}
        command = [sys.executable, str(SCRIPT), str(self.ready_file), json.dumps(engine), json.dumps(settings)]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    @property
    def url(self) -> str:
        return f"grpc://127.0.0.1:{self.port}"

    def wait_until_ready(self) -> None:
        eventually(self.ready_file.exists, 60, "the worker's start")

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
