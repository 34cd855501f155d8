from __future__ import annotations

import numpy as np
import pytest

from jqserve.engine.batch import StepShape, pack, packed_size, padding, tiles_needed, unpack
from jqserve.engine.buckets import Bucket
from jqserve.engine.plan import Chunk, DecodeRow, Plan
from jqserve.engine.request import EngineRequest, SamplingParams
from jqserve.engine.sequence import Sequence

SHAPE = StepShape(slots=4, page_size=4, pages_per_sequence=8, tile_size=6, vocab_size=50)


def sequence(length: int) -> Sequence:
    ids = tuple(range(100, 100 + length))
    return Sequence(EngineRequest(0, ids, SamplingParams()), 0, length + 5, list(ids), frozenset())


@pytest.mark.parametrize(("tile", "page", "pages"), [(1, 4, 1), (4, 4, 2), (6, 4, 3), (64, 64, 2), (32, 16, 3)])
def test_pages_that_a_tile_can_touch(tile: int, page: int, pages: int) -> None:
    shape = StepShape(1, page, 8, tile, 10)
    touched = [(start + tile - 1) // page - start // page + 1 for start in range(page)]
    assert shape.tile_pages == pages == max(touched)


def test_padding_names_the_padding_slot_and_no_tokens() -> None:
    packed, fields = padding(SHAPE, Bucket(2, 1))
    assert packed.shape == (packed_size(SHAPE, Bucket(2, 1)),) and packed.dtype == np.int32
    assert fields.decode_slot.tolist() == [4, 4] and fields.decode_count.tolist() == [0, 0]
    assert fields.tile_slot.tolist() == [4] and fields.tile_len.tolist() == [0]


def test_a_plan_with_rows_and_chunks() -> None:
    a, b, c = sequence(3), sequence(17), sequence(2)
    plan = Plan(
        (DecodeRow(a, 2, 3, (9,)),),
        (Chunk(b, 0, 6, 9, (11, 12, 13), sample=False), Chunk(c, 1, 0, 2, (5,), sample=True)),
    )
    assert tiles_needed(plan, 6) == 3
    bucket = Bucket(2, 4)
    packed, rows = pack(plan, SHAPE, bucket)
    f = unpack(packed, SHAPE, bucket)
    assert rows == [0, -1, 2 + 2]
    assert f.decode_slot.tolist() == [2, 4] and f.decode_position.tolist() == [3, 0]
    assert f.decode_count.tolist() == [1, 0] and f.decode_pages.tolist() == [[9], [0]]
    assert f.tile_slot.tolist() == [0, 0, 1, 4] and f.tile_start.tolist() == [6, 12, 0, 0]
    assert f.tile_len.tolist() == [6, 3, 2, 0] and f.tile_sample.tolist() == [0, 0, 1, 0]
    # positions 6..11 lie in pages 1 and 2 of the sequence, 12..14 in page 3
    assert f.tile_pages.tolist() == [[11, 12, 0], [13, 0, 0], [5, 0, 0], [0, 0, 0]]
    assert f.tile_tokens[0].tolist() == list(range(106, 112))
    assert f.tile_tokens[1].tolist() == [112, 113, 114, 0, 0, 0]


def test_rows_of_several_steps_bring_the_pages_they_grow_into() -> None:
    a, b = sequence(3), sequence(7)
    plan = Plan((DecodeRow(a, 2, 3, (9, 10), 4), DecodeRow(b, 0, 7, (6,), 1)), steps=6)
    bucket = Bucket(4, 0, 6)
    f = unpack(pack(plan, SHAPE, bucket)[0], SHAPE, bucket)
    assert f.decode_position.tolist() == [3, 7, 0, 0] and f.decode_count.tolist() == [4, 1, 0, 0]
    # positions 3..8 touch pages 0, 1 and 2: most that six positions can
    assert f.decode_pages.tolist() == [[9, 10, 0], [6, 0, 0], [0, 0, 0], [0, 0, 0]]
