"""A long run at twice the capacity, with cancellations, deadlines and faults; nothing may be lost, nothing may leak.

    python -m bench.soak --minutes 20 [--fault-seconds 20] [--kills 3] [--out DIR] [-- SERVER FLAGS]

Clients are closed loops, twice as many as the server has slots, and pages that do not hold half of them, so that the
queue is always full, the page pool is exhausted all the time and sequences are preempted. Every --fault-seconds a step
of the engine raises. In the first 40 % of the time the front end is killed --kills times with SIGKILL and the server
started again; what is left is one life, long enough to see a leak in.

Counted: how every request ended, the tokens of greedy answers against what each gives alone, gaps between tokens, and
what the processes hold meanwhile (`bench/soak_watch`). `lost` is a request that hung, that ended without a status or
with one that nothing explains (UNAVAILABLE while no server was killed, INTERNAL ever), that has wrong tokens, or that
says it is complete and is not. The run fails when any is lost, when pages or calls stay behind, when memory,
descriptors or tasks grow, when a program was compiled while serving, or when the p99 of the gaps is over --max-gap.
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
import re
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.latency import spread
from bench.record import write
from bench.soak_watch import Watch
from jqserve.client import AsyncClient, ServerError

PROMPTS = 12
PATTERN = "[a-z ]{3,20}"
PATIENCE = 180.0  # seconds that a request has at the end; what is not over then hangs
#: an end that says why there are no more tokens, and that any client of a full server has to expect
EXPECTED = {"length", "stop", "cancelled", "CANCELLED", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED"}
#: the demo model, with pages for a few of its 16 slots only, and admission that does not look ahead
FLAGS = "--max-running-requests 16 --max-queued 12 --chunked-prefill-size 64 --context-length 384 --num-pages 40"
FLAGS += " --schedule-conservativeness 0 --constraint-warmup"


@dataclasses.dataclass
class Tally:
    """What became of the requests. down: (from, to) on the clock, when there was no server because it was killed."""

    begun: int = 0
    ends: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    lost: list[str] = dataclasses.field(default_factory=list)
    gaps: list[float] = dataclasses.field(default_factory=list)
    firsts: list[float] = dataclasses.field(default_factory=list)
    tokens: int = 0
    down: list[tuple[float, float]] = dataclasses.field(default_factory=list)

    def killed_between(self, began: float, ended: float) -> bool:
        return any(began < to and ended > since for since, to in self.down)


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
        flags = ["--metrics-port", "0", "--compilation-cache-dir", str(self.folder / "cache"), *self.args.server]
        command = [sys.executable, "-m", "bench.soak_server", json.dumps(settings), *flags]
        with open(self.folder / "log", "a") as log:
            self.process = await asyncio.create_subprocess_exec(*command, stdout=log, stderr=log)
        while not ready.exists():
            if self.process.returncode is not None:
                tail = (self.folder / "log").read_text()[-2000:]
                raise SystemExit(f"the server ended with {self.process.returncode}: {tail}")
            await asyncio.sleep(0.2)
        self.facts.clear()
        self.facts.update(json.loads(ready.read_text()))
        self.port = self.facts["port"]

    async def kill(self) -> None:
        """The front end, without warning; its engine has to notice."""
        assert self.process is not None
        engine = Path(f"/proc/{self.facts['engine_pid']}/stat")
        os.kill(self.facts["pid"], signal.SIGKILL)
        await self.process.wait()
        end = time.monotonic() + 10
        with contextlib.suppress(FileNotFoundError):
            while engine.read_text().split(") ")[1][0] not in "ZX":
                if time.monotonic() > end:
                    raise SystemExit(f"engine {self.facts['engine_pid']} outlived its front end")
                await asyncio.sleep(0.05)

    async def stop(self) -> int:
        assert self.process is not None
        self.process.terminate()
        return await asyncio.wait_for(self.process.wait(), 60)


@dataclasses.dataclass(frozen=True)
class Asked:
    """A request of the soak: `expected` tokens (greedy), or a text that fits PATTERN, or just `length` tokens."""

    prompt: list[int]
    length: int
    options: dict[str, Any]
    timeout: float
    cancel_after: int | None
    expected: list[int] | None

    def judge(self, result: Any, end: str) -> str:
        """What is wrong with its answer; "" when nothing is."""
        got = result.token_ids
        if self.expected is not None and got != self.expected[: len(got)]:
            return f"other tokens: {got} instead of {self.expected[: len(got)]}"
        if end == "length" and len(got) != self.length:
            return f"{len(got)} tokens instead of {self.length}"
        if end == "stop" and "regex" in self.options and not re.fullmatch(PATTERN, result.text):
            return f"{result.text!r} does not fit {PATTERN}"
        return ""


def draw(rng: random.Random, number: int, prompts: list[list[int]], alone: list[list[int]]) -> Asked:
    """Some are cancelled, some have too short a deadline, some are constrained, some sampled; most are greedy."""
    which, kind = rng.randrange(len(prompts)), rng.random()
    length = rng.randint(4, len(alone[which]))
    options: dict[str, Any] = {"flush_tokens": rng.choice((1, 4))}
    expected = None
    if kind < 0.2:
        options |= {"temperature": 1.0, "seed": number, "ignore_eos": True}
    elif kind < 0.25:
        options |= {"regex": PATTERN, "temperature": 1.0}
    else:
        options |= {"temperature": 0, "ignore_eos": True}
        expected = alone[which]
    timeout = rng.uniform(0.05, 1.0) if rng.random() < 0.1 else 120.0
    cancel_after = rng.randint(1, length) if rng.random() < 0.1 else None
    return Asked(prompts[which], length, options, timeout, cancel_after, expected)


async def one(client: AsyncClient, asked: Asked, tally: Tally) -> str:
    """How a request ended."""
    stream = client.generate(asked.prompt, timeout=asked.timeout, max_new_tokens=asked.length, **asked.options)
    tally.begun += 1
    began = last = time.monotonic()
    end = "no end"
    try:
        async for event in stream.events():
            now = time.monotonic()
            if event.token_ids:
                (tally.gaps if last > began else tally.firsts).append(now - last)
                last = now
            if asked.cancel_after is not None and len(stream.result.token_ids) >= asked.cancel_after:
                end = "cancelled"
                break
        else:
            end = stream.result.finish_reason or "no end"
        stream.cancel()
        told = end
    except ServerError as error:
        end = error.code.name
        told = f"{end}: {error.details}"
    tally.ends[end] += 1
    tally.tokens += len(stream.result.token_ids)
    explained = end in EXPECTED or (end == "UNAVAILABLE" and tally.killed_between(began, time.monotonic()))
    if not explained:
        tally.lost.append(f"{told} after {time.monotonic() - began:.2f} s")
    elif wrong := asked.judge(stream.result, end):
        tally.lost.append(f"{end}: {wrong}")
    return end


async def loop(
    client: AsyncClient, number: int, prompts: list[list[int]], alone: list[list[int]], until: float, tally: Tally
) -> None:
    """Requests one after the other."""
    rng = random.Random(number)
    while time.monotonic() < until:
        end = await one(client, draw(rng, number, prompts, alone), tally)
        if end in ("UNAVAILABLE", "RESOURCE_EXHAUSTED"):
            await asyncio.sleep(rng.uniform(0.05, 0.5))


async def kill_now_and_then(served: Served, kills: int, seconds: float, tally: Tally) -> None:
    """`kills` times, evenly over `seconds`."""
    for _ in range(kills):
        await asyncio.sleep(seconds / kills)
        since = time.monotonic() - 0.05
        tally.down.append((since, float("inf")))
        await served.kill()
        await served.start()
        # A client's channel waits up to a few seconds before it tries again (gRPC's backoff).
        tally.down[-1] = (since, time.monotonic() + 10)


async def left_behind(client: AsyncClient) -> tuple[Any, list[str]]:
    """The server's load once it is idle, and what is wrong with it."""
    end = time.monotonic() + 20
    while True:
        load = (await client.server_info()).load
        if not (load.running or load.waiting or load.pages_used):
            break
        if time.monotonic() > end:
            return load, [f"left behind: {load.running} running, {load.waiting} waiting, {load.pages_used} pages"]
        await asyncio.sleep(0.2)
    if load.compilations_after_warmup:
        return load, [f"{load.compilations_after_warmup} compilations while serving"]
    return load, []


async def soak(args: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], list[str]]:
    served, tally, faults = Served(args, folder), Tally(), []
    seconds = args.minutes * 60
    await served.start()
    rng = random.Random(1)
    async with AsyncClient(f"127.0.0.1:{served.port}") as client:
        info = await client.model_info()
        prompts = [[rng.randrange(5, info.vocab_size) for _ in range(rng.randint(4, 60))] for _ in range(PROMPTS)]
        alone = []
        for prompt in prompts:
            stream = client.generate(prompt, temperature=0, ignore_eos=True, max_new_tokens=args.length)
            alone.append((await stream.wait()).token_ids)
        began = time.monotonic()
        watch = Watch(served.facts, began)
        watching = asyncio.create_task(watch.run())
        killing = asyncio.create_task(kill_now_and_then(served, args.kills, 0.4 * seconds, tally))
        loops = [loop(client, i, prompts, alone, began + seconds, tally) for i in range(args.clients)]
        done, hanging = await asyncio.wait([asyncio.create_task(one) for one in loops], timeout=seconds + PATIENCE)
        elapsed = time.monotonic() - began
        watching.cancel()
        await killing
        tally.lost += ["it hangs"] * len(hanging)
        faults += [f"a client died: {task.exception()!r}" for task in done if task.exception()]
        load, problems = await left_behind(client)
        faults += problems
    if (code := await served.stop()) != 0:
        faults.append(f"exit status {code}")
    steps_raised = (folder / "log").read_text().count("InjectedError: injected")
    faults += [f"lost: {text}" for text in tally.lost[:10]] + watch.faults()
    gaps = spread(tally.gaps)
    if gaps is None or gaps["p99"] > args.max_gap * 1e3:
        faults.append(f"the gaps between tokens are {gaps} ms; the p99 may be {args.max_gap * 1e3:.0f}")
    row = {
        "minutes": round(elapsed / 60, 2),
        "clients": args.clients,
        "requests": tally.begun,
        "lost": len(tally.lost),
        "ends": dict(tally.ends.most_common()),
        "tokens_per_second": round(tally.tokens / elapsed, 1),
        "preemptions_of_last_life": load.preemptions,
        "steps_raised": steps_raised,
        "front_end_killed": len(tally.down),
        "gap_ms": gaps and gaps | {"max": round(max(tally.gaps) * 1e3, 3)},
        "first_token_ms": spread(tally.firsts),
        "growth": watch.growth(),
        "samples": watch.thinned(),
    }
    return row, faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--clients", type=int, default=32, help="twice the slots")
    parser.add_argument("--length", type=int, default=100, help="most tokens of an answer")
    parser.add_argument("--fault-seconds", type=float, default=20.0, help="between steps that raise; 0: none")
    parser.add_argument("--kills", type=int, default=3, help="of the front end; 0: none")
    parser.add_argument("--max-gap", type=float, default=1.0, metavar="S", help="p99 of the gaps between tokens")
    parser.add_argument("--note", default="", help="goes into the record: what else the machine was doing")
    parser.add_argument("--out", default=None, help="folder of the result, instead of bench/results")
    parser.add_argument("server", nargs="*", help="after --: flags of jqserve-server")
    args = parser.parse_args()
    args.server = args.server or FLAGS.split()
    with tempfile.TemporaryDirectory(prefix="jqserve-soak-") as folder:
        row, faults = asyncio.run(soak(args, Path(folder)))
        tail = (Path(folder) / "log").read_text()[-2000:]
    print(json.dumps({name: value for name, value in row.items() if name != "samples"}, indent=1))
    for fault in faults:
        print("FAULT", fault)
    if faults:
        print(tail)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # for the record's frame only: the device is the server's
    print(write("soak", [row], args.out, note=args.note, faults=faults))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
