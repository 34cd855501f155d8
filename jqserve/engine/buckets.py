"""The few step shapes that are compiled ahead: decode rows x prefill tiles. Plain Python."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True, order=True)
class Bucket:
    """The shape of one step: `decode_rows` rows of one token, `tiles` tiles of consecutive prompt tokens."""

    decode_rows: int
    tiles: int

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
    """

    decode: tuple[int, ...]
    mixed: tuple[Bucket, ...]

    def choose(self, decode_rows: int, tiles: int, tile_size: int) -> Bucket:
        """The shape with the fewest rows that holds the step. Raises ValueError when none does."""
        if tiles == 0:
            for rows in self.decode:
                if rows >= decode_rows:
                    return Bucket(rows, 0)
        fitting = [b for b in self.mixed if b.decode_rows >= decode_rows and b.tiles >= tiles]
        if not fitting:
            raise ValueError(f"no bucket holds {decode_rows} decode rows and {tiles} tiles")
        return min(fitting, key=lambda b: (b.rows(tile_size), b.sampled))

    def all(self) -> list[Bucket]:
        """Every shape, the costliest to compile first."""
        return [*sorted(self.mixed, reverse=True), *(Bucket(rows, 0) for rows in reversed(self.decode))]


def ladder(top: int, steps: Sequence[int]) -> tuple[int, ...]:
    """The members of `steps` below `top`, then `top`."""
    return (*(s for s in steps if s < top), top)


def make_buckets(running: int, tiles: int, *, fine: bool) -> Buckets:
    """The shapes for at most `running` requests and `tiles` prefill tiles a step.

    `fine` (GPUs): powers of two. Padding a decode step from 9 to 16 rows costs next to nothing, for the weights are
    read once either way; a mixed step is dominated by its tiles, so it is padded to few or to all decode rows.
    Otherwise (CPUs, where a row costs its share and compilation is on the user's clock): factors of four, two mixed.
    """
    if fine:
        rows = ladder(running, (1, 2, 4, 8, 16, 32, 64, 128, 256, 512))
        counts = ladder(tiles, (1, 4, 16, 64))
        mixed = {Bucket(b, n) for b in ladder(running, (8,)) for n in counts}
    else:
        rows = ladder(running, (4, 16, 64, 256))
        mixed = {Bucket(running, tiles), Bucket(rows[0], 1)}
    return Buckets(rows, tuple(sorted(mixed)))
