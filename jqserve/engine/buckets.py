"""The few step shapes that are compiled ahead: decode rows x prefill tiles x decode steps. Plain Python."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True, order=True)
class Bucket:
    """The shape of one dispatch: `decode_rows` rows of one token, `tiles` tiles of consecutive prompt tokens.

    `steps` > 1 (only without tiles): that many decode steps in one program, each feeding its tokens to the next.
    """

    decode_rows: int
    tiles: int
    steps: int = 1

    def rows(self, tile_size: int) -> int:
        """T, the tokens that go through the matmuls."""
        return self.decode_rows + self.tiles * tile_size

    @property
    def sampled(self) -> int:
        """R, the rows that go through the head: each decode row, and the last row of each tile."""
        return self.decode_rows + self.tiles


@dataclasses.dataclass(frozen=True)
class Buckets:
    """All shapes of an engine.

    decode   row counts of steps without prefill, ascending; the last is the greatest number of running requests
    mixed    shapes of steps with prefill; contains one that covers everything
    steps    decode steps of the programs for "nobody waits to prefill" (1: there are none)
    steps_rows  those have at most so many rows; None: as many as there are
    coarse   row counts of decode steps that are not greedy (see `engine/programs`), ascending and ending as `decode`
             does; empty: the same as `decode`
    """

    decode: tuple[int, ...]
    mixed: tuple[Bucket, ...]
    steps: int = 1
    coarse: tuple[int, ...] = ()
    steps_rows: int | None = None

    def choose(self, decode_rows: int, tiles: int, tile_size: int, *, steps: int = 1, coarse: bool = False) -> Bucket:
        """The shape with the fewest rows that holds the step. Raises ValueError when none does."""
        if tiles == 0:
            for rows in (self.coarse or self.decode) if coarse else self.decode:
                if rows >= decode_rows:
                    return Bucket(rows, 0, steps)
        fitting = [b for b in self.mixed if b.decode_rows >= decode_rows and b.tiles >= tiles]
        if not fitting or steps > 1:
            raise ValueError(f"no bucket holds {decode_rows} decode rows and {tiles} tiles in {steps} steps")
        return min(fitting, key=lambda b: (b.rows(tile_size), b.sampled))

    def all(self) -> list[Bucket]:
        """Every shape, the costliest to compile first."""
        return [*sorted(self.mixed, reverse=True), *self.only_decode(self.decode)]

    def tile_counts(self, decode_rows: int) -> list[int]:
        """The tile counts that steps with so many decode rows are padded to, ascending."""
        return sorted({b.tiles for b in self.mixed if b.decode_rows >= decode_rows})

    def fill(self, decode_rows: int, tiles: int) -> int:
        """How many of `tiles` a step beside so many decode rows should take: as many as its shape has, where that is
        more than half of them. Past some 170 tokens (FP8, 8B) a step's time goes with its tokens, padding included,
        and what is left over costs the next step, which the decode rows need in any case, no more than it would here.
        """
        if not decode_rows:
            return tiles  # nobody needs the next step
        counts = next((counts for rows, counts in self._mixed_counts if rows >= decode_rows), ())
        fitting = max((count for count in counts if count <= tiles), default=0)
        return fitting if 2 * fitting > tiles else tiles

    @functools.cached_property
    def _mixed_counts(self) -> list[tuple[int, list[int]]]:
        """Decode rows of the mixed shapes, ascending, each with the tile counts that there are of it."""
        rows = sorted({b.decode_rows for b in self.mixed})
        return [(n, [b.tiles for b in self.mixed if b.decode_rows == n]) for n in rows]

    def only_decode(self, rows: Sequence[int]) -> list[Bucket]:
        """The shapes without tiles for these row counts."""
        return [Bucket(n, 0, steps) for n in reversed(rows) for steps in self.steps_of(n)]

    def steps_of(self, rows: int) -> tuple[int, ...]:
        """The decode steps of the programs of so many rows, ascending."""
        several = self.steps > 1 and (self.steps_rows is None or rows <= self.steps_rows)
        return (1, self.steps) if several else (1,)


def ladder(top: int, steps: Sequence[int]) -> tuple[int, ...]:
    """The members of `steps` below `top`, then `top`."""
    return (*(s for s in steps if s < top), top)


def make_buckets(running: int, tiles: int, *, fine: bool, steps: int = 1, steps_rows: int | None = None) -> Buckets:
    """The shapes for at most `running` requests, `tiles` prefill tiles a step, `steps` decode steps a dispatch (of up
    to `steps_rows` rows).

    `fine` (GPUs): powers of two from 8 on. Padding a decode step from 2 to 8 rows costs nothing, since the kernels'
    smallest tile has 8 columns, and from 9 to 16 next to nothing, for the weights are read once either way; a mixed
    step is dominated by its tiles, so it is padded to no, few or all decode rows (8 rows beside 8 tiles of 128 make a
    ninth row of tiles in every matmul: 12 % of a first token's time, so prompts alone get programs without).
    Otherwise (CPUs, where a row costs its share and compilation is on the user's clock): factors of four, two mixed.
    """
    if fine:
        rows = ladder(running, (1, 8, 16, 32, 64, 128, 256, 512))
        counts = ladder(tiles, (1, 2, 4, 8, 16, 64))
        mixed = {Bucket(b, n) for b in (0, running) for n in counts}
        mixed |= {Bucket(min(8, running), n) for n in ladder(tiles, (1, 4, 16, 64))}
        return Buckets(rows, tuple(sorted(mixed)), steps, ladder(running, (8, 32, 64, 128, 256)), steps_rows)
    rows = ladder(running, (4, 16, 64, 256))
    mixed = {Bucket(running, tiles), Bucket(rows[0], 1)}
    return Buckets(rows, tuple(sorted(mixed)), steps, steps_rows=steps_rows)
