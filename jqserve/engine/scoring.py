"""Logprobs of a prompt's own tokens, gathered chunk by chunk as the prompt is computed. Plain Python."""

from __future__ import annotations

from collections.abc import Sequence as Items

from jqserve.engine.plan import Chunk
from jqserve.engine.request import TokenLogprobs
from jqserve.engine.sequence import Sequence


def take_scores(chunk: Chunk, scores: Items[TokenLogprobs]) -> None:
    """`scores` of the tokens at start + 1 .. start + length, as the step that computed the chunk gave them."""
    sequence = chunk.sequence
    if sequence.scores is None:
        return
    first, end = max(1, sequence.sampling.prompt_from), sequence.prompt_length
    for place, entry in enumerate(scores, chunk.start + 1):
        if first <= place < end:
            sequence.scores[place] = entry


def told_scores(sequence: Sequence) -> tuple[TokenLogprobs, ...]:
    """All of them, once the whole prompt is computed and its first token is told; empty when nobody asked, or again."""
    if sequence.scores is None:
        return ()
    scores, sequence.scores = sequence.scores, None
    return tuple(scores[place] for place in range(max(1, sequence.sampling.prompt_from), sequence.prompt_length))
