"""The device's side of the engine: owns weights, KV pages and slot state, compiles the buckets and runs plans."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import os
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from jqserve.engine.adopt import Adopter
from jqserve.engine.batch import StepShape, pack, padding, tiles_needed
from jqserve.engine.buckets import Bucket, Buckets
from jqserve.engine.cache import Cache, CacheShape, make_cache
from jqserve.engine.compile_cache import ProgramCache, compile_lowered
from jqserve.engine.plan import Plan
from jqserve.engine.request import TokenLogprobs
from jqserve.engine.sampler import Sampled
from jqserve.engine.sequence import Sequence
from jqserve.engine.slots import SlotParams, SlotTable, empty
from jqserve.engine.split import LEAST, Half, SplitRunner, read_scores
from jqserve.engine.step import SlotState, Structure, lower_step, make_state
from jqserve.engine.variant import ORDER, Variant, needed_by

Program = tuple[Bucket, Variant]
Progress = Callable[[int, int, str], None]  # (done, total, what)


@dataclasses.dataclass(frozen=True)
class Launched:
    """A dispatch under way: `sampled_rows` names the row of each of plan.decodes and plan.chunks, -1 for none.

    half: of a step in two halves, the first; `output` is None until the second is dispatched.
    """

    plan: Plan
    sampled_rows: list[int]
    output: Sampled | None
    variant: Variant
    half: Half | None = None


@dataclasses.dataclass(frozen=True)
class Read:
    """What a dispatch gave, on the host: for each of plan.sequences its tokens (none: its prompt goes on) and logprobs,
    where asked for."""

    tokens: list[list[int]]
    logprobs: list[list[TokenLogprobs]]
    scores: list[list[TokenLogprobs]] = dataclasses.field(default_factory=list)  # of each of plan.chunks, if any asks


class Runner:
    """Runs plans on one device. Not thread-safe: the engine's loop is its only caller."""

    def __init__(
        self,
        structure: Structure,
        leaves: tuple[jax.Array, ...],
        shape: StepShape,
        cache: CacheShape,
        buckets: Buckets,
        *,
        variants: tuple[Variant, ...] = ORDER,
        cache_of_programs: ProgramCache | None = None,
    ) -> None:
        """`variants`: those that have programs of their own; a step takes the first that gives all it asks."""
        self.cache_of_programs = cache_of_programs
        self.variants = variants
        self.structure, self.leaves = structure, leaves
        self.shape, self.cache_shape, self.buckets = shape, cache, buckets
        self.device = next(iter(leaves[0].devices()))
        self.kv: Cache = make_cache(cache, self.device)
        self.state: SlotState = make_state(shape, self.device)
        self.slots = SlotTable(shape.slots, self.device)
        self.compilations = 0
        self.compilations_after_warmup = 0
        self._adopt = Adopter(shape)
        self._warm = False
        self._programs: dict[Program, Any] = {}
        self.split = SplitRunner(self)

    def programs(self) -> list[Program]:
        """All that serving can need, the costliest first.

        Steps with prefill have no greedy program (their sampler is a small part of them), and the rarer variants take
        coarser row counts: every program costs a start-up a second or more of compilation.
        """
        if len(self.variants) == 1:
            return [(bucket, self.variants[0]) for bucket in self.buckets.all()]
        buckets, programs = self.buckets, []
        for variant in self.variants:
            greedy = variant is Variant.GREEDY
            programs += [] if greedy else [(bucket, variant) for bucket in sorted(buckets.mixed, reverse=True)]
            rows = buckets.decode if greedy else buckets.coarse or buckets.decode
            programs += [(bucket, variant) for bucket in buckets.only_decode(rows)]
        return sorted(programs, key=lambda p: (-p[0].rows(self.shape.tile_size), -p[0].steps, p[1]))

    def choose(self, plan: Plan) -> Program:
        """The program of a plan."""
        tiles = tiles_needed(plan, self.shape.tile_size)
        least = ORDER.index(needed_by(plan.sequences))
        if tiles and len(self.variants) > 1:
            least = max(least, ORDER.index(Variant.SAMPLE))
        variant = next(v for v in self.variants if ORDER.index(v) >= least)
        bucket = self.buckets.choose(
            len(plan.decodes), tiles, self.shape.tile_size, steps=plan.steps, coarse=variant is not Variant.GREEDY
        )
        return bucket, variant

    def cheapest(self, bucket: Bucket) -> Program:
        """The program of a bucket in the variant that does least."""
        least = Variant.SAMPLE if bucket.tiles else Variant.GREEDY
        return bucket, least if least in self.variants else self.variants[-1]

    def full_step(self, tiles: int) -> Program:
        """The cheapest program in which everybody decodes beside so many tiles."""
        return self.cheapest(self.buckets.choose(self.buckets.decode[-1], tiles, self.shape.tile_size))

    def program(self, program: Program) -> Any:
        """The compiled program; compiles it when warm-up has not (and counts that)."""
        if program not in self._programs:
            self._programs[program] = self.compile(program)
            self.compilations_after_warmup += self._warm
        return self._programs[program]

    def compile(self, program: Program) -> Any:
        """Any thread may call this: XLA compiles without the interpreter's lock."""
        bucket, variant = program
        name = f"{bucket.decode_rows}-{bucket.tiles}-{bucket.steps}-{variant}"
        if self.cache_of_programs is not None and (known := self.cache_of_programs.load(name)) is not None:
            return known
        self.compilations += 1
        arguments = jax.tree.map(_abstract, (self.leaves, self.kv, self.state, empty(self.shape.slots)))
        compiled, new = compile_lowered(lower_step(self.structure, self.shape, bucket, variant, *arguments))
        if self.cache_of_programs is not None and new:
            self.cache_of_programs.store(name, compiled)
        return compiled

    def warm_up(self, progress: Progress | None = None, *, runs: int = 1, programs: Iterable[Program] = ()) -> None:
        """Compiles every program in threads and runs each `runs` times on padding (CUDA graphs are captured so)."""
        wanted = list(programs) or self.programs()
        workers = max(1, min(len(wanted), os.cpu_count() or 1))
        with concurrent.futures.ThreadPoolExecutor(workers, "compile") as pool:
            jobs = {pool.submit(self.compile, p): p for p in wanted if p not in self._programs}
            try:
                for done, job in enumerate(concurrent.futures.as_completed(jobs), 1):
                    self._programs[jobs[job]] = job.result()
                    if progress is not None:
                        progress(done, len(jobs), describe(jobs[job]))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        self.state = self._adopt.warm_up(self.state)
        for program in wanted:
            self.idle_run(program, runs)
        jax.block_until_ready(self.state.last_token)
        self._warm = True

    def idle_run(self, program: Program, runs: int) -> float:
        """Runs a program `runs` times with nothing but padding; seconds of the last one, with the device waited for."""
        packed, _views = padding(self.shape, program[0])
        for _ in range(runs - 1):
            self._run(program, packed)
        jax.block_until_ready(self.state.last_token)
        began = time.perf_counter()
        self._run(program, packed)
        jax.block_until_ready(self.state.last_token)
        return time.perf_counter() - began

    def launch(self, plan: Plan) -> Launched:
        """Dispatches a step and returns at once. After an exception the device's state is lost: call `reset`."""
        for sequence in plan.admitted:
            if sequence.slot is not None:
                self.slots.set(sequence)
        if plan.adopted:
            self.state = self._adopt(self.state, plan.adopted)
        if needs_halves(plan):
            half, rows = self.split.launch(plan)
            return Launched(plan, rows, None, Variant.SAMPLE, half)
        program = self.choose(plan)
        packed, rows = pack(plan, self.shape, program[0])
        output = self._run(program, packed)
        for leaf in jax.tree.leaves(output):
            leaf.copy_to_host_async()
        return Launched(plan, rows, output, program[1])

    def sample(self, launched: Launched, mask: np.ndarray) -> Launched:
        """Dispatches the second half of a step in two: mask int32 [R, ceil(V/32)] (see `engine/split`)."""
        assert launched.half is not None
        output, variant = self.split.draw(launched.plan, launched.half, mask)
        return dataclasses.replace(launched, output=output, variant=variant)

    def read(self, launched: Launched) -> Read:
        """Waits for a dispatch. Raises what the device raised."""
        plan, rows = launched.plan, launched.sampled_rows
        assert launched.output is not None
        sampled = np.asarray(launched.output.tokens)
        tokens = sampled.reshape(plan.steps, -1).T.tolist()
        taken = [tokens[row][:count] if row >= 0 else [] for row, count in zip(rows, plan.sampled)]
        logprobs: list[list[TokenLogprobs]] = [[] for _ in rows]
        if any(s.sampling.logprobs is not None for s in plan.sequences):
            logprobs = _read_logprobs(launched, plan.sequences, [len(t) for t in taken])
        half = launched.half
        scores = read_scores(plan, half, self.shape) if half is not None and half.scores is not None else []
        return Read(taken, logprobs, scores)

    def reset(self) -> None:
        """New KV pages and slot state, after a step raised: what was donated to it is gone."""
        self.kv = self.state = None  # type: ignore[assignment]  # freed before new ones are made
        self.kv = make_cache(self.cache_shape, self.device)
        self.state = make_state(self.shape, self.device)
        self.slots = SlotTable(self.shape.slots, self.device)

    def _run(self, program: Program, packed: np.ndarray) -> Sampled:
        params: SlotParams | None = None if program[1] is Variant.GREEDY else self.slots.on_device()
        compiled = self.program(program)
        self.kv, self.state, output = compiled(self.leaves, self.kv, self.state, params, packed)
        return output


def _abstract(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None))


def needs_halves(plan: Plan) -> bool:
    """Somebody's next token waits for a mask, or somebody's prompt is scored."""
    return any(s.grammar is not None for s in plan.sequences) or any(c.sequence.wants_scores for c in plan.chunks)


def describe(program: Program) -> str:
    bucket, variant = program
    return f"{bucket.decode_rows} rows + {bucket.tiles} tiles, {bucket.steps} steps, {variant}"


def _read_logprobs(launched: Launched, sequences: list[Sequence], counts: list[int]) -> list[list[TokenLogprobs]]:
    output, steps = launched.output, launched.plan.steps
    assert output is not None and output.logprob is not None
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
