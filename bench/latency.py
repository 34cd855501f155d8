"""From the times of single requests to a row of a serving table."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any


@dataclasses.dataclass
class Record:
    """One request as its client saw it; times in seconds of one clock.

    began, ended  when it was sent, and when its last message came
    arrivals      (time, tokens) of each message with tokens
    server_first, server_total  seconds by the server's own clock; 0 where there is no server
    """

    prompt_tokens: int
    began: float
    arrivals: list[tuple[float, int]] = dataclasses.field(default_factory=list)
    ended: float = 0.0
    cached_tokens: int = 0
    server_first: float = 0.0
    server_total: float = 0.0
    error: str = ""

    @property
    def output_tokens(self) -> int:
        return sum(count for _, count in self.arrivals)

    @property
    def ttft(self) -> float:
        return self.arrivals[0][0] - self.began

    @property
    def tpot(self) -> float | None:
        """Seconds per token after the first."""
        after = self.output_tokens - self.arrivals[0][1]
        return (self.arrivals[-1][0] - self.arrivals[0][0]) / after if after else None

    @property
    def gaps(self) -> list[float]:
        """Inter-token latencies: the tokens of one message come together, so all but its first wait for nothing."""
        result: list[float] = []
        for (before, _), (now, count) in zip(self.arrivals, self.arrivals[1:]):
            result += [now - before, *[0.0] * (count - 1)]
        return result

    @property
    def server_tpot(self) -> float | None:
        rest = self.output_tokens - 1
        return (self.server_total - self.server_first) / rest if rest and self.server_total else None


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of the values do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def spread(values: Sequence[float]) -> dict[str, float] | None:
    """Mean, P50, P99 in milliseconds."""
    if not values:
        return None
    mean = sum(values) / len(values)
    points = {"mean": mean, "p50": percentile(values, 0.5), "p99": percentile(values, 0.99)}
    return {name: round(value * 1e3, 3) for name, value in points.items()}


def summarize(records: Sequence[Record]) -> dict[str, Any]:
    """Throughput over the time from the first request sent to the last one ended, and latencies."""
    good = [r for r in records if not r.error and r.arrivals]
    row: dict[str, Any] = {"requests": len(records), "failed": len(records) - len(good)}
    if not good:
        return row | {"error": records[0].error if records else "no request"}
    seconds = max(r.ended for r in good) - min(r.began for r in good)
    prompts, outputs = sum(r.prompt_tokens for r in good), sum(r.output_tokens for r in good)
    row |= {
        "seconds": round(seconds, 3),
        "requests_per_second": round(len(good) / seconds, 3),
        "input_tokens_per_second": round(prompts / seconds, 1),
        "output_tokens_per_second": round(outputs / seconds, 1),
        "mean_concurrency": round(sum(r.ended - r.began for r in good) / seconds, 2),
        "cached_share": round(sum(r.cached_tokens for r in good) / prompts, 4),
        "ttft_ms": spread([r.ttft for r in good]),
        "tpot_ms": spread([t for r in good if (t := r.tpot) is not None]),
        "itl_ms": spread([gap for r in good for gap in r.gaps]),
        "e2e_ms": spread([r.ended - r.began for r in good]),
    }
    if any(r.server_total for r in good):
        row["server_ttft_ms"] = spread([r.server_first for r in good])
        row["server_tpot_ms"] = spread([t for r in good if (t := r.server_tpot) is not None])
    return row
