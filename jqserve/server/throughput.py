"""Tokens per second, from a counter that is looked at now and then."""

from __future__ import annotations

import collections

WINDOW = 5.0  # seconds


class Throughput:
    """The mean rate over the last `WINDOW` seconds."""

    def __init__(self) -> None:
        self._samples: collections.deque[tuple[float, int]] = collections.deque()

    def sample(self, now: float, total: int) -> None:
        """`now` in seconds, `total` counted since the start."""
        self._samples.append((now, total))
        while len(self._samples) > 2 and now - self._samples[1][0] >= WINDOW:
            self._samples.popleft()

    @property
    def rate(self) -> float:
        if len(self._samples) < 2:
            return 0.0
        (began, before), (ended, after) = self._samples[0], self._samples[-1]
        return (after - before) / (ended - began) if ended > began else 0.0
