"""Steps whose sampling waits for the host, as two programs: the logits, and the tokens once their masks are there.

A grammar's mask for a token follows from the token before it, which the host has only read when the step that gave it
is over. So that the device does not wait for the host meanwhile, such a step is dispatched in two halves: `forward`
(the model, which needs no mask and takes nearly all of the time) before the step before it is read, and `draw` after
the masks have been computed on the host beside it. The same forward program can score: the log-probability of every
token of a prompt. Steps in which nobody asks for either never come here, and pay nothing.

The programs are compiled when the first such request comes, in the background (`prepare`), or ahead.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jqserve.engine.batch import StepShape, pack, packed_size, tiles_needed, unpack
from jqserve.engine.buckets import Bucket
from jqserve.engine.cache import Cache
from jqserve.engine.plan import Plan
from jqserve.engine.request import TokenLogprobs
from jqserve.engine.sampler import MAX_TOP_LOGPROBS, Sampled, sample
from jqserve.engine.slots import SlotParams, empty
from jqserve.engine.step import Model, SlotState, Structure, compute, count_tokens, write_page_table
from jqserve.engine.variant import ORDER, Variant, needed_by

if TYPE_CHECKING:
    from jqserve.engine.runner import Runner

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
    scored: bool,
    leaves: tuple[jax.Array, ...],
    kv: Cache,
    state: SlotState,
    params: SlotParams,
    packed: jax.Array,
    targets: jax.Array | None,
) -> tuple[Cache, SlotState, jax.Array, jax.Array, jax.Array, Scores | None]:
    """One step up to its logits. targets int32 [Nt, Tq] when `scored`: the token after each of the tiles' tokens."""
    fields = unpack(packed, shape, bucket)
    state = dataclasses.replace(state, page_table=write_page_table(state.page_table, fields, shape))
    model = structure.merge(leaves)
    kv, computed = compute(model, shape, kv, state, fields, 0)
    logits = model.logits(computed.asked)
    state = count_tokens(state, fields, computed, params, shape)
    scores = None
    if scored:
        assert targets is not None
        tiles = computed.hidden[bucket.decode_rows :].reshape(bucket.tiles, shape.tile_size, -1)
        scores = score_tiles(model, tiles, targets)
    return kv, state, logits, computed.row_slot, computed.row_position + 1, scores


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
    scored: bool,
    state: SlotState,
    params: SlotParams,
    logits: jax.Array,
    slot: jax.Array,
    position: jax.Array,
    mask: jax.Array,
) -> tuple[SlotState, Sampled]:
    """The other half. mask int32 [R, ceil(V/32)]: bit t % 32 of word t // 32 says whether token t may come."""
    bits = jnp.right_shift(mask[:, :, None], jnp.arange(32, dtype=jnp.int32)) & 1
    allowed = bits.reshape(mask.shape[0], -1)[:, : logits.shape[-1]] == 1
    masked = jnp.where(allowed | jnp.isnan(logits), logits, NEVER)
    sampled = sample(masked, params.rows(slot, position, state.generated, state.prompted), scored=scored)
    return dataclasses.replace(state, last_token=state.last_token.at[slot].set(sampled.tokens)), sampled


class SplitRunner:
    """The programs, and plans run by them. Belongs to a `Runner`, whose weights, pages and state it uses."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self.words = -(-runner.shape.vocab_size // 32)
        trees = (runner.leaves, runner.kv, runner.state, empty(runner.shape.slots))
        self._arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=_sharding(x)), trees)
        self._forward: dict[tuple[Bucket, bool], Any] = {}
        self._draw: dict[tuple[int, bool], Any] = {}
        self._prepared: concurrent.futures.Future[None] | None = None

    def prepare(self) -> concurrent.futures.Future[None]:
        """Compiles everything, in threads; the first call starts it, every call gives the same future."""
        if self._prepared is None:
            workers = max(1, (os.cpu_count() or 1) // 2)  # the other half goes on serving
            pool = concurrent.futures.ThreadPoolExecutor(workers + 1, "compile")
            self._prepared = pool.submit(self._compile_all, pool)
            self._prepared.add_done_callback(lambda _: pool.shutdown(wait=False))
        return self._prepared

    def _compile_all(self, pool: concurrent.futures.ThreadPoolExecutor) -> None:
        jobs = self.programs()
        draws = [(rows, scored) for rows in sorted({b.sampled for b, _ in jobs}) for scored in self._scored_kinds()]
        forwards = list(pool.map(lambda job: self.compile_forward(*job), jobs))
        drawn = list(pool.map(lambda job: self.compile_draw(*job), draws))
        self._forward |= dict(zip(jobs, forwards))
        self._draw |= dict(zip(draws, drawn))

    def programs(self) -> list[tuple[Bucket, bool]]:
        """(bucket, scored) of all forward programs, the costliest first. Few: coarse row counts, and prompts are scored
        in steps of all rows. Where every program is on the user's clock (CPUs), one with tiles and one without."""
        buckets, rows = self.runner.buckets, self.runner.buckets.decode[-1]
        if len(self.runner.variants) == 1:
            return [(max(buckets.mixed), True), (Bucket(rows, 0), False)]
        mixed = sorted(buckets.mixed, reverse=True)
        scored = [(b, True) for b in mixed if b.decode_rows == rows]
        decode = [(Bucket(n, 0), False) for n in reversed(buckets.coarse or buckets.decode)]
        return [*scored, *((b, False) for b in mixed), *decode]

    def choose(self, plan: Plan) -> tuple[Bucket, bool]:
        """The forward program of a plan: the one with the fewest rows that holds it."""
        size, rows = self.runner.shape.tile_size, len(plan.decodes)
        tiles = tiles_needed(plan, size)
        scored = any(chunk.sequence.wants_scores for chunk in plan.chunks)
        fitting = [(b, s) for b, s in self._forward if b.decode_rows >= rows and b.tiles >= tiles and (s or not scored)]
        return min(fitting, key=lambda program: (program[0].rows(size), program[0].sampled, program[1]))

    def _scored_kinds(self) -> tuple[bool, ...]:
        return (False, True) if len(self.runner.variants) > 1 else (True,)

    def compile_forward(self, bucket: Bucket, scored: bool) -> Any:
        runner = self.runner
        packed = jax.ShapeDtypeStruct((packed_size(runner.shape, bucket),), jnp.int32)
        targets = jax.ShapeDtypeStruct((bucket.tiles, runner.shape.tile_size), jnp.int32) if scored else None
        function = functools.partial(forward, runner.structure, runner.shape, bucket, scored)
        name = f"forward_{bucket.decode_rows}_{bucket.tiles}{'_scored' * scored}"
        function.__name__ = name  # type: ignore[attr-defined]
        jitted = jax.jit(function, donate_argnums=(1, 2))
        return self._kept(name, lambda: jitted.lower(*self._arguments, packed, targets).compile())

    def compile_draw(self, rows: int, scored: bool) -> Any:
        _, _, state, params = self._arguments
        logits = jax.ShapeDtypeStruct((rows, self.runner.shape.vocab_size), jnp.float32)
        ints, mask = jax.ShapeDtypeStruct((rows,), jnp.int32), jax.ShapeDtypeStruct((rows, self.words), jnp.int32)
        function = functools.partial(draw, scored)
        name = f"draw_{rows}{'_scored' * scored}"
        function.__name__ = name  # type: ignore[attr-defined]
        jitted = jax.jit(function, donate_argnums=(0,))
        return self._kept(name, lambda: jitted.lower(state, params, logits, ints, ints, mask).compile())

    def _kept(self, name: str, compile_it: Callable[[], Any]) -> Any:
        """From the cache of programs, where there is one, or compiled."""
        kept = self.runner.cache_of_programs
        if kept is not None and (known := kept.load(name)) is not None:
            return known
        self.runner.compilations += 1
        compiled = compile_it()
        if kept is not None:
            kept.store(name, compiled)
        return compiled

    def launch(self, plan: Plan) -> tuple[Half, list[int]]:
        """Dispatches the first half: (it, the row of each of plan.sequences, -1 for none)."""
        runner, shape = self.runner, self.runner.shape
        bucket, scored = self.choose(plan)
        packed, rows = pack(plan, shape, bucket)
        targets = pack_targets(plan, shape, bucket) if scored else None
        program, params = self._forward[bucket, scored], runner.slots.on_device()
        runner.kv, runner.state, *outputs = program(runner.leaves, runner.kv, runner.state, params, packed, targets)
        logits, slot, position, scores = outputs
        for leaf in jax.tree.leaves(scores):
            leaf.copy_to_host_async()
        return Half(logits, slot, position, scores), rows

    def masks(self, half: Half) -> np.ndarray:
        """Room for the masks, everything allowed: int32 [R, ceil(V/32)]."""
        return np.full((half.logits.shape[0], self.words), -1, np.int32)

    def draw(self, plan: Plan, half: Half, mask: np.ndarray) -> tuple[Sampled, Variant]:
        """Dispatches the second half."""
        runner = self.runner
        kinds = self._scored_kinds()
        scored = kinds[-1] and (len(kinds) == 1 or needed_by(plan.sequences) is ORDER[-1])
        program, params = self._draw[half.logits.shape[0], scored], runner.slots.on_device()
        runner.state, sampled = program(runner.state, params, half.logits, half.slot, half.position, mask)
        for leaf in jax.tree.leaves(sampled):
            leaf.copy_to_host_async()
        return sampled, Variant.SCORED if scored else Variant.SAMPLE


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


def _sharding(x: Any) -> Any:
    return getattr(x, "sharding", None)
