"""What the scheduler says about one dispatch: which sequences run, which of their tokens, in which pages."""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

from jqserve.engine.sequence import Sequence


class DecodeRow(NamedTuple):
    """`steps` decode steps of `sequence`. Its newest token, taken from the device, stands at `position`; `pages` cover
    the positions from there on whose keys and values are written."""

    sequence: Sequence
    slot: int
    position: int
    pages: tuple[int, ...]
    steps: int = 1


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Tokens [start, start + length) of `sequence`; `pages` cover them. `sample`: the last gives the next token."""

    sequence: Sequence
    slot: int
    start: int
    length: int
    pages: tuple[int, ...]
    sample: bool


@dataclasses.dataclass(frozen=True)
class Adopted:
    """A sequence that begins behind a prefix found in the cache: `tokens` of it stand in `pages` already."""

    sequence: Sequence
    slot: int
    pages: tuple[int, ...]
    tokens: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """One dispatch of `steps` decode steps (1 wherever there are chunks). Falsy when there is nothing to run.

    admitted: sequences that got their slot with it; adopted: those of them that begin behind a cached prefix.
    """

    decodes: tuple[DecodeRow, ...] = ()
    chunks: tuple[Chunk, ...] = ()
    admitted: tuple[Sequence, ...] = ()
    adopted: tuple[Adopted, ...] = ()
    steps: int = 1

    def __bool__(self) -> bool:
        return bool(self.decodes or self.chunks)

    @functools.cached_property
    def sequences(self) -> list[Sequence]:
        return [row.sequence for row in self.decodes] + [chunk.sequence for chunk in self.chunks]

    @functools.cached_property
    def sampled(self) -> list[int]:
        """How many tokens each of `sequences` gets."""
        return [row.steps for row in self.decodes] + [int(chunk.sample) for chunk in self.chunks]

    @functools.cached_property
    def constrained(self) -> bool:
        """Whether any of its sequences has a grammar."""
        return any(sequence.grammar is not None for sequence in self.sequences)

    @property
    def reached(self) -> list[int]:
        """How many positions of each of `sequences` are computed when it has run."""
        return [row.position + row.steps for row in self.decodes] + [c.start + c.length for c in self.chunks]
