"""Sends a workload to a server and times it: closed loop (so many at once) or open loop (Poisson arrivals).

Python's gRPC costs ~40 us a message (GRPC.md 4.2), so the load comes from several processes.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import multiprocessing
import random
import time
from collections.abc import Sequence

from bench.latency import Record
from bench.workload import Item


def drive(
    target: str, items: Sequence[Item], *, concurrency: int | None, rate: float | None, processes: int, seed: int = 0
) -> list[Record]:
    """Every item once; `concurrency` at a time, or at `rate` requests a second. Times are on one machine-wide clock."""
    processes = max(1, min(processes, len(items), concurrency or len(items)))
    shares = [items[i::processes] for i in range(processes)]
    jobs = []
    for i, share in enumerate(shares):
        own = None if concurrency is None else concurrency // processes + (i < concurrency % processes)
        jobs.append((target, share, own, None if rate is None else rate / processes, seed + i))
    if processes == 1:
        return _run(jobs[0])
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(processes, mp_context=context) as pool:
        list(pool.map(time.sleep, [0.2] * processes))  # all are up before the first one sends
        return [record for part in pool.map(_run, jobs) for record in part]


def _run(job: tuple[str, Sequence[Item], int | None, float | None, int]) -> list[Record]:
    return asyncio.run(_drive(*job))


async def _drive(
    target: str, items: Sequence[Item], concurrency: int | None, rate: float | None, seed: int
) -> list[Record]:
    from jqserve.client import AsyncClient

    async with AsyncClient(target) as client:
        if rate is not None:
            rng, tasks = random.Random(seed), []
            due = time.monotonic()
            for item in items:
                due += rng.expovariate(rate)
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                tasks.append(asyncio.create_task(_one(client, item)))
            return list(await asyncio.gather(*tasks))
        records: list[Record] = []
        queue = iter(items)

        async def worker() -> None:
            for item in queue:
                records.append(await _one(client, item))

        await asyncio.gather(*(worker() for _ in range(concurrency or 1)))
        return records


async def _one(client, item: Item) -> Record:  # type: ignore[no-untyped-def]
    from jqserve.client import ServerError

    record = Record(len(item.prompt), time.monotonic())
    options = {"max_new_tokens": item.output, "temperature": 0.0, "ignore_eos": True, "output": "token_ids"}
    stream = client.generate(item.prompt, **options)
    try:
        async for event in stream.events():
            if event.token_ids:
                record.arrivals.append((time.monotonic(), len(event.token_ids)))
    except ServerError as error:
        record.error = str(error)
    record.ended = time.monotonic()
    choice = stream.result.choices[0]
    record.server_first, record.server_total = choice.first_token_seconds, choice.total_seconds
    record.cached_tokens = stream.result.cached_tokens
    return record
