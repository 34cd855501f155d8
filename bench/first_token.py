"""Time to the first token of an idle engine: a prompt's prefill alone, and what a cached prefix saves.

Rows for `bench.serve --first-token`, measured on the engine's own clock, medians of `REPEATS` prompts:

    {"prompt": 1000, "ttft_ms", "prefill_ms", "ttft_to_prefill"}    prefill_ms: the step programs of that prompt alone,
                                                                    from their launch to their end, run on padding
                    "kernels_ms", "ttft_to_kernels"                 its kernels' own time by CUPTI, on the prompt itself
    {"prompt": 8192, "cached": 7372, "ttft_ms", "ttft_ms_without", "speedup"}
"""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

from bench.kernel_times import kernel_times
from bench.load_inprocess import drive
from bench.workload import random_items, shared_prefix_items

if TYPE_CHECKING:
    from jqserve.engine.engine import EngineCore

REPEATS = 5


def rows(engine: EngineCore, short: int = 1000, long: int = 8192, share: float = 0.9) -> list[dict[str, Any]]:
    """`share`: of the long prompt that another has left in the cache. Lengths beyond the context are cut to it."""
    most = engine.limits.context_length - 4
    return [alone(engine, min(short, most)), hit(engine, min(long, most), share)]


def ttft(engine: EngineCore, items: Any) -> list[float]:
    """Seconds of each item, one after the other."""
    return [record.ttft for item in items for record in drive(engine, [item], **ONE)]


ONE: dict[str, Any] = {"concurrency": 1, "rate": None}


def alone(engine: EngineCore, length: int) -> dict[str, Any]:
    vocabulary = engine.limits.vocab_size
    items = random_items(REPEATS + 1, length, 2, vocabulary=vocabulary, ratio=1.0, seed=71)
    measured = statistics.median(ttft(engine, items)[1:])
    runner, size = engine.runner, engine.scheduler.tile_size
    prefill, rest = 0.0, -(-length // size)
    while rest > 0:
        bucket = runner.buckets.choose(0, min(rest, engine.scheduler.tiles), size)
        prefill += runner.idle_run(runner.programs.cheapest(bucket), 3)
        rest -= bucket.tiles
    row = {
        "mode": "first_token",
        "prompt": length,
        "ttft_ms": round(measured * 1e3, 3),
        "prefill_ms": round(prefill * 1e3, 3),
        "ttft_to_prefill": round(measured / prefill, 3),
    }
    one = random_items(3, length, 1, vocabulary=vocabulary, ratio=1.0, seed=72)
    timings = kernel_times(lambda: [ttft(engine, [item]) for item in one])
    if timings:
        kernels = sum(microseconds for _, microseconds in timings) / len(one) / 1e3
        row |= {"kernels_ms": round(kernels, 3), "ttft_to_kernels": round(measured * 1e3 / kernels, 3)}
    return row


def hit(engine: EngineCore, length: int, share: float) -> dict[str, Any]:
    vocabulary, prefix = engine.limits.vocab_size, int(length * share)
    without, within = [], []
    for i in range(REPEATS):
        first, second = shared_prefix_items(1, 2, prefix, length - prefix, 2, vocabulary=vocabulary, seed=100 + i)
        without += ttft(engine, [first])
        within += ttft(engine, [second])
    cold, warm = statistics.median(without), statistics.median(within)
    return {
        "mode": "first_token",
        "prompt": length,
        "cached": prefix,
        "ttft_ms": round(warm * 1e3, 3),
        "ttft_ms_without": round(cold * 1e3, 3),
        "speedup": round(cold / warm, 2),
    }
