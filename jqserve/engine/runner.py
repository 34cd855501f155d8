"""The device's side of the engine: owns weights, KV pages and slot state, compiles the buckets and runs plans."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jqserve.engine.adopt import Adopter
from jqserve.engine.batch import StepShape, pack, padding
from jqserve.engine.buckets import Buckets
from jqserve.engine.cache import Cache, CacheShape, make_cache
from jqserve.engine.compile_cache import ProgramCache, compile_program
from jqserve.engine.dispatch import Dispatcher
from jqserve.engine.lowering import Job, Lowerers, traceable
from jqserve.engine.plan import Adopted, Plan
from jqserve.engine.programs import Begin, Draw, Forward, Fused, Program, Programs, captured, describe
from jqserve.engine.request import TokenLogprobs
from jqserve.engine.sampler import Sampled
from jqserve.engine.slots import SlotParams, SlotTable, empty
from jqserve.engine.split import (
    LEAST,
    Half,
    first_layers,
    mask_words,
    pack_targets,
    read_scores,
)
from jqserve.engine.step import SlotState, Structure, make_state
from jqserve.engine.traceable import alone
from jqserve.engine.variant import ORDER, Variant

Progress = Callable[[int, int, str], None]  # (done, total, what)


@dataclasses.dataclass(frozen=True)
class Launched:
    """A dispatch under way: `sampled_rows` names the row of each of plan.decodes and plan.chunks, -1 for none.

    half: of a step in two halves, the first, of the program `forward`; `output` is None until the second is asked for,
    which waits for the masks of constrained rows. Both raise what handing them to the device raised.
    """

    plan: Plan
    sampled_rows: list[int]
    output: Future[Sampled] | None
    half: Future[Half] | None = None
    forward: Forward | None = None


@dataclasses.dataclass(frozen=True)
class Read:
    """What a dispatch gave, on the host: for each of plan.sequences its tokens (none: its prompt goes on) and logprobs,
    where asked for."""

    tokens: list[list[int]]
    logprobs: list[list[TokenLogprobs]]
    scores: list[list[TokenLogprobs]] = dataclasses.field(default_factory=list)  # of each of plan.chunks, if any asks


class Runner:
    """Runs plans on one device. Not thread-safe: the engine's loop is its only caller. Programs are handed to the
    device by a thread of its own (`engine/dispatch`), to which `kv` and `state` belong while one is under way."""

    def __init__(
        self,
        structure: Structure,
        leaves: tuple[jax.Array, ...],
        shape: StepShape,
        cache: CacheShape,
        buckets: Buckets,
        *,
        variants: tuple[Variant, ...] = ORDER,
        cut_masked: bool = False,
        cache_of_programs: ProgramCache | None = None,
        job: Job | None = None,
    ) -> None:
        """`variants`: the samplers to have programs of; `cut_masked`: see `Programs`. `job`: what other processes need
        to lower programs; None: all are lowered here."""
        self.cache_of_programs = cache_of_programs
        self.job = job
        self.programs = Programs(buckets, shape.tile_size, variants, cut_masked=cut_masked)
        self.structure, self.leaves = structure, leaves
        self.shape, self.cache_shape = shape, cache
        self.device = next(iter(leaves[0].devices()))
        self.kv: Cache = make_cache(cache, self.device)
        self.state: SlotState = make_state(shape, self.device)
        self.slots = SlotTable(shape.slots, self.device)
        self.compilations = 0
        self.compilations_after_warmup = 0
        arguments = self.leaves, self.kv, self.state, empty(shape.slots)
        self._abstract = jax.tree.map(_abstract, arguments)  # now: a compilation may run beside steps that donate them
        self.places: list[jax.Array] = []  # see `engine/places`
        self.dispatcher = Dispatcher()
        self._adopt = Adopter(shape)
        self._warm = False
        self._compiled: dict[Program, Any] = {}
        self._prepared: concurrent.futures.Future[None] | None = None

    @property
    def buckets(self) -> Buckets:
        return self.programs.buckets

    @buckets.setter
    def buckets(self, buckets: Buckets) -> None:
        old = self.programs
        self.programs = Programs(buckets, old.tile_size, old.variants, cut_masked=old.cut_masked)

    def program(self, program: Program) -> Any:
        """The compiled program; compiles it when warm-up has not (and counts that)."""
        if program not in self._compiled:
            self._compiled[program] = self.compile(program)
            self.compilations_after_warmup += self._warm
        return self._compiled[program]

    def compile(self, program: Program, elsewhere: Lowerers | None = None) -> Any:
        """Any thread may call this: XLA compiles without the interpreter's lock."""

        def lower() -> jax.stages.Lowered:
            one = traceable(self.structure, self.shape, program, *self._abstract)
            lowered = elsewhere.lower(program, one) if elsewhere is not None else None
            return lowered if lowered is not None else alone(one.lower)

        compiled, new = compile_program(program.name, lower, self.cache_of_programs, captured(program))
        self.compilations += new
        return compiled

    def warm_up(self, progress: Progress | None = None, *, runs: int = 1, programs: Iterable[Program] = ()) -> None:
        """Compiles every program in threads and runs each `runs` times on padding (CUDA graphs are captured so)."""
        wanted = list(programs) or self.programs.always()
        workers = max(1, min(len(wanted), os.cpu_count() or 1))
        with (
            self._lowerers(wanted) as elsewhere,
            concurrent.futures.ThreadPoolExecutor(workers, "compile") as pool,
        ):
            jobs = {pool.submit(self.compile, p, elsewhere): p for p in wanted if p not in self._compiled}
            try:
                for done, job in enumerate(concurrent.futures.as_completed(jobs), 1):
                    self._compiled[jobs[job]] = job.result()
                    if progress is not None:
                        progress(done, len(jobs), describe(jobs[job]))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        self.state = self._adopt.warm_up(self.state)
        for program in wanted:
            self.idle_run([program], runs)
        jax.block_until_ready(self.state.last_token)
        self._warm = True

    def prepare(self) -> concurrent.futures.Future[None]:
        """Compiles what constrained requests and scored prompts need, in threads; the first call starts it, every call
        gives the same future; one after it has failed (for want of memory, say) starts it again."""
        if self._prepared is None or (self._prepared.done() and self._prepared.exception() is not None):
            workers = max(1, (os.cpu_count() or 1) // 2)  # the other half goes on serving
            pool = concurrent.futures.ThreadPoolExecutor(workers + 1, "compile")
            self._prepared = pool.submit(self._compile_on_demand, pool)
            self._prepared.add_done_callback(lambda _: pool.shutdown(wait=False))
        return self._prepared

    def _compile_on_demand(self, pool: concurrent.futures.ThreadPoolExecutor) -> None:
        programs = [p for p in self.programs.on_demand() if p not in self._compiled]
        with self._lowerers(programs) as elsewhere:
            compiled = list(pool.map(lambda program: self.compile(program, elsewhere), programs))
        self._compiled |= dict(zip(programs, compiled))

    def _lowerers(self, wanted: list[Program]) -> contextlib.AbstractContextManager[Lowerers | None]:
        """For those of them that are not there yet."""
        kept = self.cache_of_programs
        missing = [p for p in wanted if p not in self._compiled and (kept is None or not kept.has(p.name))]
        return Lowerers.for_programs(self.job, len(missing))

    def idle_run(self, programs: Iterable[Program], runs: int) -> float:
        """Runs the programs of a step `runs` times with nothing but padding; seconds of the last time, with the device
        waited for."""
        self.dispatcher.drain()
        began = time.perf_counter()
        for _ in range(runs):
            jax.block_until_ready(self.state.last_token)
            began = time.perf_counter()
            half = None
            for program in programs:
                if isinstance(program, Begin):
                    continue  # runs as the beginning of its forward program
                if isinstance(program, Draw):
                    self._draw(program, half or self._no_logits(program.rows), None, self._params(program))
                else:
                    packed, _views = padding(self.shape, program.bucket)
                    if isinstance(program, Fused):
                        self._step(program, packed, self._params(program))
                    else:
                        half = self._forward(program, packed, None, self._params(program))
            jax.block_until_ready(self.state.last_token)
        return time.perf_counter() - began

    def launch(self, plan: Plan) -> Launched:
        """Has a step dispatched and returns at once. What fails is raised by `read`; call `reset` then, for the
        device's state is lost."""
        for sequence in plan.admitted:
            if sequence.slot is not None:
                self.slots.set(sequence)
        if (fused := self.programs.fused(plan)) is not None:
            packed, rows = pack(plan, self.shape, fused.bucket)
            params = self._params(fused)
            return Launched(plan, rows, self.dispatcher.submit(lambda: self._step(fused, packed, params, plan.adopted)))
        program = self.programs.forward(plan)
        packed, rows = pack(plan, self.shape, program.bucket)
        targets = pack_targets(plan, self.shape, program.bucket) if program.scored else None
        params = self._params(program)
        half = self.dispatcher.submit(lambda: self._forward(program, packed, targets, params, plan.adopted))
        launched = Launched(plan, rows, None, half, program)
        return launched if plan.constrained else self.sample(launched, None)

    def masks(self, launched: Launched) -> np.ndarray:
        """Room for the masks of a dispatch, everything allowed: int32 [R, ceil(V/32)]."""
        assert launched.forward is not None
        return np.full((launched.forward.asked, mask_words(self.shape)), -1, np.int32)

    def sample(self, launched: Launched, mask: np.ndarray | None) -> Launched:
        """Has the second half of a step in two dispatched: mask int32 [R, ceil(V/32)] (see `engine/split`)."""
        half = launched.half
        assert half is not None and launched.forward is not None
        program = self.programs.draw(launched.plan, launched.forward, mask is not None)
        params = self._params(program)
        sent = None if mask is None else jax.device_put(mask, self.device)  # here: the other thread has enough to do
        output = self.dispatcher.submit(lambda: self._draw(program, half.result(), sent, params))
        return dataclasses.replace(launched, output=output)

    def read(self, launched: Launched) -> Read:
        """Waits for a dispatch. Raises what the device raised."""
        plan, rows = launched.plan, launched.sampled_rows
        assert launched.output is not None
        output = launched.output.result()
        sampled = np.asarray(output.tokens)
        if plan.steps == 1:
            flat = sampled.tolist()
            taken = [[flat[row]] if row >= 0 else [] for row in rows]
        else:
            tokens = sampled.reshape(plan.steps, -1).T.tolist()
            taken = [tokens[row][:count] if row >= 0 else [] for row, count in zip(rows, plan.sampled)]
        logprobs: list[list[TokenLogprobs]] = [[]] * len(rows)
        if any(s.sampler and s.sampling.logprobs is not None for s in plan.sequences):
            logprobs = _read_logprobs(launched, output, [len(t) for t in taken])
        half = launched.half.result() if launched.half is not None else None
        scores = read_scores(plan, half, self.shape) if half is not None and half.scores is not None else []
        return Read(taken, logprobs, scores)

    def reset(self) -> None:
        """New KV pages and slot state, after a step raised: what was donated to it is gone."""
        self.dispatcher.drain()
        self.kv = self.state = None  # type: ignore[assignment]  # freed before new ones are made
        self.kv = make_cache(self.cache_shape, self.device)
        self.state = make_state(self.shape, self.device)
        self.slots = SlotTable(self.shape.slots, self.device)

    def _params(self, program: Program) -> SlotParams | None:
        """The sampling parameters as they are now, for programs that take them."""
        greedy = isinstance(program, Fused | Draw) and program.variant is Variant.GREEDY
        return None if greedy else self.slots.on_device()

    def _step(
        self, program: Fused, packed: np.ndarray, params: SlotParams | None, adopted: tuple[Adopted, ...] = ()
    ) -> Sampled:
        if adopted:
            self.state = self._adopt(self.state, adopted)
        self.kv, self.state, output = self.program(program)(self.leaves, self.kv, self.state, params, packed)
        return _copied(output)

    def _forward(
        self,
        program: Forward,
        packed: np.ndarray,
        targets: np.ndarray | None,
        params: SlotParams | None,
        adopted: tuple[Adopted, ...] = (),
    ) -> Half:
        if adopted:
            self.state = self._adopt(self.state, adopted)
        if program.scored and targets is None:
            targets = np.zeros((program.bucket.tiles, self.shape.tile_size), np.int32)
        done: Cache = ()
        kv, stream = self.kv, None
        if program.begun:
            first = first_layers(len(kv))
            arguments = self.leaves, kv[:first], self.state, packed
            done, self.state, stream = self.program(Begin(program.bucket))(*arguments)
            kv = kv[first:]
        outputs = self.program(program)(self.leaves, kv, self.state, params, packed, targets, stream)
        kv, self.state, *rest = outputs
        self.kv = done + kv
        half = Half(*rest)
        _copied(half.scores)
        return half

    def _draw(
        self, program: Draw, half: Half, mask: np.ndarray | jax.Array | None, params: SlotParams | None
    ) -> Sampled:
        if program.masked and mask is None:
            mask = np.full((program.rows, mask_words(self.shape)), -1, np.int32)
        arguments = self.state, params, half.logits, half.slot, half.position, mask
        self.state, output = self.program(program)(*arguments)
        return _copied(output)

    def _no_logits(self, rows: int) -> Half:
        """What a padding step would give, to run a second half alone."""
        nobody = jnp.full((rows,), self.shape.slots, jnp.int32, device=self.device)
        logits = jnp.zeros((rows, self.shape.vocab_size), jnp.float32, device=self.device)
        return Half(logits, nobody, jnp.zeros_like(nobody), None)


def _abstract(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None))


def _copied[T](output: T) -> T:
    """On its way to the host."""
    for leaf in jax.tree.leaves(output):
        leaf.copy_to_host_async()
    return output


def _read_logprobs(launched: Launched, output: Sampled, counts: list[int]) -> list[list[TokenLogprobs]]:
    steps, sequences = launched.plan.steps, launched.plan.sequences
    assert output.logprob is not None
    chosen = np.asarray(output.logprob).reshape(steps, -1)
    top_ids = top = np.zeros((steps, chosen.shape[1], 0))
    if output.top_ids is not None and output.top is not None:
        top_ids = np.asarray(output.top_ids).reshape(*chosen.shape, -1)
        top = np.asarray(output.top).reshape(*chosen.shape, -1)
    result: list[list[TokenLogprobs]] = []
    for row, sequence, count in zip(launched.sampled_rows, sequences, counts):
        wanted = sequence.sampling.logprobs
        entries = []
        for step in range(count if wanted is not None else 0):
            ids, values = top_ids[step, row, :wanted].tolist(), top[step, row, :wanted].tolist()
            if sequence.grammar is not None:
                values = [max(value, LEAST) for value in values]  # of tokens that the grammar does not allow
            entries.append(TokenLogprobs(float(chosen[step, row]), tuple(ids), tuple(values)))
        result.append(entries)
    return result
