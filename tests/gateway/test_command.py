"""`jqserve gateway`: what it starts, and that it goes when it is told to."""

from __future__ import annotations

import argparse
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from jqserve.cli import gateway as cli
from jqserve.cli.gateway_flags import POLICIES, check_policy, check_smg_flags, check_worker_flags
from jqserve.errors import UnsupportedError
from tests.gateway.smg import DEMO, Gateway, Worker, eventually, free_port, program
from tests.server.program import compilation_cache


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


def test_where_smg_could_not_listen_is_told_before_anything_loads() -> None:
    """It ended with a traceback, minutes later."""
    for port in ("-1", "65536"):
        with pytest.raises(SystemExit):
            parse("--port", port)
    for host in ("localhost", "nosuch.invalid"):
        with pytest.raises(UnsupportedError, match=r"--host .*: smg binds to an IP address"):
            cli.run(parse("--model-path", "absent", "--host", host))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for flag in ("--port", "--prometheus-port"):
            with pytest.raises(UnsupportedError, match=f"{flag} {port} on 127.0.0.1: address already in use"):
                cli.run(parse("--model-path", "absent", flag, port))


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--grpc-compat none", "cannot drive"),
        ("--grpc-compat=trt", "invalid choice"),
        ("--absent 1", "no --absent"),
        ("--page-size 0", "less than 1"),
        ("--port 31000", "--port is set by jqserve gateway"),
        ("--model-path x", "--model-path is set by"),
        ("--api-key-file keys", "--api-key-file"),
        ("--tls-cert a --tls-key b", "--tls-cert"),
        ("--unix-socket /tmp/x", "--unix-socket"),
        ("--served-model-name 'x", "No closing quotation"),
    ],
)
def test_flags_that_would_make_no_worker_are_refused_before_one_loads(flags: str, says: str) -> None:
    with pytest.raises(UnsupportedError, match=says) as caught:
        check_worker_flags(flags)
    assert "--worker-args" in str(caught.value)


def test_flags_that_do_are_not() -> None:
    check_worker_flags("")
    check_worker_flags("--grpc-compat sglang --served-model-name 'a b' --metrics-port 0 --constraint-warmup")


def test_flags_that_smg_does_not_have_are_refused_before_a_worker_loads() -> None:
    smg = program()
    check_smg_flags(smg, ["--", "--log-level", "warn", "--retry-max-retries=2", "--prometheus-h", "127.0.0.1"])
    with pytest.raises(UnsupportedError, match="for the workers: --worker-args '--grpc-compat"):
        check_smg_flags(smg, ["--", "--grpc-compat", "sglang"])
    with pytest.raises(UnsupportedError, match=r"no such flag$"):
        check_smg_flags(smg, ["--absent"])


def test_a_policy_that_smg_does_not_have_is_refused_before_a_worker_loads(tmp_path: Path) -> None:
    silent = tmp_path / "smg"  # its help names no policies
    silent.write_text("#!/bin/sh\n")
    silent.chmod(0o755)
    for smg in (program(), str(silent)):
        for policy in POLICIES:
            check_policy(smg, policy)
        with pytest.raises(UnsupportedError, match=r"--policy fastest: .*supported: random, round_robin"):
            check_policy(smg, "fastest")
    with pytest.raises(UnsupportedError, match="--policy round-robin"):
        cli.run(parse("--model-path", "absent", "--policy", "round-robin", "--smg", program()))


def test_what_may_not_work_with_running_workers_is_told(caplog: pytest.LogCaptureFixture) -> None:
    assert cli.worker_count(parse("--workers", "grpcs://a:1")) == 0 and "grpcs://a:1 may never answer" in caplog.text
    with pytest.raises(UnsupportedError, match="--worker-args"):
        cli.worker_count(parse("--workers", "grpc://a:1", "--worker-args=--admin"))


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


@pytest.mark.slow
def test_workers_of_our_own_take_the_servers_flags(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    smg, port = program(), free_port()
    flags = "--grpc-compat sglang --served-model-name own --context-length 128 --max-running-requests 2"
    flags += f" --disable-warmup --compilation-cache-dir {compilation_cache(tmp_path_factory)}"
    command = [sys.executable, "-m", "jqserve.cli.main", "gateway", "--model-path", str(DEMO), "--workers", "1"]
    command += ["--worker-args", flags, "--port", str(port), "--smg", smg]
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        running = Gateway(f"http://127.0.0.1:{port}")
        eventually(lambda: "own" in running.models() or process.poll() is not None, 120)
        assert process.poll() is None, (tmp_path / "log").read_text()
        (worker,) = running.get("/workers")["workers"]
        assert worker["runtime_type"] == "sglang"
        body = {"model": "own", "prompt": "one two", "max_tokens": 4}
        eventually(lambda: running.post("/v1/completions", body)[0] == 200, 60)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0, (tmp_path / "log").read_text()
    finally:
        process.kill()
        process.wait()
