"""Requests to serve: SGLang's `random` and `generated-shared-prefix` workloads, as token ids.

The lengths follow SGLang's bench_serving: `random` draws each from [ratio * length, length]; ratio 1 fixes it.
"""

from __future__ import annotations

import dataclasses
import random


@dataclasses.dataclass(frozen=True)
class Item:
    """One request: its prompt and how many tokens it asks for (EOS is ignored)."""

    prompt: tuple[int, ...]
    output: int


def random_items(
    count: int, input_len: int, output_len: int, *, vocabulary: int, ratio: float, seed: int
) -> list[Item]:
    """`count` unrelated prompts."""
    rng = random.Random(seed)

    def length(most: int) -> int:
        return rng.randint(max(1, int(most * ratio)), most)

    return [Item(_tokens(rng, length(input_len), vocabulary), length(output_len)) for _ in range(count)]


def shared_prefix_items(
    groups: int, per_group: int, prefix_len: int, question_len: int, output_len: int, *, vocabulary: int, seed: int
) -> list[Item]:
    """`groups` system prompts, each with `per_group` questions behind it, in random order."""
    rng = random.Random(seed)
    items = []
    for _ in range(groups):
        prefix = _tokens(rng, prefix_len, vocabulary)
        items += [Item(prefix + _tokens(rng, question_len, vocabulary), output_len) for _ in range(per_group)]
    rng.shuffle(items)
    return items


def _tokens(rng: random.Random, count: int, vocabulary: int) -> tuple[int, ...]:
    """Ids from the middle of the vocabulary: special tokens stand at its ends."""
    return tuple(rng.choices(range(vocabulary // 8, vocabulary - vocabulary // 8), k=count))
