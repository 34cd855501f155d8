"""Fuzzes a running server while 8 well-behaved streams run beside it:

    python -m bench.fuzz_service --target 127.0.0.1:30000 --count 2000 [--pid FRONT_END --engine-pid ENGINE]

Without --target it starts jqserve-server on the demo model. Passes when every answer has a status that may answer it,
the well-behaved streams get what they got before, and the processes' memory has not grown by more than --max-growth.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import dataclasses
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from bench.hostile import STREAMS, Attack, attacks
from jqserve.client import AsyncClient, ServerError

CONCURRENT = 16
WELL_BEHAVED = 8
STORM = 40  # connections at once, every so many attacks
STORM_EVERY = 100


@dataclasses.dataclass
class Report:
    statuses: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    wrong: list[str] = dataclasses.field(default_factory=list)
    served: int = 0  # answers of the well-behaved streams
    spoiled: list[str] = dataclasses.field(default_factory=list)
    longest_gap: float = 0.0  # seconds between two messages of a well-behaved stream
    megabytes: dict[str, tuple[float, float]] = dataclasses.field(default_factory=dict)  # before, after


async def strike(channel: grpc.aio.Channel, attack: Attack) -> str:
    """The status that the attack got."""
    try:
        if attack.method in STREAMS:
            call: Any = channel.unary_stream(attack.method)(attack.data, timeout=attack.timeout)
            if attack.pause:
                await asyncio.sleep(attack.pause)
            count = 0
            async for _ in call:
                count += 1
                if attack.read is not None and count >= attack.read:
                    call.cancel()
                    return "CANCELLED"
            return str((await call.code()).name)
        await channel.unary_unary(attack.method)(attack.data, timeout=attack.timeout)
        return "OK"
    except grpc.aio.AioRpcError as error:
        return str(error.code().name)
    except asyncio.CancelledError:
        return "CANCELLED"


async def storm(target: str) -> None:
    """Connections that say nothing, say nonsense, or leave at once."""
    host, _, port = target.rpartition(":")
    sockets = []
    for i in range(STORM):
        with contextlib.suppress(OSError):
            one = socket.create_connection((host, int(port)), timeout=2)
            if i % 3:
                one.sendall(random.Random(i).randbytes(64))
            sockets.append(one)
    await asyncio.sleep(0.05)
    for one in sockets:
        one.close()


async def behave(client: AsyncClient, number: int, expected: list[int], stop: asyncio.Event, report: Report) -> None:
    """One stream after the other, each of which has to give `expected`."""
    while not stop.is_set():
        stream = client.generate([5 + number, 6, 7], max_new_tokens=24, temperature=0, ignore_eos=True, flush_tokens=1)
        last = time.monotonic()
        try:
            async for _ in stream.events():
                now = time.monotonic()
                report.longest_gap, last = max(report.longest_gap, now - last), now
            if stream.result.token_ids == expected:
                report.served += 1
            else:
                report.spoiled.append(f"other tokens: {stream.result.token_ids}")
        except ServerError as error:
            if error.code is not grpc.StatusCode.RESOURCE_EXHAUSTED:  # a full queue says so to everybody
                report.spoiled.append(str(error))
            await asyncio.sleep(0.05)


async def fuzz(target: str, count: int, seed: int, pids: dict[str, int]) -> Report:
    report = Report()
    stop = asyncio.Event()
    async with AsyncClient(target) as client:
        expected = []
        for i in range(WELL_BEHAVED):
            alone = client.generate([5 + i, 6, 7], max_new_tokens=24, temperature=0, ignore_eos=True)
            expected.append((await alone.wait()).token_ids)
        before = {name: megabytes(pid) for name, pid in pids.items()}
        behaved = [asyncio.create_task(behave(client, i, expected[i], stop, report)) for i in range(WELL_BEHAVED)]
        limit = asyncio.Semaphore(CONCURRENT)
        async with grpc.aio.insecure_channel(target, options=(("grpc.max_send_message_length", -1),)) as channel:

            async def one(number: int, attack: Attack) -> None:
                async with limit:
                    if number % STORM_EVERY == STORM_EVERY - 1:
                        await storm(target)
                    status = await strike(channel, attack)
                    report.statuses[status] += 1
                    if status not in attack.allowed:
                        report.wrong.append(f"#{number} {attack.kind} {attack.method}: {status}")

            await asyncio.gather(*(one(i, attack) for i, attack in enumerate(attacks(count, seed))))
        stop.set()
        await asyncio.gather(*behaved)
        end = time.monotonic() + 20
        while (load := (await client.server_info()).load).running or load.waiting or load.pages_used:
            if time.monotonic() > end:
                report.spoiled.append(f"left behind: {load}")
                break
            await asyncio.sleep(0.1)
    report.megabytes = {name: (before[name], megabytes(pid)) for name, pid in pids.items()}
    return report


def megabytes(pid: int) -> float:
    """Resident memory."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE") / 2**20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", help="host:port of a running server")
    parser.add_argument("--pid", type=int, help="of its front end, to watch the memory")
    parser.add_argument("--engine-pid", type=int)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-growth", type=float, default=300.0, metavar="MB")
    parser.add_argument("server", nargs="*", help="after --: more flags of the server that is started here")
    args = parser.parse_args()
    pids = {name: pid for name, pid in (("front end", args.pid), ("engine", args.engine_pid)) if pid}
    process = None
    target = args.target
    with tempfile.TemporaryDirectory() as folder:
        if target is None:
            ready = Path(folder) / "ready.json"
            command = [sys.executable, "-m", "jqserve.cli.server", "--port", "0", "--ready-file", str(ready)]
            command += ["--context-length", "384", "--constraint-warmup", *args.server]
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
            while not ready.exists():
                if process.poll() is not None:
                    return 1
                time.sleep(0.2)
            facts = json.loads(ready.read_text())
            target, pids = facts["target"], {"front end": facts["pid"], "engine": facts["engine_pid"]}
        began = time.monotonic()
        report = asyncio.run(fuzz(target, args.count, args.seed, pids))
        if process is not None:
            process.terminate()
            report.spoiled += [] if process.wait(60) == 0 else [f"exit status {process.returncode}"]
    grown = [name for name, (before, after) in report.megabytes.items() if after - before > args.max_growth]
    print(f"{args.count} attacks in {time.monotonic() - began:.1f} s: {dict(report.statuses)}")
    print(f"well-behaved: {report.served} answers, longest gap {report.longest_gap:.2f} s; MB {report.megabytes}")
    for text in [*report.wrong, *report.spoiled, *(f"{name} grew" for name in grown)][:50]:
        print("FAULT", text)
    return 1 if report.wrong or report.spoiled or grown or not report.served else 0


if __name__ == "__main__":
    sys.exit(main())
