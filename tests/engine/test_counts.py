"""What the penalties know of an answer: no count wraps, however long the answer and however it is computed."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jqserve.engine import sampler
from jqserve.engine.adopt import Adopter
from jqserve.engine.batch import StepShape, padding, unpack
from jqserve.engine.buckets import Bucket
from jqserve.engine.plan import Adopted
from jqserve.engine.request import EngineRequest, SamplingParams
from jqserve.engine.sequence import Sequence
from jqserve.engine.slots import SlotTable
from jqserve.engine.step import Computed, SlotState, count_tokens, make_state

TILE, SLOT, TOKEN = 1024, 1, 7
SHAPE = StepShape(slots=2, page_size=8, pages_per_sequence=8, tile_size=TILE, vocab_size=11)
BUCKET = Bucket(0, 2)
LENGTHS = [5, 16_383, 16_384, 16_385, 32_767, 32_768, 50_000]  # int16 ends at 32,767


def answered(length: int) -> Sequence:
    """One token, `length` times, after a prompt of three others."""
    request = EngineRequest(0, (3, 4, 4), SamplingParams(frequency_penalty=0.5, presence_penalty=1.0, seed=0))
    tokens = [*request.prompt, *[TOKEN] * length]
    return Sequence(request, 0, len(tokens) + 9, tokens, frozenset(), slot=SLOT)


@jax.jit
def counted(state: SlotState, packed: jax.Array, params: Any) -> SlotState:
    """The state after a step of two tiles, without its model."""
    fields = unpack(packed, SHAPE, BUCKET)
    nobody = jnp.zeros((0,), jnp.int32)
    positions = (fields.tile_start[:, None] + jnp.arange(TILE)).reshape(-1)
    computed = Computed(nobody, fields.tile_tokens.reshape(-1), positions, nobody, nobody, nobody, nobody)
    return count_tokens(state, fields, computed, params, SHAPE)


def recomputed(sequence: Sequence) -> SlotState:
    table, state = SlotTable(SHAPE.slots), make_state(SHAPE)
    table.set(sequence)
    for start in range(0, len(sequence.tokens), BUCKET.tiles * TILE):
        packed, fields = padding(SHAPE, BUCKET)
        for tile in range(BUCKET.tiles):
            at = start + tile * TILE
            here = sequence.tokens[at : at + TILE]
            if here:
                fields.tile_slot[tile], fields.tile_start[tile], fields.tile_len[tile] = SLOT, at, len(here)
                fields.tile_tokens[tile, : len(here)] = here
        state = counted(state, packed, table.on_device())
    return state


def adopted(sequence: Sequence) -> SlotState:
    return Adopter(SHAPE)(make_state(SHAPE), [Adopted(sequence, SLOT, (1, 2), len(sequence.tokens))])


@pytest.mark.parametrize("computed", [recomputed, adopted])
@pytest.mark.parametrize("length", LENGTHS)
def test_no_count_wraps(length: int, computed: Any) -> None:
    sequence = answered(length)
    state = computed(sequence)
    table = SlotTable(SHAPE.slots)
    table.set(sequence)
    rows = table.on_device().rows(jnp.array([SLOT]), jnp.array([9]), state.generated, state.prompted)
    logits = np.asarray(sampler.penalised(jnp.zeros((1, SHAPE.vocab_size)), rows))[0]
    expected = np.zeros(SHAPE.vocab_size, np.float32)
    expected[TOKEN] = -1.0 - 0.5 * min(length, sampler.MAX_COUNT)
    np.testing.assert_array_equal(logits, expected)
    assert np.asarray(state.prompted)[SLOT].nonzero()[0].tolist() == [3, 4]
