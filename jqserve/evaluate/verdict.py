"""Is what is left enough? One number, one line, one exit status."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

#: Exit status of a recovery below the threshold (1 is an internal fault, 2 the user's).
FAILED = 3


@dataclasses.dataclass(frozen=True)
class Verdict:
    """recovery: the least of `parts`, each a share of the base's own; None where there is nothing to compare.
    hopeless: there is a base, and it solves none of the tasks, which are all there is: that passes nothing."""

    recovery: float | None
    parts: dict[str, float]
    threshold: float
    hopeless: bool = False

    @property
    def passed(self) -> bool:
        return not self.hopeless if self.recovery is None else self.recovery >= self.threshold

    @property
    def status(self) -> int:
        return 0 if self.passed else FAILED

    def line(self) -> str:
        """ "PASS: recovery 99.1 % (tasks 99.1 %, perplexity 99.8 %), threshold 98.0 %"."""
        if self.hopeless:
            return "FAIL: no recovery can be told: the base solves none of the tasks; give others, or --text"
        if self.recovery is None:
            return "no verdict: nothing to compare with (give --base)"
        parts = ", ".join(f"{name} {share:.1%}" for name, share in self.parts.items())
        word = "PASS" if self.passed else "FAIL"
        return f"{word}: recovery {self.recovery:.1%} ({parts}), threshold {self.threshold:.1%}"


def judge(result: dict[str, Any], threshold: float) -> Verdict:
    """result: what `run.evaluate` gathered. Shares: accuracy over the base's, the base's perplexity over its;
    0 for a perplexity that is no finite number."""
    parts: dict[str, float] = {}
    tasks, text = result.get("tasks"), result.get("text")
    if tasks and tasks.get("base_accuracy"):
        parts["tasks"] = tasks["accuracy"] / tasks["base_accuracy"]
    if text and text.get("base_perplexity"):
        share = text["base_perplexity"] / text["perplexity"]
        parts["perplexity"] = share if math.isfinite(text["perplexity"]) and math.isfinite(share) else 0.0
    hopeless = not parts and tasks is not None and tasks.get("base_accuracy") == 0
    return Verdict(min(parts.values()) if parts else None, parts, threshold, hopeless)
