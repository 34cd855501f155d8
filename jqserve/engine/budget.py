"""How many prefill tiles a step may hold, from measured step times. Plain Python.

Everybody who decodes waits for the whole step, so its time is the inter-token latency that they see. A step with fewer
tiles is shorter, but reads the weights as often: the budget is the largest that keeps the step within `bound`.
Of prompts alone nobody waits for a token; those of one step are all answered at its end, and who comes meanwhile waits
for it too: the chunk is the least that computes as many tokens a second as larger ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

LATENCY = 0.05  # seconds between tokens that a reader does not notice: 20 tokens a second
SLOWDOWN = 3.0  # of a decode step, where that alone takes long
AS_FAST = 0.97  # of the best rate: two measurements of one step differ by some per cent


def bound(decode_seconds: float) -> float:
    """The longest that a step with prefill may take beside others, given the time of a full step without."""
    return max(LATENCY, SLOWDOWN * decode_seconds)


def chunk(step_seconds: Mapping[int, float]) -> int:
    """Tiles of a step of prompts alone, by the seconds of such steps with so many."""
    best = max(tiles / seconds for tiles, seconds in step_seconds.items())
    return min(tiles for tiles, seconds in step_seconds.items() if tiles / seconds >= AS_FAST * best)


@dataclasses.dataclass(frozen=True)
class Budget:
    """step_seconds: of the steps that all decode rows fit into, by their tiles, which begin their prompts
    decode_seconds: of such a step without tiles
    seconds_behind: what a tile takes more for each token of its prompt before it. Attention is what grows with them:
        16 tiles behind 100,000 tokens of an 8B model (32 layers of 32 heads of 128) are 107 TFLOP of it, 0.16 s at the
        670 TFLOP/s of its kernel on an H200, three times the bound
    """

    step_seconds: Mapping[int, float]
    decode_seconds: float
    seconds_behind: float = 0.0

    def tiles(self, before: int = 0) -> int:
        """The most of `step_seconds` within the bound, for prompts of which `before` tokens are computed; the least
        there is, where none is."""
        most = bound(self.decode_seconds)
        behind = self.seconds_behind * before
        fitting = [tiles for tiles, seconds in self.step_seconds.items() if seconds + tiles * behind <= most]
        return max(fitting, default=min(self.step_seconds))
