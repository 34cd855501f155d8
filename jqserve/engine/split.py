"""A step as two programs: `forward`, the model up to the logits, and `draw`, the tokens.

A grammar's mask for a token follows from the token before it, which the host has only read when the step that gave it
is over. So that the device does not wait for the host meanwhile, `forward` (which needs no mask and takes nearly all of
the time) is dispatched before the step before it is read, and `draw` after the masks have been computed on the host
beside it. Without masks both are dispatched at once. A forward program can score as well: the log-probability of every
token of a prompt. `engine/programs` says which programs there are.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jqserve.engine.batch import StepShape, packed_size, unpack
from jqserve.engine.buckets import Bucket
from jqserve.engine.cache import Cache
from jqserve.engine.plan import Plan
from jqserve.engine.programs import Begin, Draw, Forward
from jqserve.engine.request import TokenLogprobs
from jqserve.engine.sampler import MAX_TOP_LOGPROBS, Sampled, greedy, sample
from jqserve.engine.slots import SlotParams
from jqserve.engine.step import (
    Begun,
    Model,
    SlotState,
    Structure,
    compute,
    count_tokens,
    inputs,
    write_page_table,
)
from jqserve.engine.traceable import Traceable
from jqserve.engine.variant import Variant

NEVER = -1e30  # the logit of a token that may not come: finite, so that nothing downstream meets inf - inf
LEAST = -9999.0  # what is told as its logprob


@dataclasses.dataclass(frozen=True)
class Half:
    """A step whose logits are under way: float32 [R, V], with the slot and the new token's position of each row.

    scores: of the tiles' tokens, when asked for (`Scores`).
    """

    logits: jax.Array
    slot: jax.Array
    position: jax.Array
    scores: Scores | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scores:
    """By tile and place: logprob float32 [Nt, Tq] of the token that really follows, top_ids int32 and top float32
    [Nt, Tq, 20] of the most likely ones."""

    logprob: jax.Array
    top_ids: jax.Array
    top: jax.Array


def forward(
    structure: Structure,
    shape: StepShape,
    bucket: Bucket,
    asked: int,
    scored: bool,
    leaves: tuple[jax.Array, ...],
    kv: Cache,
    state: SlotState,
    params: SlotParams,
    packed: jax.Array,
    targets: jax.Array | None,
    stream: tuple[jax.Array, jax.Array] | None = None,
) -> tuple[Cache, SlotState, jax.Array, jax.Array, jax.Array, Scores | None]:
    """One step up to the logits of `asked` rows R. targets int32 [Nt, Tq] when `scored`: the token after each of the
    tiles' tokens. stream: what `begin` gave; `kv` is then of the layers that are left."""
    fields = unpack(packed, shape, bucket)
    begun = None
    if stream is None:
        state = dataclasses.replace(state, page_table=write_page_table(state.page_table, fields, shape))
    else:
        begun = Begun(structure.layers - len(kv), stream)
    model = structure.merge(leaves)
    kv, computed = compute(model, shape, kv, state, fields, 0, asked, begun)
    logits = model.logits(computed.asked)
    state = count_tokens(state, fields, computed, params, shape)
    scores = None
    if scored:
        assert targets is not None
        tiles = computed.hidden[bucket.decode_rows :].reshape(bucket.tiles, shape.tile_size, -1)
        scores = score_tiles(model, tiles, targets)
    return kv, state, logits, computed.row_slot, computed.row_position + 1, scores


def begin(
    structure: Structure,
    shape: StepShape,
    bucket: Bucket,
    leaves: tuple[jax.Array, ...],
    kv: Cache,
    state: SlotState,
    packed: jax.Array,
) -> tuple[Cache, SlotState, tuple[jax.Array, jax.Array]]:
    """The first layers of a step, those whose pages `kv` is."""
    fields = unpack(packed, shape, bucket)
    state = dataclasses.replace(state, page_table=write_page_table(state.page_table, fields, shape))
    model, given = structure.merge(leaves), inputs(shape, state, fields, 0)
    stream, kv = model.through(range(len(kv)), model.entering(given.tokens), given.positions, kv, given.meta)
    return kv, state, stream


def first_layers(layers: int) -> int:
    """How many of them `begin` computes. Few, for the device waits while they are handed over (2.5 ms for all 32 of an
    8B model); enough that the rest can be handed over while they are computed (all: 2.9 to 4.0 ms)."""
    return max(1, layers * 7 // 16)


def score_tiles(model: Model, hidden: jax.Array, targets: jax.Array) -> Scores:
    """hidden [Nt, Tq, D]. A tile at a time: the logits of all of them would not fit beside the KV pages."""

    def one(tile: tuple[jax.Array, jax.Array]) -> Scores:
        logprobs = jax.nn.log_softmax(model.logits(tile[0]), axis=-1)
        best, ids = lax.top_k(logprobs, min(MAX_TOP_LOGPROBS, logprobs.shape[-1]))
        chosen = jnp.take_along_axis(logprobs, tile[1][:, None], axis=-1)[:, 0]
        return Scores(chosen, ids.astype(jnp.int32), best)

    scores: Scores = lax.map(one, (hidden, targets))
    return scores


def draw(
    variant: Variant,
    state: SlotState,
    params: SlotParams | None,
    logits: jax.Array,
    slot: jax.Array,
    position: jax.Array,
    mask: jax.Array | None,
) -> tuple[SlotState, Sampled]:
    """The other half. mask int32 [R, ceil(V/32)]: bit t % 32 of word t // 32 says whether token t may come."""
    if mask is not None:
        bits = jnp.right_shift(mask[:, :, None], jnp.arange(32, dtype=jnp.int32)) & 1
        allowed = bits.reshape(mask.shape[0], -1)[:, : logits.shape[-1]] == 1
        logits = jnp.where(allowed | jnp.isnan(logits), logits, NEVER)
    if variant is Variant.GREEDY:
        sampled = greedy(logits)
    else:
        assert params is not None
        rows = params.rows(slot, position, state.generated, state.prompted)
        sampled = sample(logits, rows, scored=variant is Variant.SCORED, plain=variant is Variant.PLAIN)
    return dataclasses.replace(state, last_token=state.last_token.at[slot].set(sampled.tokens)), sampled


def forward_program(
    structure: Structure,
    shape: StepShape,
    program: Forward,
    leaves: Any,
    kv: Any,
    state: Any,
    params: Any,
) -> Traceable:
    """For arguments that are arrays or ShapeDtypeStructs."""
    bucket = program.bucket
    packed = jax.ShapeDtypeStruct((packed_size(shape, bucket),), jnp.int32)
    stream = None
    if program.begun:
        kv = kv[first_layers(structure.layers) :]
        tokens = jax.ShapeDtypeStruct((bucket.decode_rows,), jnp.int32)
        stream = jax.eval_shape(lambda leaves, tokens: structure.merge(leaves).entering(tokens), leaves, tokens)
    targets = jax.ShapeDtypeStruct((bucket.tiles, shape.tile_size), jnp.int32) if program.scored else None
    function = functools.partial(forward, structure, shape, bucket, program.asked, program.scored)
    return Traceable(program.name, function, (leaves, kv, state, params, packed, targets, stream), (1, 2))


def begin_program(
    structure: Structure, shape: StepShape, program: Begin, leaves: Any, kv: Any, state: Any
) -> Traceable:
    """For arguments that are arrays or ShapeDtypeStructs; `kv` of all layers."""
    packed = jax.ShapeDtypeStruct((packed_size(shape, program.bucket),), jnp.int32)
    function = functools.partial(begin, structure, shape, program.bucket)
    kv = kv[: first_layers(structure.layers)]
    return Traceable(program.name, function, (leaves, kv, state, packed), (1, 2))


def draw_program(shape: StepShape, program: Draw, state: Any, params: Any) -> Traceable:
    """For arguments that are arrays or ShapeDtypeStructs. The greedy variant ignores `params`."""
    rows, words = program.rows, mask_words(shape)
    logits = jax.ShapeDtypeStruct((rows, shape.vocab_size), jnp.float32)
    ints = jax.ShapeDtypeStruct((rows,), jnp.int32)
    mask = jax.ShapeDtypeStruct((rows, words), jnp.int32) if program.masked else None
    function = functools.partial(draw, program.variant)
    params = None if program.variant is Variant.GREEDY else params
    return Traceable(program.name, function, (state, params, logits, ints, ints, mask), (0,))


def mask_words(shape: StepShape) -> int:
    """int32 words of a row's mask."""
    return -(-shape.vocab_size // 32)


def pack_targets(plan: Plan, shape: StepShape, bucket: Bucket) -> np.ndarray:
    """int32 [Nt, Tq]: the token that follows each token of each tile (0 where none is known yet)."""
    targets = np.zeros((bucket.tiles, shape.tile_size), np.int32)
    tile = 0
    for chunk in plan.chunks:
        following = chunk.sequence.tokens[chunk.start + 1 : chunk.start + chunk.length + 1]
        for at in range(0, chunk.length, shape.tile_size):
            here = following[at : at + shape.tile_size]
            targets[tile, : len(here)] = here
            tile += 1
    return targets


def read_scores(plan: Plan, half: Half, shape: StepShape) -> list[list[TokenLogprobs]]:
    """For each of plan.chunks the scores of tokens start + 1 .. start + length; empty where nobody asked."""
    assert half.scores is not None
    logprob, ids, top = (np.asarray(x) for x in (half.scores.logprob, half.scores.top_ids, half.scores.top))
    result: list[list[TokenLogprobs]] = []
    tile = 0
    for chunk in plan.chunks:
        tiles = -(-chunk.length // shape.tile_size)
        entries: list[TokenLogprobs] = []
        if chunk.sequence.wants_scores:
            count = chunk.sequence.sampling.prompt_logprobs or 0
            flat = logprob[tile : tile + tiles].reshape(-1)[: chunk.length].tolist()
            best = ids[tile : tile + tiles].reshape(-1, ids.shape[-1])
            values = top[tile : tile + tiles].reshape(best.shape)
            entries = [
                TokenLogprobs(flat[i], tuple(best[i, :count].tolist()), tuple(values[i, :count].tolist()))
                for i in range(chunk.length)
            ]
        result.append(entries)
        tile += tiles
    return result
