"""How many prefill tiles a step may hold while others decode, from measured step times. Plain Python.

Everybody who decodes waits for the whole step, so its time is the inter-token latency that they see. A step with fewer
tiles is shorter, but reads the weights as often: the budget is the largest that keeps the step within `bound`.
"""

from __future__ import annotations

from collections.abc import Mapping

LATENCY = 0.05  # seconds between tokens that a reader does not notice: 20 tokens a second
SLOWDOWN = 3.0  # of a decode step, where that alone takes long


def bound(decode_seconds: float) -> float:
    """The longest that a step with prefill may take beside others, given the time of a full step without."""
    return max(LATENCY, SLOWDOWN * decode_seconds)


def decode_tiles(step_seconds: Mapping[int, float], decode_seconds: float) -> int:
    """The most tiles within the bound: `step_seconds` by tiles of the steps that all decode rows fit into."""
    fitting = [tiles for tiles, seconds in step_seconds.items() if seconds <= bound(decode_seconds)]
    return max(fitting, default=min(step_seconds))
