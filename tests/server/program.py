"""jqserve-server on the demo model as a program of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from jqserve.client import Client

#: 32 pages of 16 tokens for up to 16 sequences of up to 120 tokens: preemption is certain
SMALL = "--max-running-requests 16 --chunked-prefill-size 64 --context-length 384 --num-pages 32".split()  # noqa: SIM905
SMALL += ["--schedule-conservativeness", "0"]


class Program:
    """jqserve-server in its own process."""

    def __init__(self, folder: Path, *flags: str, cache: Path | None = None) -> None:
        self.ready_file = folder / "ready.json"
        self.ready_file.unlink(missing_ok=True)
        command = [sys.executable, "-m", "jqserve.cli.server", "--port", "0", "--ready-file", str(self.ready_file)]
        command += ["--compilation-cache-dir", str(cache or folder / "cache"), *SMALL, *flags]
        self.log = open(folder / "log", "w+")  # noqa: SIM115 (closed with the program)
        self.process = subprocess.Popen(command, stdout=self.log, stderr=subprocess.STDOUT)

    def wait_until_ready(self) -> None:
        eventually(lambda: self.ready_file.exists() or self.process.poll() is not None, 240)
        assert self.process.poll() is None, self.output()
        self.facts = json.loads(self.ready_file.read_text())
        self.target = f"127.0.0.1:{self.facts['port']}"
        self.client = Client(self.target)

    def output(self) -> str:
        return Path(self.log.name).read_text()

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.log.close()


def compilation_cache(factory: pytest.TempPathFactory) -> Path:
    """One for all modules of a run, also under xdist: the same programs are compiled once."""
    base = factory.getbasetemp()
    return (base.parent if base.name.startswith("popen-") else base) / "compilation-cache"


def eventually(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def idle(client: Client) -> bool:
    load = client.server_info().load
    return load.running == load.waiting == load.pages_used == 0


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] not in "ZX"
    except FileNotFoundError:
        return False
