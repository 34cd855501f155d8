"""One step of the engine, jitted as one program or, in `engine/split`, as two; what is donated and static is visible
there and here, and nothing else of serving is jitted but `engine/adopt`.

Inputs: weights as one flat tuple of leaves (never donated), the KV pages and the slots' state (donated, updated in
place), the sampling parameters by slot, and one packed int32 vector from the host. A decode row takes its token from
`SlotState.last_token`, so a step can be dispatched before the host has read the one before it.

A bucket with `steps` K > 1 runs K decode steps in one program, a loop whose trip count is static (the host would have
to wait for the predicate of any other). A row with fewer steps than K is padding from there on.
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
from jqserve.engine.programs import Fused
from jqserve.engine.sampler import MAX_COUNT, Sampled, greedy, sample
from jqserve.engine.slots import SlotParams
from jqserve.engine.traceable import Traceable
from jqserve.engine.variant import Variant
from jqserve.ops.attention import AttentionMetadata


class Model(Protocol):
    """What the step asks of a model: `jqserve.models.decoder.Decoder`."""

    def __call__(self, tokens: Any, positions: Any, kv: Any, meta: Any) -> tuple[Any, Any]: ...

    def entering(self, tokens: Any) -> Any: ...

    def through(self, layers: range, stream: Any, positions: Any, kv: Any, meta: Any) -> tuple[Any, Any]: ...

    def logits(self, hidden: Any) -> Any: ...


class Structure(Protocol):
    """A model without its arrays: `jqserve.models.build.Structure`."""

    def merge(self, leaves: tuple[jax.Array, ...]) -> Model: ...

    @property
    def layers(self) -> int: ...


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


def step_program(
    structure: Structure,
    shape: StepShape,
    program: Fused,
    leaves: Any,
    kv: Any,
    state: Any,
    params: Any,
) -> Traceable:
    """A fused program, for arguments that are arrays or ShapeDtypeStructs.

    The greedy variant takes no sampling parameters: `params` is ignored.
    """
    packed = jax.ShapeDtypeStruct((packed_size(shape, program.bucket),), jnp.int32)
    function = functools.partial(run_step, structure, shape, program.bucket, program.variant)
    params = None if program.variant is Variant.GREEDY else params
    return Traceable(program.name, function, (leaves, kv, state, params, packed), (1, 2))


def run_step(
    structure: Structure,
    shape: StepShape,
    bucket: Bucket,
    variant: Variant,
    leaves: tuple[jax.Array, ...],
    kv: Cache,
    state: SlotState,
    params: SlotParams | None,
    packed: jax.Array,
) -> tuple[Cache, SlotState, Sampled]:
    """What `step_program` jits. `packed` int32 [packed_size(shape, bucket)]."""
    fields = unpack(packed, shape, bucket)
    state = dataclasses.replace(state, page_table=write_page_table(state.page_table, fields, shape))
    model = structure.merge(leaves)
    if bucket.steps == 1:
        return _once(model, shape, variant, kv, state, params, fields, 0)

    def body(carry: tuple[Cache, SlotState], i: jax.Array) -> tuple[tuple[Cache, SlotState], Sampled]:
        kv, state, sampled = _once(model, shape, variant, *carry, params, fields, i)
        return (kv, state), sampled

    (kv, state), sampled = lax.scan(body, (kv, state), jnp.arange(bucket.steps, dtype=jnp.int32))
    return kv, state, sampled


def _once(
    model: Model,
    shape: StepShape,
    variant: Variant,
    kv: Cache,
    state: SlotState,
    params: SlotParams | None,
    fields: Fields,
    at: jax.Array | int,
) -> tuple[Cache, SlotState, Sampled]:
    """Step `at` of the dispatch's decode rows, and all of its tiles."""
    kv, computed = compute(model, shape, kv, state, fields, at)
    logits = model.logits(computed.asked)
    if variant is Variant.GREEDY:
        sampled = greedy(logits)
    else:
        assert params is not None
        state = count_tokens(state, fields, computed, params, shape)
        rows_params = params.rows(computed.row_slot, computed.row_position + 1, state.generated, state.prompted)
        sampled = sample(logits, rows_params, scored=variant is Variant.SCORED)
    last_token = state.last_token.at[computed.row_slot].set(sampled.tokens)
    return kv, dataclasses.replace(state, last_token=last_token), sampled


@dataclasses.dataclass(frozen=True)
class Begun:
    """A step's tokens behind the first `layers` layers: the residual stream as two terms [T, D]."""

    layers: int
    stream: tuple[jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True)
class Computed:
    """What the model made of a step's T tokens, and the R rows whose next token is asked: every decode row, and the
    last row of every tile (most tiles' result is dropped), then perhaps padding.

    hidden [T, D]; tokens, positions int32 [T]; decode_position int32 [Bd], -1 = padding; asked [R, D], row_slot and
    row_position (of the row's own token) int32 [R].
    """

    hidden: jax.Array
    tokens: jax.Array
    positions: jax.Array
    decode_position: jax.Array
    asked: jax.Array
    row_slot: jax.Array
    row_position: jax.Array


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What the model is given of a step's T tokens: tokens, positions int32 [T]; decode_position (-1 = padding) and
    decode_slot int32 [Bd]."""

    tokens: jax.Array
    positions: jax.Array
    decode_position: jax.Array
    decode_slot: jax.Array
    meta: AttentionMetadata


def inputs(shape: StepShape, state: SlotState, fields: Fields, at: jax.Array | int) -> Inputs:
    """Of step `at` of the decode rows and all tiles; `state.page_table` is up to date."""
    decode_position = jnp.where(at < fields.decode_count, fields.decode_position + at, -1)
    tile_position = fields.tile_start[:, None] + lax.iota(jnp.int32, shape.tile_size)  # [Nt, Tq]
    positions = jnp.concatenate([jnp.maximum(decode_position, 0), tile_position.reshape(-1)])
    decode_slot = jnp.where(decode_position < 0, shape.slots, fields.decode_slot)
    tokens = jnp.concatenate([state.last_token[decode_slot], fields.tile_tokens.reshape(-1)])
    meta = _attention_metadata(state.page_table, fields, decode_position, tile_position, shape)
    return Inputs(tokens, positions, decode_position, decode_slot, meta)


def compute(
    model: Model,
    shape: StepShape,
    kv: Cache,
    state: SlotState,
    fields: Fields,
    at: jax.Array | int,
    rows_asked: int | None = None,
    begun: Begun | None = None,
) -> tuple[Cache, Computed]:
    """The model over step `at` of the decode rows and all tiles; `state.page_table` is up to date. `rows_asked`: R, the
    rows behind the decode rows and tiles are padding; None: there are none. `begun`: the layers before those whose
    pages `kv` is are done."""
    decodes, tiles = fields.decode_slot.shape[0], fields.tile_slot.shape[0]
    given = inputs(shape, state, fields, at)
    tokens, positions, decode_slot = given.tokens, given.positions, given.decode_slot
    if begun is None:
        hidden, kv = model(tokens, positions, kv, given.meta)
    else:
        layers = range(begun.layers, begun.layers + len(kv))
        (x, residual), kv = model.through(layers, begun.stream, positions, kv, given.meta)
        hidden = x + residual
    row_slot = jnp.concatenate([decode_slot, jnp.where(fields.tile_sample == 1, fields.tile_slot, shape.slots)])
    asked, position = hidden, positions[:decodes]
    if tiles:
        last_of_tile = lax.iota(jnp.int32, tiles) * shape.tile_size + jnp.maximum(fields.tile_len - 1, 0)
        rows = jnp.concatenate([lax.iota(jnp.int32, decodes), decodes + last_of_tile])
        padding = (rows_asked or decodes + tiles) - decodes - tiles
        rows, row_slot = jnp.pad(rows, (0, padding)), jnp.pad(row_slot, (0, padding), constant_values=shape.slots)
        asked, position = hidden[rows], positions[rows]
    return kv, Computed(hidden, tokens, positions, given.decode_position, asked, row_slot, position)


def write_page_table(page_table: jax.Array, fields: Fields, shape: StepShape) -> jax.Array:
    """The host names the page of every position that a step writes; the table keeps it. Page 0 is none: dropped."""

    def put(table: jax.Array, slots: jax.Array, start: jax.Array, pages: jax.Array) -> jax.Array:
        index = (start // shape.page_size)[:, None] + lax.iota(jnp.int32, pages.shape[1])
        index = jnp.where(pages > 0, index, shape.pages_per_sequence)
        return table.at[slots[:, None], index].set(pages, mode="drop")

    if fields.decode_slot.shape[0]:
        page_table = put(page_table, fields.decode_slot, fields.decode_position, fields.decode_pages)
    if fields.tile_slot.shape[0]:
        page_table = put(page_table, fields.tile_slot, fields.tile_start, fields.tile_pages)
    return page_table


def _attention_metadata(
    page_table: jax.Array, fields: Fields, decode_position: jax.Array, tile_position: jax.Array, shape: StepShape
) -> AttentionMetadata:
    size = shape.page_size

    def kv_slots(pages: jax.Array, start: jax.Array, positions: jax.Array, real: jax.Array) -> jax.Array:
        """[rows, positions] -> page * Ps + offset, in the trash page where not real."""
        page = jnp.take_along_axis(pages, positions // size - (start // size)[:, None], axis=1, mode="clip")
        return jnp.where(real, page * size + positions % size, 0).reshape(-1)

    at = decode_position[:, None]
    real = lax.iota(jnp.int32, shape.tile_size)[None] < fields.tile_len[:, None]
    decode_kv = kv_slots(fields.decode_pages, fields.decode_position, jnp.maximum(at, 0), at >= 0)
    tile_kv = kv_slots(fields.tile_pages, fields.tile_start, tile_position, real)
    return AttentionMetadata(
        kv_slots=jnp.concatenate([decode_kv, tile_kv]),
        decode_table=page_table[fields.decode_slot],
        decode_len=decode_position + 1,
        tile_table=page_table[fields.tile_slot],
        tile_start=fields.tile_start,
        tile_len=fields.tile_len,
    )


def count_tokens(
    state: SlotState, fields: Fields, computed: Computed, params: SlotParams, shape: StepShape
) -> SlotState:
    """Counts this step's input tokens by slot; a slot whose sequence starts (position 0) is cleared first. A token
    that has come MAX_COUNT times is not counted on."""
    generated, prompted = state.generated, state.prompted
    decode_position, tokens, positions = computed.decode_position, computed.tokens, computed.positions
    nobody = shape.slots + 1  # out of range: dropped
    if fields.tile_slot.shape[0]:
        starts = jnp.where((fields.tile_start == 0) & (fields.tile_len > 0), fields.tile_slot, nobody)
        generated = generated.at[starts].set(0, mode="drop")
        prompted = prompted.at[starts].set(False, mode="drop")
    real = lax.iota(jnp.int32, shape.tile_size)[None] < fields.tile_len[:, None]
    tile_slot = jnp.where(real, fields.tile_slot[:, None], nobody)
    slots = jnp.concatenate([jnp.where(decode_position < 0, nobody, fields.decode_slot), tile_slot.reshape(-1)])
    of_prompt = positions < params.prompt_length(jnp.minimum(slots, shape.slots))
    prompted = prompted.at[jnp.where(of_prompt, slots, nobody), tokens].set(True, mode="drop")
    fewer = generated.at[slots, tokens].get(mode="fill", fill_value=0) < MAX_COUNT
    generated = generated.at[jnp.where(of_prompt, nobody, slots), tokens].add(fewer.astype(jnp.int16), mode="drop")
    return dataclasses.replace(state, generated=generated, prompted=prompted)
