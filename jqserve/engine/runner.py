"""The device's side of the engine: owns weights, KV pages and slot state, compiles the buckets and runs plans."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import os
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from jqserve.engine.batch import StepShape, pack, padding, tiles_needed
from jqserve.engine.buckets import Bucket, Buckets
from jqserve.engine.cache import Cache, CacheShape, make_cache
from jqserve.engine.request import TokenLogprobs
from jqserve.engine.sampler import Sampled
from jqserve.engine.scheduler import Plan
from jqserve.engine.slots import SlotParams, SlotTable, empty, needs_full
from jqserve.engine.step import SlotState, Structure, lower_step, make_state

Program = tuple[Bucket, bool]  # a bucket, and whether it is the full variant
Progress = Callable[[int, int, str], None]  # (done, total, what)


@dataclasses.dataclass(frozen=True)
class Launched:
    """A step under way: `sampled_rows` names the row of each of plan.decodes and plan.chunks, -1 for none."""

    plan: Plan
    sampled_rows: list[int]
    output: Sampled


@dataclasses.dataclass(frozen=True)
class Read:
    """What a step gave, on the host: for each of plan.sequences the token (None: its prompt goes on) and logprobs."""

    tokens: list[int | None]
    logprobs: list[TokenLogprobs | None]


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
        greedy_variant: bool = True,
    ) -> None:
        """`greedy_variant`: steps in which nobody asks for more than argmax run a program without the sampler."""
        self.variants = (True, False) if greedy_variant else (True,)
        self.structure, self.leaves = structure, leaves
        self.shape, self.cache_shape, self.buckets = shape, cache, buckets
        self.device = next(iter(leaves[0].devices()))
        self.kv: Cache = make_cache(cache, self.device)
        self.state: SlotState = make_state(shape, self.device)
        self.slots = SlotTable(shape.slots, self.device)
        self.compilations = 0
        self.compilations_after_warmup = 0
        self._warm = False
        self._programs: dict[Program, Any] = {}

    def programs(self) -> list[Program]:
        """All that serving can need, the costliest first."""
        return [(bucket, full) for bucket in self.buckets.all() for full in self.variants]

    def program(self, program: Program) -> Any:
        """The compiled program; compiles it when warm-up has not (and counts that)."""
        if program not in self._programs:
            self._programs[program] = self.compile(program)
            self.compilations_after_warmup += self._warm
        return self._programs[program]

    def compile(self, program: Program) -> Any:
        """Any thread may call this: XLA compiles without the interpreter's lock."""
        bucket, full = program
        self.compilations += 1
        arguments = jax.tree.map(_abstract, (self.leaves, self.kv, self.state, empty(self.shape.slots)))
        return lower_step(self.structure, self.shape, bucket, full, *arguments).compile()

    def warm_up(self, progress: Progress | None = None, *, runs: int = 1, programs: Iterable[Program] = ()) -> None:
        """Compiles every program in threads and runs each `runs` times on padding (CUDA graphs are captured so)."""
        wanted = list(programs) or self.programs()
        workers = max(1, min(len(wanted), os.cpu_count() or 1))
        with concurrent.futures.ThreadPoolExecutor(workers, "compile") as pool:
            jobs = {pool.submit(self.compile, p): p for p in wanted if p not in self._programs}
            try:
                for done, job in enumerate(concurrent.futures.as_completed(jobs), 1):
                    bucket, full = jobs[job]
                    self._programs[jobs[job]] = job.result()
                    if progress is not None:
                        kind = "full" if full else "greedy"
                        progress(done, len(jobs), f"{bucket.decode_rows} rows + {bucket.tiles} tiles, {kind}")
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        for bucket, full in wanted:
            for _ in range(runs):
                packed, _views = padding(self.shape, bucket)
                self._run((bucket, full), packed)
        jax.block_until_ready(self.state.last_token)
        self._warm = True

    def launch(self, plan: Plan) -> Launched:
        """Dispatches a step and returns at once. After an exception the device's state is lost: call `reset`."""
        for sequence in plan.admitted:
            if sequence.slot is not None:
                self.slots.set(sequence)
        bucket = self.buckets.choose(len(plan.decodes), tiles_needed(plan, self.shape.tile_size), self.shape.tile_size)
        packed, rows = pack(plan, self.shape, bucket)
        full = False not in self.variants or any(needs_full(s) for s in plan.sequences)
        output = self._run((bucket, full), packed)
        for leaf in jax.tree.leaves(output):
            leaf.copy_to_host_async()
        return Launched(plan, rows, output)

    def read(self, launched: Launched) -> Read:
        """Waits for a step. Raises what the device raised."""
        tokens = np.asarray(launched.output.tokens).tolist()
        wanted = [s.sampling.logprobs for s in launched.plan.sequences]
        logprobs: list[TokenLogprobs | None] = [None] * len(wanted)
        if any(w is not None for w in wanted):
            logprobs = _read_logprobs(launched, wanted)
        return Read([tokens[row] if row >= 0 else None for row in launched.sampled_rows], logprobs)

    def reset(self) -> None:
        """New KV pages and slot state, after a step raised: what was donated to it is gone."""
        self.kv = self.state = None  # type: ignore[assignment]  # freed before new ones are made
        self.kv = make_cache(self.cache_shape, self.device)
        self.state = make_state(self.shape, self.device)
        self.slots = SlotTable(self.shape.slots, self.device)

    def _run(self, program: Program, packed: np.ndarray) -> Sampled:
        params: SlotParams | None = self.slots.on_device() if program[1] else None
        compiled = self.program(program)
        self.kv, self.state, output = compiled(self.leaves, self.kv, self.state, params, packed)
        return output


def _abstract(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None))


def _read_logprobs(launched: Launched, wanted: list[int | None]) -> list[TokenLogprobs | None]:
    output = launched.output
    chosen, top_ids, top = np.asarray(output.logprob), np.asarray(output.top_ids), np.asarray(output.top)
    result: list[TokenLogprobs | None] = []
    for row, count in zip(launched.sampled_rows, wanted):
        if row < 0 or count is None:
            result.append(None)
        else:
            ids, values = top_ids[row, :count].tolist(), top[row, :count].tolist()
            result.append(TokenLogprobs(float(chosen[row]), tuple(ids), tuple(values)))
    return result
