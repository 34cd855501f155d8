"""A plan as one int32 vector: everything a step needs from the host, in one transfer. numpy on the way in; the same
offsets read it inside the jit."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from jqserve.engine.buckets import Bucket
from jqserve.engine.plan import Plan


@dataclasses.dataclass(frozen=True)
class StepShape:
    """What all steps of an engine share: slots S (row S is padding's), page size Ps, pages per sequence Pmax, Tq."""

    slots: int
    page_size: int
    pages_per_sequence: int
    tile_size: int
    vocab_size: int

    @property
    def tile_pages(self) -> int:
        """Most pages that Tq consecutive positions touch."""
        return self.pages_touched(self.tile_size)

    def pages_touched(self, positions: int) -> int:
        """Most pages that so many consecutive positions touch."""
        return (positions + self.page_size - 2) // self.page_size + 1


@dataclasses.dataclass(frozen=True)
class Fields:
    """The parts of a packed step, numpy or traced. All int32; Bd decode rows, Nt tiles of Tq tokens, Wp pages a tile.

    decode_slot, decode_position (of the first of the row's steps), decode_count (steps it takes; 0 = padding)   [Bd]
    decode_pages [Bd, Wk]: the pages that its positions touch, 0 = none; Wk = 1 where a program is one step
    tile_slot, tile_start, tile_len (0 = padding), tile_sample (1: its last token gives the next one)   [Nt]
    tile_pages [Nt, Wp]: the pages that its positions touch, 0 = none; tile_tokens [Nt, Tq]
    """

    decode_slot: Any
    decode_position: Any
    decode_count: Any
    decode_pages: Any
    tile_slot: Any
    tile_start: Any
    tile_len: Any
    tile_sample: Any
    tile_pages: Any
    tile_tokens: Any


def _shapes(shape: StepShape, bucket: Bucket) -> list[tuple[int, ...]]:
    rows, tiles = bucket.decode_rows, bucket.tiles
    decode = [*[(rows,)] * 3, (rows, shape.pages_touched(bucket.steps))]
    return [*decode, *[(tiles,)] * 4, (tiles, shape.tile_pages), (tiles, shape.tile_size)]


def packed_size(shape: StepShape, bucket: Bucket) -> int:
    return sum(math.prod(s) for s in _shapes(shape, bucket))


def unpack(packed: Any, shape: StepShape, bucket: Bucket) -> Fields:
    """Views into `packed` int32 [packed_size]: of a numpy vector or, inside the jit, of a traced one."""
    parts, at = [], 0
    for part in _shapes(shape, bucket):
        size = math.prod(part)
        parts.append(packed[at : at + size].reshape(part))
        at += size
    return Fields(*parts)


def padding(shape: StepShape, bucket: Bucket) -> tuple[np.ndarray, Fields]:
    """A step in which nothing runs: (packed, views into it)."""
    packed = np.zeros(packed_size(shape, bucket), np.int32)
    fields = unpack(packed, shape, bucket)
    fields.decode_slot[:] = shape.slots
    fields.tile_slot[:] = shape.slots
    return packed, fields


def tiles_needed(plan: Plan, tile_size: int) -> int:
    return sum(-(-chunk.length // tile_size) for chunk in plan.chunks)


def pack(plan: Plan, shape: StepShape, bucket: Bucket) -> tuple[np.ndarray, list[int]]:
    """(packed, row of the sampled token for each of plan.decodes and then of plan.chunks, -1 for none)."""
    packed, fields = padding(shape, bucket)
    count = len(plan.decodes)
    if count:
        fields.decode_slot[:count] = [row.slot for row in plan.decodes]
        fields.decode_position[:count] = [row.position for row in plan.decodes]
        fields.decode_count[:count] = [row.steps for row in plan.decodes]
        if bucket.steps == 1:
            fields.decode_pages[:count, 0] = [row.pages[0] for row in plan.decodes]
        else:
            for i, row in enumerate(plan.decodes):
                fields.decode_pages[i, : len(row.pages)] = row.pages
    sampled = list(range(count))
    tile = 0
    for chunk in plan.chunks:
        end = chunk.start + chunk.length
        first_page = chunk.start // shape.page_size
        for start in range(chunk.start, end, shape.tile_size):
            length = min(shape.tile_size, end - start)
            low = start // shape.page_size - first_page
            high = (start + length - 1) // shape.page_size - first_page + 1
            fields.tile_slot[tile] = chunk.slot
            fields.tile_start[tile] = start
            fields.tile_len[tile] = length
            fields.tile_pages[tile, : high - low] = chunk.pages[low:high]
            fields.tile_tokens[tile, :length] = chunk.sequence.tokens[start : start + length]
            tile += 1
        fields.tile_sample[tile - 1] = chunk.sample
        sampled.append(bucket.decode_rows + tile - 1 if chunk.sample else -1)
    return packed, sampled
