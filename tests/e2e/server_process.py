"""`jqserve-server` as a user starts it: a process of its own, on a free port."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

START_SECONDS = 180  # two busy cores compile a tiny model's buckets


class ServerProcess(NamedTuple):
    target: str
    process: subprocess.Popen[str]
    log: Path


@contextlib.contextmanager
def server_process(model: Path, *flags: str) -> Iterator[ServerProcess]:
    """A ready server; drained with SIGTERM at the end, and its exit status checked."""
    with tempfile.TemporaryDirectory() as folder:
        ready, log = Path(folder) / "ready.json", Path(folder) / "server.log"
        command = [sys.executable, "-m", "jqserve.cli.server", "--model-path", str(model), "--port", "0"]
        with log.open("w") as output:
            process = _start([*command, "--ready-file", str(ready), *flags], output)
            try:
                until = time.monotonic() + START_SECONDS
                while not ready.exists():
                    assert process.poll() is None, f"the server ended: {log.read_text()}"
                    assert time.monotonic() < until, f"not ready in {START_SECONDS} s: {log.read_text()}"
                    time.sleep(0.05)
                address = json.loads(ready.read_text())
                yield ServerProcess(f"{address['host']}:{address['port']}", process, log)
                process.send_signal(signal.SIGTERM)
                assert process.wait(60) == 0, log.read_text()
            finally:
                if process.poll() is None:
                    process.kill()
                    process.wait()


def _start(command: list[str], output: IO[str]) -> subprocess.Popen[str]:
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, text=True, env=environment)
