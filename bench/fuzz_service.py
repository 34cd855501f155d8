"""Thousands of hostile requests while 8 well-behaved streams run beside them:

    python -m bench.fuzz_service [--count 2000] [--target 127.0.0.1:30000 --pid FRONT_END --engine-pid ENGINE]

Without --target it starts jqserve-server on the demo model. First the well-behaved streams run alone for --quiet
seconds, then the attacks (`bench/hostile`) come, 16 at a time, with connection storms and uploads that stop on their
way. Passes when every attack got a status that may answer it, every well-behaved stream the tokens that it got alone,
nothing is left behind, and the processes' memory has not grown by more than --max-growth at any time. The gaps between
tokens are reported for both phases.
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
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from bench.big_messages import OPTIONS, Stalling, peak, reset_peak, send
from bench.hostile import STREAMS, Attack, attacks, generate
from bench.latency import spread
from bench.record import write
from bench.soak_watch import megabytes
from jqserve.client import AsyncClient, ServerError
from jqserve.server.pb import jqserve_pb2 as pb

CONCURRENT = 16
STALLED = 8  # uploads that stop on their way, with each storm
WELL_BEHAVED = 8
STORM = 40  # connections at once, every so many attacks
STORM_EVERY = 100


@dataclasses.dataclass
class Report:
    statuses: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    by_kind: dict[str, collections.Counter[str]] = dataclasses.field(default_factory=dict)
    wrong: list[str] = dataclasses.field(default_factory=list)
    served: int = 0  # answers of the well-behaved streams beside the attacks
    spoiled: list[str] = dataclasses.field(default_factory=list)
    stalled: int = 0  # uploads that stopped on their way
    quiet: list[float] = dataclasses.field(default_factory=list)  # seconds between messages of well-behaved streams
    beside: list[float] = dataclasses.field(default_factory=list)  # the same, beside the attacks
    megabytes: dict[str, tuple[float, float]] = dataclasses.field(default_factory=dict)  # before, at the peak


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


async def stall(target: str) -> int:
    """Uploads that stop a little before their end, for as long as a caller would wait. How many did."""
    data = generate(token_ids=pb.TokenIds(ids=[5] * 60_000), request_id="y" * 100_000)
    async with Stalling(target, len(data) - 20_000) as relay, contextlib.AsyncExitStack() as stack:
        channels = [
            await stack.enter_async_context(grpc.aio.insecure_channel(relay.target, options=OPTIONS))
            for _ in range(STALLED)
        ]
        await asyncio.gather(*(send(channel, data, 2.0) for channel in channels))
        return relay.stalled


async def behave(
    client: AsyncClient, number: int, expected: list[int], stop: asyncio.Event, report: Report, gaps: list[float]
) -> None:
    """One stream after the other, each of which has to give `expected`."""
    while not stop.is_set():
        stream = client.generate([5 + number, 6, 7], max_new_tokens=24, temperature=0, ignore_eos=True, flush_tokens=1)
        last = None
        try:
            async for _ in stream.events():
                now = time.monotonic()
                if last is not None:
                    gaps.append(now - last)
                last = now
            if stream.result.token_ids == expected:
                report.served += gaps is report.beside
            else:
                report.spoiled.append(f"other tokens: {stream.result.token_ids}")
        except ServerError as error:
            if error.code is not grpc.StatusCode.RESOURCE_EXHAUSTED:  # a full queue says so to everybody
                report.spoiled.append(str(error))
            await asyncio.sleep(0.05)


@contextlib.asynccontextmanager
async def behaving(
    client: AsyncClient, expected: list[list[int]], report: Report, gaps: list[float]
) -> AsyncIterator[None]:
    """The well-behaved streams, until the block is left."""
    stop = asyncio.Event()
    tasks = [asyncio.create_task(behave(client, i, ids, stop, report, gaps)) for i, ids in enumerate(expected)]
    try:
        yield
    finally:
        stop.set()
        await asyncio.gather(*tasks)


async def attack_all(target: str, count: int, seed: int, report: Report) -> None:
    limit = asyncio.Semaphore(CONCURRENT)
    async with grpc.aio.insecure_channel(target, options=OPTIONS) as channel, asyncio.TaskGroup() as beside:

        async def stalled() -> None:
            report.stalled += await stall(target)

        async def one(number: int, attack: Attack) -> None:
            async with limit:
                if number % STORM_EVERY == STORM_EVERY - 1:
                    beside.create_task(stalled())
                    await storm(target)
                status = await strike(channel, attack)
                report.statuses[status] += 1
                report.by_kind.setdefault(attack.kind, collections.Counter())[status] += 1
                if status not in attack.allowed:
                    report.wrong.append(f"#{number} {attack.kind} {attack.method}: {status}")

        await asyncio.gather(*(one(i, attack) for i, attack in enumerate(attacks(count, seed))))


async def fuzz(target: str, count: int, seed: int, pids: dict[str, int], quiet: float = 5.0) -> Report:
    report = Report()
    async with AsyncClient(target) as client:
        expected = []
        for i in range(WELL_BEHAVED):
            alone = client.generate([5 + i, 6, 7], max_new_tokens=24, temperature=0, ignore_eos=True)
            expected.append((await alone.wait()).token_ids)
        async with behaving(client, expected, report, report.quiet):
            await asyncio.sleep(quiet)
        before = {name: megabytes(pid) for name, pid in pids.items()}
        for pid in pids.values():
            reset_peak(pid)
        async with behaving(client, expected, report, report.beside):
            await attack_all(target, count, seed, report)
        end = time.monotonic() + 20
        while (load := (await client.server_info()).load).running or load.waiting or load.pages_used:
            if time.monotonic() > end:
                report.spoiled.append(f"left behind: {load}")
                break
            await asyncio.sleep(0.1)
    report.megabytes = {name: (before[name], peak(pid)) for name, pid in pids.items()}
    return report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", help="host:port of a running server")
    parser.add_argument("--pid", type=int, help="of its front end, to watch the memory")
    parser.add_argument("--engine-pid", type=int)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-growth", type=float, default=300.0, metavar="MB")
    parser.add_argument("--quiet", type=float, default=5.0, help="seconds of the well-behaved streams alone")
    parser.add_argument("--note", default="", help="goes into the record: what else the machine was doing")
    parser.add_argument("--out", default=None, help="folder of hostile.json; without it nothing is written")
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
        report = asyncio.run(fuzz(target, args.count, args.seed, pids, args.quiet))
        if process is not None:
            process.terminate()
            report.spoiled += [] if process.wait(60) == 0 else [f"exit status {process.returncode}"]
    row = {
        "attacks": args.count,
        "seconds": round(time.monotonic() - began, 1),
        "statuses": dict(report.statuses.most_common()),
        "by_kind": {kind: dict(found.most_common()) for kind, found in sorted(report.by_kind.items())},
        "wrong": report.wrong,
        "spoiled": report.spoiled,
        "well_behaved_answers": report.served,
        "stalled_uploads": report.stalled,
        "gap_ms_quiet": spread(report.quiet),
        "gap_ms_beside": spread(report.beside),
        "gap_ms_beside_max": round(max(report.beside, default=0.0) * 1e3, 1),
        "megabytes_before_and_peak": report.megabytes,
    }
    grown = [name for name, (before, after) in report.megabytes.items() if after - before > args.max_growth]
    print(json.dumps(row, indent=1))
    for text in [*report.wrong, *report.spoiled, *(f"{name} grew" for name in grown)][:50]:
        print("FAULT", text)
    if args.out:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")  # for the record's frame only
        print(write("hostile", [row], args.out, note=args.note))
    return 1 if report.wrong or report.spoiled or grown or not report.served else 0


if __name__ == "__main__":
    sys.exit(main())
