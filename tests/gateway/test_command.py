"""`jqserve gateway`: what it starts, and that it goes when it is told to."""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from jqserve.cli import gateway as cli
from jqserve.errors import UnsupportedError
from tests.gateway.smg import Gateway, Worker, eventually, free_port, program


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    return parser.parse_args(words)


def test_the_command_of_smg() -> None:
    args = parse(
        "--workers", "grpc://a:1", "grpcs://b:2", "--api-key", "s3cret", "--tool-call-parser", "qwen", "--", "--x"
    )
    assert cli.worker_count(args) == 0
    command = cli.smg_command("/bin/smg", args, args.workers, 8000, 9000)
    assert command[:3] == ["/bin/smg", "launch", "--host"] and command[-1] == "--x"
    assert command[command.index("--worker-urls") + 1 :][:2] == ["grpc://a:1", "grpcs://b:2"]
    assert "s3cret" in command and "s3cret" not in cli.hide_key(command)
    assert command[command.index("--cb-timeout-duration-secs") + 1] == "10"
    assert command[command.index("--tool-call-parser") + 1] == "qwen" and "--model-path" not in command


@pytest.mark.parametrize(
    "words",
    [
        ("--workers", "127.0.0.1:1"),
        ("--workers", "2"),
        ("--model-path", "x", "--workers", "grpc://a:1"),
        ("--model-path", "x", "--workers", "0"),
        ("--model-path", "x", "--workers", "1", "2"),
    ],
)
def test_workers_are_addresses_or_a_number(words: tuple[str, ...]) -> None:
    with pytest.raises(UnsupportedError, match="--workers"):
        cli.worker_count(parse(*words))


def test_workers_of_our_own_get_a_gpu_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    assert cli.gpus_for(2) == ["4", "5"] and cli.gpus_for(1) == [None]
    with pytest.raises(UnsupportedError, match="3 GPUs"):
        cli.gpus_for(4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert cli.gpus_for(2) == [None, None]


def test_without_smg_it_says_how_to_get_it() -> None:
    with pytest.raises(UnsupportedError, match="jqserve\\[gateway\\]"):
        cli.find_smg("/absent/smg")


@pytest.mark.slow
def test_it_serves_running_workers_and_ends_when_told(tmp_path: Path) -> None:
    smg, port = program(), free_port()
    worker = Worker(tmp_path, "worker")
    worker.wait_until_ready()  # smg looks again for one that is not there only after half a minute
    command = [sys.executable, "-m", "jqserve.cli.main", "gateway", "--workers", worker.url, "--port", str(port)]
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen([*command, "--smg", smg], stdout=log, stderr=log)
    try:
        running = Gateway(f"http://127.0.0.1:{port}")
        body = {"model": "echo", "prompt": "one two", "max_tokens": 4}
        eventually(lambda: "echo" in running.models(), 60)
        eventually(lambda: running.post("/v1/completions", body)[0] == 200, 30)
        process.send_signal(signal.SIGTERM)
        assert process.wait(40) == 0, (tmp_path / "log").read_text()
        assert running.models() == []
        assert worker.process.poll() is None  # it was not ours to end
    finally:
        process.kill()
        process.wait()
        worker.end()
