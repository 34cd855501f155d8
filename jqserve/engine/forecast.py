"""How many KV pages the running sequences will need at their worst moment: what admission asks. Plain Python.

Nobody knows how long an answer gets, but finished ones tell which share of their allowance answers use. With that
share, each running sequence has an expected end. If all grow a token a step, the pages in use peak just before one of
them ends, so it is enough to look at those moments (the bound of LightLLM's scheduler, arXiv:2507.10150).
"""

from __future__ import annotations

from collections.abc import Iterable

from jqserve.engine.sequence import Sequence

START = 0.5  # share of the allowance before anything is known
SMOOTHING = 0.05  # weight of one finished answer
PREEMPTION = 0.1  # what a preemption adds: the forecast was too low
CLIP = 4096  # most tokens that count as an allowance: "up to the context length" is not a wish for that much


class Forecast:
    """Expected peak of the pages in use. `conservativeness` multiplies the expected growth."""

    def __init__(self, page_size: int, conservativeness: float = 1.0) -> None:
        self.page_size, self.conservativeness = page_size, conservativeness
        self.share = START

    def finished(self, sequence: Sequence) -> None:
        """Learns from an answer that ended by itself; a prompt that was only scored had none to give."""
        if sequence.limit == sequence.prompt_length:
            return
        used = (len(sequence.tokens) - sequence.prompt_length) / _allowance(sequence)
        self.share += SMOOTHING * (min(1.0, used) - self.share)

    def preempted(self) -> None:
        self.share = min(1.0, self.share + PREEMPTION)

    def growth(self, sequence: Sequence) -> int:
        """Tokens that are expected to come; at least one, where the limit allows it."""
        length, prompt = len(sequence.tokens) + sequence.pending, len(sequence.request.prompt)  # spelled out: it is
        left = max(0, sequence.limit - length)  # asked of every running sequence when a request waits for memory
        share = min(1.0, self.share * self.conservativeness)
        expected = share * _allowance(sequence) - (length - prompt)
        if expected < 0:  # longer than expected already: half as much of what is left, in the same spirit
            expected = 0.5 * share * min(left, CLIP)
        return min(left, max(1, round(expected)))

    def peak(self, sequences: Iterable[tuple[Sequence, int]]) -> int:
        """Most pages that these have to themselves at once, if nobody else comes. Each comes with the tokens whose
        pages it shares with others; a half-filled last page is counted as half a page on average."""
        ends = sorted(((self.growth(s), s.length - shared) for s, shared in sequences), reverse=True)
        most = held = 0.0
        for count, (growth, length) in enumerate(ends, 1):
            held += length + (self.page_size - 1) / 2
            most = max(most, held + count * growth)  # those still there have grown by what this one has at its end
        return int(-(-most // self.page_size))


def _allowance(sequence: Sequence) -> int:
    return max(1, min(sequence.limit - len(sequence.request.prompt), CLIP))
