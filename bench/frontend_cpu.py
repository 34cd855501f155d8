"""What the front end costs: processor time per request, message and token, and how late tokens leave it.

    python -m bench.frontend_cpu [--streams 64,256,384] [--step-ms 11] [--input 128] [--output 128] [-- FLAGS]

Starts the real front end with an engine that gives every stream a token each step (`bench/echo_engine`), so that all
the work is the front end's. Closed loop, from processes of its own. A row per number of streams and kind ("one token":
`--output 1`, where nothing but the request is paid for):

    cpu_us_per_request, cpu_us_per_token, messages_per_second, tokens_per_message
    core          share of one core that the front end took
    efficiency    output tokens/s over streams / step: 1 - what a request waits for beside its steps
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def processor_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(target: str, pid: int, streams: int, lengths: tuple[int, int], requests: int, clients: int) -> dict:
    """A closed loop of `requests` requests, `streams` at once."""
    from bench.load_client import drive
    from bench.workload import random_items

    items = random_items(requests, *lengths, vocabulary=4000, ratio=1.0, seed=streams)
    before = processor_seconds(pid)
    records = drive(target, items, concurrency=streams, rate=None, processes=clients)
    cpu = processor_seconds(pid) - before
    if failed := [record.error for record in records if record.error]:
        raise RuntimeError(f"{len(failed)} requests failed: {failed[0]}")
    seconds = max(r.ended for r in records) - min(r.began for r in records)
    messages, tokens = sum(len(r.arrivals) for r in records), sum(n for r in records for _, n in r.arrivals)
    return {
        "streams": streams,
        "output": lengths[1],
        "requests": requests,
        "seconds": round(seconds, 3),
        "core": round(cpu / seconds, 3),
        "cpu_us_per_request": round(cpu / requests * 1e6, 1),
        "cpu_us_per_token": round(cpu / tokens * 1e6, 2),
        "tokens_per_second": round(tokens / seconds, 1),
        "messages_per_second": round(messages / seconds, 1),
        "tokens_per_message": round(tokens / messages, 2),
    }


def serve(settings: dict[str, Any], flags: list[str]) -> int:
    """The server, in a process of its own."""
    import asyncio
    import dataclasses

    from jqserve.cli import server as cli
    from jqserve.server.app import Server
    from jqserve.server.launch import launch_process

    config = cli.server_config(cli.parser().parse_args(["--model-path", "echo", *flags]))
    config = dataclasses.replace(config, port=0, ids_only=True, ready_file=settings["ready"])
    command = (sys.executable, "-m", "bench.echo_engine", str(settings["step"]), "--fd")
    return asyncio.run(Server(config, functools.partial(launch_process, command=command)).run())


def main() -> int:
    own, flags = sys.argv[1:], []
    if "--" in own:
        own, flags = own[: own.index("--")], own[own.index("--") + 1 :]
    if own[:1] == ["--serve"]:
        return serve(json.loads(own[1]), flags)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", default="64,256,384")
    parser.add_argument("--step-ms", type=float, default=11.0)
    parser.add_argument("--input", type=int, default=128)
    parser.add_argument("--output", type=int, default=128)
    parser.add_argument("--requests-per-stream", type=int, default=3)
    parser.add_argument("--clients", type=int, default=4, help="processes that send")
    parser.add_argument("--out", default=None)
    args = parser.parse_args(own)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        ready = Path(folder) / "ready.json"
        settings = json.dumps({"ready": str(ready), "step": args.step_ms / 1e3})
        command = [sys.executable, "-m", "bench.frontend_cpu", "--serve", settings, "--", *flags]
        with open(Path(folder) / "log", "w") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            while not ready.exists():
                if process.poll() is not None:
                    raise SystemExit((Path(folder) / "log").read_text()[-2000:])
                time.sleep(0.05)
            facts = json.loads(ready.read_text())
            target, pid = f"127.0.0.1:{facts['port']}", facts["pid"]
            measure(target, pid, 8, (args.input, 4), 64, args.clients)
            for streams in (int(n) for n in args.streams.split(",")):
                count = streams * args.requests_per_stream
                for output in (1, args.output):
                    row = measure(target, pid, streams, (args.input, output), count, args.clients)
                    if output > 1:
                        row["efficiency"] = round(row["tokens_per_second"] * args.step_ms / 1e3 / streams, 4)
                    rows.append(row)
                    print(json.dumps(row), flush=True)
        finally:
            process.terminate()
            process.wait(30)
    from bench.record import write

    print(write("frontend_cpu", rows, args.out, step_ms=args.step_ms, input=args.input, server_flags=flags))
    return 0


if __name__ == "__main__":
    sys.exit(main())
