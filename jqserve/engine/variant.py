"""How much a step's sampler does: a program of its own for each kind, so that nobody pays for what nobody asked.

A conditional inside one program would do on a CPU, but on a GPU its predicate is read back by the host, which stalls
the loop that is meant to run ahead of the device.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from typing import TYPE_CHECKING

from jqserve.engine.request import SamplingParams

if TYPE_CHECKING:
    from jqserve.engine.sequence import Sequence


class Variant(enum.StrEnum):
    """In rising order of cost; each does all that the ones before it do."""

    GREEDY = "greedy"  # argmax of the plain logits
    PLAIN = "plain"  # temperature, the sampled token's logprob
    SAMPLE = "sample"  # penalties, biases, top-k, top-p, min-p: without the kernel some 20 more passes over the logits
    SCORED = "scored"  # the most likely tokens with their logprobs as well


ORDER = tuple(Variant)


def needed(s: SamplingParams) -> Variant:
    """The least that gives a sequence with these parameters all it asks."""
    if s.logprobs:
        return Variant.SCORED
    if s.repetition_penalty != 1 or s.presence_penalty or s.frequency_penalty or s.logit_bias or s.min_new_tokens:
        return Variant.SAMPLE
    if s.temperature > 0 and (s.top_k > 0 or s.top_p < 1 or s.min_p):
        return Variant.SAMPLE
    return Variant.PLAIN if s.temperature > 0 or s.logprobs is not None else Variant.GREEDY


def counts_tokens(sequence: Sequence) -> bool:
    """Whether its sampling looks at the tokens that it has seen (`SlotState.generated` and `prompted`)."""
    s = sequence.sampling
    return s.repetition_penalty != 1 or bool(s.presence_penalty) or bool(s.frequency_penalty)


def needed_by(sequences: Iterable[Sequence]) -> Variant:
    return ORDER[max((sequence.sampler for sequence in sequences), default=0)]
