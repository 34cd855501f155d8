"""A long run at twice the capacity, with cancellations, deadlines and faults; nothing may be lost, nothing may leak.

    python -m bench.soak --seconds 1200 [--model-path DIR] [--fault-seconds 20] [--kill-seconds 180] [-- SERVER FLAGS]

Clients are closed loops, twice as many as the server has slots and pages that do not hold half of them, so that the
queue is always full and sequences are preempted. Every --fault-seconds a step of the engine raises; every
--kill-seconds the front end is killed with SIGKILL and the server started again. Counted: how every request ended, the
tokens of greedy answers against what each gives alone, gaps between tokens, and memory, descriptors, pages and calls of
the processes while it runs. It fails on: a request without a status, or that hung; INTERNAL that no kill explains;
a wrong answer; pages or calls left behind; memory or descriptors that keep growing.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import dataclasses
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.record import write
from jqserve.client import AsyncClient, ServerError

SETTLE = 0.25  # of the time since a start: memory may grow until caches and pools have their size
PROMPTS = 12
GOOD_ENDS = {"length", "stop", "cancelled", "CANCELLED", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "UNAVAILABLE"}
GOOD_ENDS |= {"INTERNAL"}  # of a stream whose engine died with its front end


@dataclasses.dataclass
class Tally:
    """What became of the requests."""

    ends: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    wrong: list[str] = dataclasses.field(default_factory=list)
    gaps: list[float] = dataclasses.field(default_factory=list)
    firsts: list[float] = dataclasses.field(default_factory=list)
    tokens: int = 0
    kills: int = 0


class Served:
    """A jqserve-server with a faulty engine, on one port for its whole life."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args, self.folder = args, folder
        self.port = 0
        self.facts: dict[str, Any] = {}
        self.process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        ready = self.folder / "ready.json"
        ready.unlink(missing_ok=True)
        settings = {"port": self.port, "ready_file": str(ready), "fault_seconds": self.args.fault_seconds}
        command = [sys.executable, "-m", "bench.soak_server", json.dumps(settings), *self.args.server]
        with open(self.folder / "log", "a") as log:
            self.process = await asyncio.create_subprocess_exec(*command, stdout=log, stderr=log)
        while not ready.exists():
            if self.process.returncode is not None:
                raise SystemExit(f"the server ended with {self.process.returncode}: see {self.folder / 'log'}")
            await asyncio.sleep(0.2)
        self.facts = json.loads(ready.read_text())
        self.port = self.facts["port"]

    async def kill(self) -> None:
        """The front end, without warning; its engine has to notice."""
        assert self.process is not None
        engine = self.facts["engine_pid"]
        os.kill(self.facts["pid"], signal.SIGKILL)
        await self.process.wait()
        end = time.monotonic() + 10
        while (
            Path(f"/proc/{engine}").exists() and "Z" not in Path(f"/proc/{engine}/stat").read_text().split(") ")[1][:1]
        ):
            if time.monotonic() > end:
                raise SystemExit(f"engine {engine} outlived its front end")
            await asyncio.sleep(0.05)

    async def stop(self) -> int:
        assert self.process is not None
        self.process.terminate()
        return await asyncio.wait_for(self.process.wait(), 60)


def resources(pid: int) -> tuple[float, int]:
    """(resident MB, open descriptors)."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE") / 2**20, len(os.listdir(f"/proc/{pid}/fd"))


async def alone(client: AsyncClient, prompts: list[list[int]], length: int) -> list[list[int]]:
    """What each prompt gives when nothing else runs, twice that long as anybody will ask."""
    answers = []
    for prompt in prompts:
        stream = client.generate(prompt, temperature=0, ignore_eos=True, max_new_tokens=length)
        answers.append((await stream.wait()).token_ids)
    return answers


async def loop(
    client: AsyncClient, number: int, prompts: list[list[int]], expected: list[list[int]], until: float, tally: Tally
) -> None:
    """Requests one after the other: some cancelled, some with too short a deadline, some constrained, some sampled."""
    rng = random.Random(number)
    while time.monotonic() < until:
        which, kind = rng.randrange(len(prompts)), rng.random()
        length = rng.randint(4, len(expected[which]))
        options: dict[str, Any] = {"max_new_tokens": length, "temperature": 0, "ignore_eos": True}
        if kind < 0.2:
            options |= {"temperature": 1.0, "seed": number}
        elif kind < 0.25:
            options = {"max_new_tokens": length, "regex": "[a-z ]{3,20}"}
        timeout = rng.uniform(0.05, 1.0) if rng.random() < 0.1 else 120.0
        cancel_after = rng.randint(1, length) if rng.random() < 0.1 else None
        stream = client.generate(prompts[which], timeout=timeout, flush_tokens=rng.choice((1, 4)), **options)
        began = last = time.monotonic()
        end = "?"
        try:
            async for event in stream.events():
                now = time.monotonic()
                if event.token_ids:
                    (tally.gaps if last > began else tally.firsts).append(now - last)
                    last = now
                if cancel_after is not None and len(stream.result.token_ids) >= cancel_after:
                    end = "cancelled"
                    break
            else:
                end = stream.result.finish_reason or "no end"
            stream.cancel()
        except ServerError as error:
            end = error.code.name
        tally.ends[end] += 1
        tally.tokens += len(stream.result.token_ids)
        if options.get("temperature") == 0 and options.get("ignore_eos"):
            got = stream.result.token_ids
            if got != expected[which][: len(got)]:
                tally.wrong.append(f"prompt {which}: {got} instead of {expected[which][: len(got)]}")
        if end in ("UNAVAILABLE", "RESOURCE_EXHAUSTED"):
            await asyncio.sleep(rng.uniform(0.05, 0.5))


async def watch(served: Served, until: float, samples: list[dict[str, Any]]) -> None:
    while time.monotonic() < until:
        await asyncio.sleep(2)
        try:
            row: dict[str, Any] = {"at": time.monotonic(), "start": served.facts["pid"]}
            for name in ("pid", "engine_pid"):
                row[f"{name}_mb"], row[f"{name}_fds"] = resources(served.facts[name])
            samples.append(row)
        except (OSError, IndexError):
            continue  # between two lives


async def soak(args: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], list[str]]:
    served, tally, faults = Served(args, folder), Tally(), []
    await served.start()
    rng = random.Random(1)
    samples: list[dict[str, Any]] = []
    async with AsyncClient(f"127.0.0.1:{served.port}") as client:
        info = await client.model_info()
        prompts = [[rng.randrange(5, info.vocab_size) for _ in range(rng.randint(4, 60))] for _ in range(PROMPTS)]
        expected = await alone(client, prompts, args.length)
        began = time.monotonic()
        until = began + args.seconds
        clients = [loop(client, i, prompts, expected, until, tally) for i in range(args.clients)]
        everybody = [asyncio.create_task(c) for c in [*clients, watch(served, until, samples)]]
        while time.monotonic() < until:
            await asyncio.sleep(min(args.kill_seconds or args.seconds, max(0.0, until - time.monotonic())))
            if args.kill_seconds and time.monotonic() < until - 30:
                await served.kill()
                tally.kills += 1
                await served.start()
        done, hanging = await asyncio.wait(everybody, timeout=180)
        faults += [f"{len(hanging)} clients hang"] if hanging else []
        faults += [f"a client died: {task.exception()!r}" for task in done if task.exception()]
        end = time.monotonic() + 20
        while True:
            load = (await client.server_info()).load
            if not (load.running or load.waiting or load.pages_used):
                break
            if time.monotonic() > end:
                faults.append(f"left behind: {load.running} running, {load.waiting} waiting, {load.pages_used} pages")
                break
            await asyncio.sleep(0.2)
        if load.compilations_after_warmup:
            faults.append(f"{load.compilations_after_warmup} compilations while serving")
    if (code := await served.stop()) != 0:
        faults.append(f"exit status {code}")
    log = (folder / "log").read_text()
    steps_raised = log.count("injected by the soak") // 2 or log.count("InjectedError")
    faults += tally.wrong[:5]
    unknown = tally.ends.keys() - GOOD_ENDS
    faults += [f"requests ended with {name!r}" for name in unknown]
    if not tally.kills and tally.ends["INTERNAL"]:
        faults.append(f"{tally.ends['INTERNAL']} INTERNAL: a step that raises loses nobody")
    faults += growth(samples, args.max_growth)
    row = {
        "seconds": args.seconds,
        "clients": args.clients,
        "ends": dict(tally.ends),
        "tokens_per_second": round(tally.tokens / (time.monotonic() - began), 1),
        "preemptions": load.preemptions,
        "steps_raised": steps_raised,
        "front_end_killed": tally.kills,
        "gap_p50": quantile(tally.gaps, 0.5),
        "gap_p99": quantile(tally.gaps, 0.99),
        "gap_max": max(tally.gaps, default=0.0),
        "first_p99": quantile(tally.firsts, 0.99),
        "last_sample": samples[-1] if samples else {},
    }
    return row, faults


def growth(samples: list[dict[str, Any]], limit: float) -> list[str]:
    """Of each life of the server, after it has settled: MB over `limit`, or more than 20 descriptors, is a leak."""
    faults = []
    for start in dict.fromkeys(sample["start"] for sample in samples):
        life = [sample for sample in samples if sample["start"] == start]
        settled = life[int(len(life) * SETTLE) :]
        if len(settled) < 12:
            continue
        third = len(settled) // 3
        for name, most in (("pid_mb", limit), ("engine_pid_mb", limit), ("pid_fds", 20), ("engine_pid_fds", 20)):
            first, last = (statistics.median(s[name] for s in part) for part in (settled[:third], settled[-third:]))
            if last - first > most:
                faults.append(f"{name} grew from {first:.0f} to {last:.0f}")
    return faults


def quantile(values: list[float], q: float) -> float:
    return round(sorted(values)[int(q * (len(values) - 1))], 4) if values else 0.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1200)
    parser.add_argument("--clients", type=int, default=32, help="twice the slots")
    parser.add_argument("--length", type=int, default=100, help="most tokens of an answer")
    parser.add_argument("--fault-seconds", type=float, default=20.0, help="between steps that raise; 0: none")
    parser.add_argument("--kill-seconds", type=float, default=180.0, help="between kills of the front end; 0: none")
    parser.add_argument("--max-growth", type=float, default=100.0, metavar="MB")
    parser.add_argument("--out", default=None, help="folder of the result, instead of bench/results")
    parser.add_argument("server", nargs="*", help="after --: flags of jqserve-server")
    args = parser.parse_args()
    if not args.server:  # the demo model, with pages for a few of its 16 slots only
        flags = (
            "--max-running-requests 16 --max-queued 12 --chunked-prefill-size 64 --context-length 384 --num-pages 40"
        )
        args.server = flags.split()
    with tempfile.TemporaryDirectory(prefix="jqserve-soak-") as folder:
        row, faults = asyncio.run(soak(args, Path(folder)))
        tail = (Path(folder) / "log").read_text()[-2000:]
    print(json.dumps(row, indent=1))
    for fault in faults:
        print("FAULT", fault)
    if faults:
        print(tail)
    else:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")  # for the record's frame only: the device is the server's
        print(write("soak", [row], args.out))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
