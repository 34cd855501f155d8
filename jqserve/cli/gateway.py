"""`jqserve gateway`: an OpenAI-compatible HTTP endpoint (smg) in front of running workers, or of workers of its own.

    jqserve gateway --workers grpc://10.0.0.1:30001 grpc://10.0.0.2:30001
    jqserve gateway --model-path DIR --workers 2

smg speaks HTTP, applies chat templates, parses tool calls and reasoning, balances and retries; see its --help for what
may follow `--`. Workers of our own are started on this machine, one GPU each, and started again when they die. It finds
out by itself which engine protocol a worker speaks (--worker-args '--grpc-compat sglang').
"""

from __future__ import annotations

import argparse
import ipaddress
import json
import logging
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from jqserve.cli import server
from jqserve.cli.defaults_shown import DefaultsShown
from jqserve.cli.gateway_flags import check_policy, check_smg_flags, check_worker_flags
from jqserve.errors import JqserveError, UnsupportedError
from jqserve.server.transport import address

log = logging.getLogger("jqserve.gateway")

HEALTH_SECONDS = 5  # smg's own default of 60 leaves a dead worker in rotation for minutes
BREAKER_SECONDS = 10  # and its other 60 leave one that died under load and is back without work for a minute
POLL_SECONDS = 0.2
RESTART_SECONDS = (1, 5, 15, 60)  # between the restarts of a worker that keeps dying
GRACE_SECONDS = 190  # smg lets requests in flight run for 180


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = DefaultsShown
    add = parser.add_argument
    add("--workers", nargs="+", metavar="URL|N", default=["1"], help="grpc://host:port ..., or how many to start")
    add("--model-path", metavar="DIR|HUB_ID", default=None, help="start workers with this model on this machine")
    add("--worker-args", metavar="'FLAGS'", default="", help="more flags of jqserve-server, for workers started here: "
        "'--grpc-compat sglang --constraint-warmup' (a single one after a '=': --worker-args=--admin)")  # fmt: skip
    add("--host", default="127.0.0.1", help="0.0.0.0 serves everybody who can reach this machine")
    add("--port", type=server.port, default=30000, help="of the HTTP endpoint; 0 picks a free one and prints it")
    add("--policy", default="round_robin", help="how smg chooses a worker")
    add("--api-key", default=None, help="that HTTP clients have to send")
    add("--tool-call-parser", default=None, help="how tool calls are read from the answer (qwen, llama, mistral, ...)")
    add("--reasoning-parser", default=None, help="how thoughts are told from the answer (qwen3, deepseek_r1, ...)")
    add("--prometheus-port", type=server.port, default=0, help="of smg's own metrics; 0: a free one")
    add("--smg", metavar="PROGRAM", default=None, help="the smg program, if it is not on the path")
    add("smg_args", nargs=argparse.REMAINDER, metavar="-- ...", help="further flags of `smg launch`")


def run(args: argparse.Namespace) -> int:
    """Until a signal. Returns 0 then, 1 when smg ended by itself."""
    logging.basicConfig(level="INFO", stream=sys.stderr, format="%(asctime)s %(levelname).1s %(name)s: %(message)s")
    count = worker_count(args)
    smg = find_smg(args.smg)
    check_worker_flags(args.worker_args)
    check_smg_flags(smg, args.smg_args)
    check_policy(smg, args.policy)
    check_host(args.host)
    port = free_port(args.host, "--port", args.port)
    metrics = free_port("127.0.0.1", "--prometheus-port", args.prometheus_port)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    with tempfile.TemporaryDirectory(prefix="jqserve-gateway-") as folder:
        devices = gpus_for(count)
        workers = [Worker(args, Path(folder) / f"{i}.json", devices[i]) for i in range(count)]
        gateway: subprocess.Popen[bytes] | None = None
        try:
            for worker in workers:
                worker.start()
            if not all(worker.wait_until_ready(stop) for worker in workers):
                return 0  # told to stop
            urls = [worker.url for worker in workers] or args.workers
            command = smg_command(smg, args, urls, port, metrics)
            log.info("%s", shlex.join(hide_key(command)))
            gateway = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
            print(f"gateway on http://{address(args.host, port)}/v1 for {', '.join(urls)}", flush=True)
            while not stop.wait(POLL_SECONDS):
                if gateway.poll() is not None:
                    log.error("smg ended with status %d", gateway.returncode)
                    return 1
                for worker in workers:
                    worker.keep_alive()
            return 0
        finally:
            end([gateway] if gateway else [])  # no new requests ...
            end([worker.process for worker in workers if worker.process is not None])  # ... then the running ones drain


def worker_count(args: argparse.Namespace) -> int:
    """How many workers to start; 0: their addresses are given. Raises `UnsupportedError`."""
    numbers = [word for word in args.workers if word.isdecimal()]
    if args.model_path is None:
        bad = [url for url in args.workers if not url.startswith(("grpc://", "grpcs://"))]
        if bad:
            raise UnsupportedError(
                f"--workers {' '.join(bad)}: expected grpc://host:port (or give --model-path, and how many to start)"
            )
        if args.worker_args:
            raise UnsupportedError("--worker-args are for workers started here: give --model-path, or leave them out")
        if tls := [url for url in args.workers if url.startswith("grpcs://")]:
            # smg 1.13.0 connects, sends no handshake, and logs "gRPC connection failed: transport error".
            log.warning("smg up to 1.13.0 opens no TLS to gRPC workers: %s may never answer", " ".join(tls))
        return 0
    if len(args.workers) != 1 or not numbers or int(numbers[0]) < 1:
        raise UnsupportedError("with --model-path, --workers is how many to start: --workers 2")
    return int(numbers[0])


def find_smg(given: str | None) -> str:
    """Beside this Python, or on the path. Raises `UnsupportedError`."""
    beside = Path(sys.executable).parent / "smg"
    found = shutil.which(given) if given else (str(beside) if beside.exists() else shutil.which("smg"))
    if not found:
        raise UnsupportedError(
            f"{given or 'smg'} is not installed; pip install 'jqserve[gateway]', or name it with --smg"
        )
    return found


def smg_command(smg: str, args: argparse.Namespace, urls: list[str], port: int, metrics: int) -> list[str]:
    """No model files for smg: it asks a worker for the tokenizer."""
    command = [smg, "launch", "--host", args.host, "--port", str(port), "--worker-urls", *urls]
    command += ["--policy", args.policy, "--health-check-interval-secs", str(HEALTH_SECONDS)]
    command += ["--cb-timeout-duration-secs", str(BREAKER_SECONDS)]
    command += ["--prometheus-host", "127.0.0.1", "--prometheus-port", str(metrics)]
    for flag in ("api_key", "tool_call_parser", "reasoning_parser"):
        if value := getattr(args, flag):
            command += [f"--{flag.replace('_', '-')}", value]
    return command + [word for word in args.smg_args if word != "--"]


def hide_key(command: list[str]) -> list[str]:
    return ["..." if before == "--api-key" else word for before, word in zip(["", *command], command)]


def gpus_for(count: int) -> list[str | None]:
    """CUDA_VISIBLE_DEVICES of each worker: a GPU each when there are several, else what this process has."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = [name for name in (given or "").split(",") if name]
    if given is None and shutil.which("nvidia-smi"):
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout
        devices = [str(i) for i, line in enumerate(listed.splitlines()) if line.startswith("GPU ")]
    if count <= 1 or not devices:
        return [None] * count
    if len(devices) < count:
        raise UnsupportedError(
            f"--workers {count}: this machine has {len(devices)} GPUs, and a worker takes a whole one"
        )
    return list(devices[:count])


def check_host(host: str) -> None:
    """Raises `UnsupportedError`: smg would, once the workers have loaded."""
    try:
        ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        raise UnsupportedError(f"--host {host}: smg binds to an IP address: 127.0.0.1, 0.0.0.0, ::1, ::") from None


def free_port(host: str, flag: str, wanted: int = 0) -> int:
    """`wanted`, or a free one (0). Raises `UnsupportedError` when it cannot be had, before anything is loaded."""
    host = host.strip("[]")
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # what a gateway that has ended leaves behind
        try:
            probe.bind((host, wanted))
        except OSError as error:
            raise UnsupportedError(
                f"{flag} {wanted} on {host}: {(error.strerror or str(error)).lower()}; {flag} 0 picks a free one"
            ) from None
        return int(probe.getsockname()[1])


class Worker:
    """A jqserve-server of ours. It keeps its port when it is started again, so that smg finds it."""

    def __init__(self, args: argparse.Namespace, ready_file: Path, device: str | None) -> None:
        self.port = free_port("127.0.0.1", "--port")
        self.url = f"grpc://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None
        self._ready_file = ready_file
        self._environment = os.environ | ({"CUDA_VISIBLE_DEVICES": device} if device else {})
        self._command = [sys.executable, "-m", "jqserve.cli.server", "--model-path", args.model_path]
        self._command += ["--host", "127.0.0.1", "--port", str(self.port), "--ready-file", str(ready_file)]
        self._command += shlex.split(args.worker_args)
        self._deaths = 0
        self._restart_at = 0.0

    def start(self) -> None:
        self._ready_file.unlink(missing_ok=True)
        self.process = subprocess.Popen(
            self._command, stdin=subprocess.DEVNULL, start_new_session=True, env=self._environment
        )

    def wait_until_ready(self, stop: threading.Event) -> bool:
        """False: told to stop. Raises JqserveError when it ends instead; its own words are on stderr already."""
        assert self.process is not None
        while not self._ready_file.exists():
            if stop.wait(POLL_SECONDS):
                return False
            if self.process.poll() is not None:
                raise JqserveError(f"a worker ended with status {self.process.returncode} before it was ready")
        facts = json.loads(self._ready_file.read_text())
        log.info("worker %d is ready on %s", facts["pid"], self.url)
        return True

    def keep_alive(self) -> None:
        """Starts it again after it died, later and later if it keeps dying."""
        if self.process is not None and self.process.poll() is not None:
            wait = RESTART_SECONDS[min(self._deaths, len(RESTART_SECONDS) - 1)]
            self._deaths += 1
            log.error("worker %s ended with status %d; again in %d s", self.url, self.process.returncode, wait)
            self.process, self._restart_at = None, time.monotonic() + wait
        elif self.process is None and time.monotonic() >= self._restart_at:
            self.start()
        elif self._deaths and self._ready_file.exists():
            self._deaths = 0


def end(processes: list[subprocess.Popen[bytes]]) -> None:
    """SIGTERM to all, and SIGKILL to those that are there after the grace period."""
    for process in processes:
        if process.poll() is None:
            process.terminate()
    until = time.monotonic() + GRACE_SECONDS
    for process in processes:
        try:
            process.wait(max(0.1, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
