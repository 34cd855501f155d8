"""One step of the engine as one jitted program: the only jit of serving; what is donated and static is visible here.

Inputs: weights as one flat tuple of leaves (never donated), the KV pages and the slots' state (donated, updated in
place), the sampling parameters by slot, and one packed int32 vector from the host. A decode row takes its token from
`SlotState.last_token`, so a step can be dispatched before the host has read the one before it.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from jqserve.engine.batch import Fields, StepShape, packed_size, unpack
from jqserve.engine.buckets import Bucket
from jqserve.engine.cache import Cache
from jqserve.engine.sampler import Sampled, greedy, sample
from jqserve.engine.slots import SlotParams
from jqserve.ops.attention import AttentionMetadata


class Model(Protocol):
    """What the step asks of a model: `jqserve.models.decoder.Decoder`."""

    def __call__(self, tokens: Any, positions: Any, kv: Any, meta: Any) -> tuple[Any, Any]: ...

    def logits(self, hidden: Any) -> Any: ...


class Structure(Protocol):
    """A model without its arrays: `jqserve.models.build.Structure`."""

    def merge(self, leaves: tuple[jax.Array, ...]) -> Model: ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SlotState:
    """What stays on the device between steps, by slot (row S belongs to padding).

    last_token [S+1] int32: the newest sampled token; page_table [S+1, Pmax] int32: its sequence's pages;
    generated [S+1, V] int16 and prompted [S+1, V] bool: tokens seen, for the penalties. The last two are only kept
    up for sequences that need the full variant; all of it is rebuilt by recomputing a sequence from position 0.
    """

    last_token: jax.Array
    page_table: jax.Array
    generated: jax.Array
    prompted: jax.Array


def make_state(shape: StepShape, device: Any = None) -> SlotState:
    rows = shape.slots + 1
    return SlotState(
        jnp.zeros((rows,), jnp.int32, device=device),
        jnp.zeros((rows, shape.pages_per_sequence), jnp.int32, device=device),
        jnp.zeros((rows, shape.vocab_size), jnp.int16, device=device),
        jnp.zeros((rows, shape.vocab_size), jnp.bool, device=device),
    )


def lower_step(
    structure: Structure, shape: StepShape, bucket: Bucket, full: bool, leaves: Any, kv: Any, state: Any, params: Any
) -> jax.stages.Lowered:
    """The program of one bucket, lowered for arguments that are arrays or ShapeDtypeStructs.

    `full`: with penalties, biases, draws and logprobs; else argmax alone, and `params` is None.
    """
    packed = jax.ShapeDtypeStruct((packed_size(shape, bucket),), jnp.int32)
    function = functools.partial(_step, structure, shape, bucket, full)
    function.__name__ = f"step_{bucket.decode_rows}_{bucket.tiles}_{'full' if full else 'greedy'}"  # type: ignore[attr-defined]
    return jax.jit(function, donate_argnums=(1, 2)).lower(leaves, kv, state, params if full else None, packed)


def _step(
    structure: Structure,
    shape: StepShape,
    bucket: Bucket,
    full: bool,
    leaves: tuple[jax.Array, ...],
    kv: Cache,
    state: SlotState,
    params: SlotParams | None,
    packed: jax.Array,
) -> tuple[Cache, SlotState, Sampled]:
    fields = unpack(packed, shape, bucket)
    model = structure.merge(leaves)
    tile_position = fields.tile_start[:, None] + lax.iota(jnp.int32, shape.tile_size)  # [Nt, Tq]
    positions = jnp.concatenate([jnp.maximum(fields.decode_position, 0), tile_position.reshape(-1)])
    tokens = jnp.concatenate([state.last_token[fields.decode_slot], fields.tile_tokens.reshape(-1)])
    page_table = _write_page_table(state.page_table, fields, shape)
    hidden, kv = model(tokens, positions, kv, _attention_metadata(page_table, fields, tile_position, shape))

    # Rows whose next token is asked: every decode row, and the last row of every tile (most tiles' result is dropped).
    last_of_tile = lax.iota(jnp.int32, bucket.tiles) * shape.tile_size + jnp.maximum(fields.tile_len - 1, 0)
    rows = jnp.concatenate([lax.iota(jnp.int32, bucket.decode_rows), bucket.decode_rows + last_of_tile])
    row_slot = jnp.concatenate([fields.decode_slot, jnp.where(fields.tile_sample == 1, fields.tile_slot, shape.slots)])
    logits = model.logits(hidden[rows])
    generated, prompted = state.generated, state.prompted
    if full:
        assert params is not None
        generated, prompted = _count_tokens(generated, prompted, fields, tokens, positions, params, shape)
        sampled = sample(logits, params.rows(row_slot, positions[rows] + 1, generated, prompted))
    else:
        sampled = greedy(logits)
    last_token = state.last_token.at[row_slot].set(sampled.tokens)
    return kv, SlotState(last_token, page_table, generated, prompted), sampled


def _write_page_table(page_table: jax.Array, fields: Fields, shape: StepShape) -> jax.Array:
    """The host names the page of every position that a step writes; the table keeps it. Row S takes the padding."""
    page_index = jnp.maximum(fields.decode_position, 0) // shape.page_size
    page_table = page_table.at[fields.decode_slot, page_index].set(fields.decode_page)
    index = (fields.tile_start // shape.page_size)[:, None] + lax.iota(jnp.int32, shape.tile_pages)
    index = jnp.where(fields.tile_pages > 0, index, shape.pages_per_sequence)
    return page_table.at[fields.tile_slot[:, None], index].set(fields.tile_pages, mode="drop")


def _attention_metadata(
    page_table: jax.Array, fields: Fields, tile_position: jax.Array, shape: StepShape
) -> AttentionMetadata:
    size = shape.page_size
    decode_kv = jnp.where(fields.decode_position < 0, 0, fields.decode_page * size + fields.decode_position % size)
    page_in_tile = tile_position // size - (fields.tile_start // size)[:, None]
    real = lax.iota(jnp.int32, shape.tile_size)[None] < fields.tile_len[:, None]
    page = jnp.take_along_axis(fields.tile_pages, page_in_tile, axis=1)
    tile_kv = jnp.where(real, page * size + tile_position % size, 0)
    return AttentionMetadata(
        kv_slots=jnp.concatenate([decode_kv, tile_kv.reshape(-1)]),
        decode_table=page_table[fields.decode_slot],
        decode_len=fields.decode_position + 1,
        tile_table=page_table[fields.tile_slot],
        tile_start=fields.tile_start,
        tile_len=fields.tile_len,
    )


def _count_tokens(
    generated: jax.Array,
    prompted: jax.Array,
    fields: Fields,
    tokens: jax.Array,
    positions: jax.Array,
    params: SlotParams,
    shape: StepShape,
) -> tuple[jax.Array, jax.Array]:
    """Counts this step's input tokens by slot; a slot whose sequence starts (position 0) is cleared first."""
    nobody = shape.slots + 1  # out of range: dropped
    starts = jnp.where((fields.tile_start == 0) & (fields.tile_len > 0), fields.tile_slot, nobody)
    generated = generated.at[starts].set(0, mode="drop")
    prompted = prompted.at[starts].set(False, mode="drop")
    real = lax.iota(jnp.int32, shape.tile_size)[None] < fields.tile_len[:, None]
    tile_slot = jnp.where(real, fields.tile_slot[:, None], nobody)
    slots = jnp.concatenate([jnp.where(fields.decode_position < 0, nobody, fields.decode_slot), tile_slot.reshape(-1)])
    of_prompt = positions < params.prompt_length(jnp.minimum(slots, shape.slots))
    prompted = prompted.at[jnp.where(of_prompt, slots, nobody), tokens].set(True, mode="drop")
    generated = generated.at[jnp.where(of_prompt, nobody, slots), tokens].add(1, mode="drop")
    return generated, prompted
