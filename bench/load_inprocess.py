"""The same workload on an engine in this process: what serving would cost if the front end were free.

Every token of a step carries the time at which the step was read, so the latencies are on the engine's clock.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from bench.latency import Record
from bench.workload import Item

if TYPE_CHECKING:
    from jqserve.engine.engine import EngineCore


def drive(
    engine: EngineCore, items: Sequence[Item], *, concurrency: int | None, rate: float | None, seed: int = 0
) -> list[Record]:
    """As `load_client.drive`, with an `EngineCore`."""
    from jqserve.engine.request import EngineRequest, SamplingParams
    from jqserve.errors import QueueFullError

    rng, records, running = random.Random(seed), [], 0
    by_rid: dict[int, Record] = {}
    due = time.monotonic()
    queue = list(enumerate(items))[::-1]
    while queue or running:
        now = time.monotonic()
        while queue and (due <= now if rate is not None else running < (concurrency or 1)):
            rid, item = queue.pop()
            sampling = SamplingParams(max_new_tokens=item.output, temperature=0.0, ignore_eos=True, seed=0)
            by_rid[rid] = Record(len(item.prompt), due if rate is not None else now)
            if rate is not None:
                due += rng.expovariate(rate)
            try:
                engine.add(EngineRequest(rid, item.prompt, sampling))
            except QueueFullError as error:  # an open loop faster than the engine: counted as failed, as over gRPC
                by_rid[rid].error = str(error)
                records.append(by_rid[rid])
                continue
            running += 1
        if not running:
            time.sleep(max(0.0, due - now))
            continue
        events = engine.step()
        now = time.monotonic()
        for event in events:
            record = by_rid[event.rid]
            record.cached_tokens += event.cached_tokens
            if event.token_ids:
                record.arrivals.append((now, len(event.token_ids)))
            if event.finish is not None:
                record.ended, record.error = now, event.error
                records.append(record)
                running -= 1
    while engine.has_work():
        engine.step()
    return records
