"""The loop: schedule a step, dispatch it, read the one before it, tell what came out.

With overlap (the default) step n+1 is dispatched before step n has been read: its decode rows take their tokens from
the device. A sequence that step n turns out to end has then a row too many in step n+1; that row is dropped, and
nothing of it is ever emitted, nor of what a dispatch of several steps gives behind the end. When a step raises, the
pages and the slots' state are made anew, everything that ran waits to be recomputed, and the sequences of that step run
one at a time until the one at fault is found.
"""

from __future__ import annotations

import logging
import time
from typing import Any

from jqserve.engine.grammar import Grammars
from jqserve.engine.plan import Plan
from jqserve.engine.preparing import Preparing, Refused
from jqserve.engine.request import EngineRequest, EngineStats, FinishReason, StepEvent, TokenLogprobs
from jqserve.engine.runner import Launched, Read, Runner
from jqserve.engine.scheduler import Scheduler
from jqserve.engine.scoring import take_scores, told_scores
from jqserve.engine.sequence import Sequence
from jqserve.engine.validate import Limits, check_request, stop_ids
from jqserve.errors import JqserveError, QueueFullError, RequestError

log = logging.getLogger(__name__)

NOT_FINITE = "the model's logits are not numbers (NaN): the weights or the dtype do not suit this prompt"
PREPARING_SECONDS = (
    0.005  # how long a turn of the loop waits when requests are being prepared and nothing else is there
)
MAX_FAILURES_ALONE = 2
MAX_FAILURES_IN_A_ROW = 1000  # more than a step's sequences can cause: a device that never works again ends the engine


class EngineCore:
    """One model's engine. One thread calls it."""

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        limits: Limits,
        *,
        max_queued: int,
        overlap: bool = True,
        info: dict[str, Any] | None = None,
        grammars: Grammars | None = None,
    ) -> None:
        """`grammars`: what holds answers to constraints; None: requests with one are refused."""
        self.runner, self.scheduler, self.limits = runner, scheduler, limits
        self.max_queued, self.overlap = max_queued, overlap
        self._info = info or {}
        self.preparing = Preparing(grammars, runner.prepare)
        self._sequences: dict[int, Sequence] = {}
        self._in_flight: Launched | None = None
        self._arrivals = 0
        self._steps = self._generated = self._rows = self._failures = 0
        #: seconds of the host by phase since the start; `wait` is for the device; `dispatch` is beside the others, on
        #: the runner's own thread
        phases = ("receive", "schedule", "launch", "wait", "mask", "emit", "send", "dispatch")
        self.host_seconds = dict.fromkeys(phases, 0.0)

    def add(self, request: EngineRequest) -> None:
        """Queues a request. Raises RequestError for what cannot be served, QueueFullError when too many wait."""
        if request.rid in self._sequences:
            raise RequestError("rid", f"request {request.rid} is running already")
        if self.full:
            raise QueueFullError(f"{self.queued} requests wait already (max_queued {self.max_queued}); try again later")
        request = check_request(request, self.limits)
        assert request.sampling.max_new_tokens is not None
        sequence = Sequence(
            request=request,
            arrival=self._arrivals,
            limit=len(request.prompt) + request.sampling.max_new_tokens,
            tokens=list(request.prompt),
            stop_ids=stop_ids(request.sampling, self.limits),
            scores=None if request.sampling.prompt_logprobs is None else {},
        )
        if self.preparing.needed(sequence):
            self.preparing.add(sequence)
        else:
            self.scheduler.add(sequence)
        self._arrivals += 1
        self._sequences[request.rid] = sequence

    def abort(self, rid: int, *, stopped: bool = False) -> bool:
        """Forgets a request at once, wherever it is; no event follows. False when there is no such request.
        `stopped`: a stop string, which only the caller sees, has ended its answer."""
        sequence = self._sequences.pop(rid, None)
        if sequence is None:
            return False
        sequence.finish = FinishReason.STOP if stopped else FinishReason.ABORT
        if not self.preparing.remove(sequence):
            self.scheduler.remove(sequence)
        return True

    def flush_cache(self) -> int:
        """Forgets the cached prefixes; how many idle pages that empties. Running requests keep their pages."""
        cached = self.scheduler.pool.cached
        self.scheduler.pool.forget()
        return cached

    @property
    def queued(self) -> int:
        """Requests without a slot."""
        return len(self.scheduler.waiting) + len(self.preparing)

    @property
    def full(self) -> bool:
        """Whether `add` takes no more."""
        return self.queued >= self.max_queued + len(self.scheduler.free_slots)

    def has_work(self) -> bool:
        """Whether `step` has something to do; False only when nothing runs, waits, or has to be read."""
        return bool(self._sequences) or self._in_flight is not None

    def step(self) -> list[StepEvent]:
        """One turn of the loop: dispatches a step, waits for the one before it. Nothing to do: returns at once.

        Raises only when the device does not come back after a failure; every request is lost then.
        """
        events = [event for one in self.preparing.ready() if (event := self._prepared(one)) is not None]
        clock = time.perf_counter()
        plan = self.scheduler.schedule()
        clock = self._time("schedule", clock)
        launched, failure = None, None
        if plan:
            try:
                launched = self.runner.launch(plan)
            except Exception as error:
                failure = error
        clock = self._time("launch", clock)
        failures = self._failures
        self.host_seconds["dispatch"] = self.runner.dispatcher.seconds
        previous, read = None, None
        if self.overlap:
            previous, self._in_flight = self._in_flight, launched
            read = self._read(previous, events)
        # What waits for its masks gets them now: the tokens that they follow from have been read. Nothing else may come
        # before it, for the device waits.
        if launched is not None and launched.output is None and self._failures <= failures:
            try:
                launched = self._mask(launched)
            except Exception as error:
                failure, launched = error, None
            if self.overlap:
                self._in_flight = launched
        if not self.overlap:
            previous = launched
            read = self._read(previous, events)
        if previous is not None and read is not None:
            events += self._emit(previous.plan, read)
        if failure is not None and self._failures <= failures:  # else: it failed because the one before it had
            events += self._recover(failure, plan)
        if not plan and previous is None and failure is None and not events:
            if len(self._sequences) > len(self.preparing):
                events += self._stalled()
            else:
                self.preparing.wait(PREPARING_SECONDS)
        return events

    def stats(self) -> EngineStats:
        pool = self.scheduler.pool
        return EngineStats(
            running=len(self.scheduler.running),
            waiting=self.queued,
            pages_used=pool.used,
            pages_total=pool.total,
            preemptions=self.scheduler.preemptions,
            compilations_after_warmup=self.runner.compilations_after_warmup,
            steps=self._steps,
            generated_tokens=self._generated,
            mean_batch=self._rows / self._steps if self._steps else 0.0,
            prompt_tokens=self.scheduler.admitted_tokens,
            cached_tokens=self.scheduler.cached_tokens,
            pages_cached=pool.cached,
            evictions=pool.evictions,
            host_seconds={phase: round(seconds, 6) for phase, seconds in self.host_seconds.items()},
        )

    def model_info(self) -> dict[str, Any]:
        """JSON: the model, its plan, the KV pool, limits and defaults (the keys are listed in `engine/channel`)."""
        return dict(self._info)

    def describe(self, **facts: Any) -> None:
        """Adds to `model_info`."""
        self._info.update(facts)

    def _read(self, launched: Launched | None, events: list[StepEvent]) -> Read | None:
        """Waits for a step, whose constrained answers then know their tokens. None: there was none, or it failed and
        `events` has what follows from that."""
        if launched is None:
            return None
        clock = time.perf_counter()
        try:
            read = self.runner.read(launched)
        except Exception as error:
            events += self._recover(error, launched.plan)
            return None
        self._failures = 0
        clock = self._time("wait", clock)
        given = [
            (sequence.grammar, tokens[0])  # never more of them: see `Scheduler`
            for sequence, tokens in zip(launched.plan.sequences, read.tokens)
            if sequence.grammar is not None
            and sequence.finish is None
            and tokens
            and tokens[0] >= 0
            and tokens[0] not in sequence.stop_ids
        ]
        if given and self.preparing.grammars is not None:
            self.preparing.grammars.take(given)
            self._time("mask", clock)
        return read

    def _emit(self, plan: Plan, read: Read) -> list[StepEvent]:
        """Takes a step's tokens over."""
        clock = time.perf_counter()
        self._steps += plan.steps
        events, page_size = [], self.scheduler.page_size
        for chunk, scores in zip(plan.chunks, read.scores):
            take_scores(chunk, scores)
        for sequence, tokens, logprobs, reached in zip(plan.sequences, read.tokens, read.logprobs, plan.reached):
            self._rows += len(tokens) or 1
            if sequence.finish is not None:
                continue  # it had ended, or was aborted, when this step was under way
            if sequence.probation:
                self.scheduler.passed(sequence, reached)
            if not tokens:
                continue
            sequence.pending -= len(tokens)
            if not self._takes_plainly(sequence, tokens, logprobs):
                events.append(self._take(sequence, tokens, logprobs))
                continue
            known = sequence.tokens
            known.append(tokens[0])
            self._generated += 1
            if len(known) % page_size < 2:  # where a page has become full, of what is computed or of what is read
                self.scheduler.publish(sequence)
            events.append(StepEvent(sequence.request.rid, tuple(tokens)))
        self._time("emit", clock)
        return events

    @staticmethod
    def _takes_plainly(sequence: Sequence, tokens: list[int], logprobs: list[TokenLogprobs]) -> bool:
        """Whether a token is one more in the middle of an answer, as nearly all are; `_take` does everything else."""
        length = len(sequence.tokens)
        return (
            len(tokens) == 1
            and tokens[0] >= 0
            and not logprobs
            and sequence.grammar is None
            and sequence.scores is None
            and length + 1 < sequence.limit
            and length > len(sequence.request.prompt)
            and not sequence.failures_alone
            and tokens[0] not in sequence.stop_ids
        )

    def _take(self, sequence: Sequence, tokens: list[int], logprobs: list[TokenLogprobs]) -> StepEvent:
        """Takes tokens over up to the one that ends the sequence, if one does."""
        scores = told_scores(sequence)
        if sequence.limit == sequence.prompt_length:  # it was only scored: the token after the prompt is nobody's
            self._end(sequence, FinishReason.LENGTH)
            return StepEvent(sequence.rid, (), FinishReason.LENGTH, prompt_logprobs=scores)
        finish, matched, error, count = None, None, "", 0
        cached = sequence.first_cached if len(sequence.tokens) == sequence.prompt_length else 0
        for token in tokens:
            if token < 0:
                finish, error = FinishReason.ERROR, NOT_FINITE
                break
            sequence.tokens.append(token)
            count += 1
            if token in sequence.stop_ids:
                finish, matched = FinishReason.STOP, token
            elif sequence.grammar is not None and sequence.grammar.complete:
                finish = FinishReason.STOP  # complete: nothing may follow
            elif len(sequence.tokens) >= sequence.limit:
                finish = FinishReason.LENGTH
            if finish is not None:
                break
        self._generated += count
        if count:
            sequence.failures_alone = 0
            self.scheduler.publish(sequence)
        field = ""
        if sequence.grammar is not None and (failed := sequence.grammar.failed):
            finish, error, field, count = FinishReason.ERROR, f"takes too much work a token: {failed}", "constraint", 0
        if finish is not None:
            self._end(sequence, finish)
        return StepEvent(
            sequence.rid,
            tuple(tokens[:count]),
            finish,
            matched,
            tuple(logprobs[:count]),
            error,
            cached_tokens=cached,
            prompt_logprobs=scores,
            field=field,
        )

    def _prepared(self, one: Sequence | Refused) -> StepEvent | None:
        if isinstance(one, Sequence):
            self.scheduler.add(one)
            return None
        del self._sequences[one.sequence.rid]
        one.sequence.finish = FinishReason.ERROR
        return StepEvent(one.sequence.rid, (), FinishReason.ERROR, error=one.error, field=one.field)

    def _mask(self, launched: Launched) -> Launched:
        """Computes the masks of a step's constrained rows, and dispatches its second half."""
        clock = time.perf_counter()
        mask = self.runner.masks(launched)
        rows = [
            (row, grammar)
            for sequence, row in zip(launched.plan.sequences, launched.sampled_rows)
            if row >= 0 and sequence.finish is None and (grammar := sequence.grammar) is not None
            if not (grammar.complete or grammar.failed)
        ]
        if rows and self.preparing.grammars is not None:
            self.preparing.grammars.fill(mask, rows)
        launched = self.runner.sample(launched, mask)
        self._time("mask", clock)
        return launched

    def _end(self, sequence: Sequence, finish: FinishReason) -> None:
        sequence.finish = finish
        del self._sequences[sequence.rid]
        self.scheduler.remove(sequence)

    def _recover(self, error: Exception, plan: Plan) -> list[StepEvent]:
        """After a step raised. Its sequences run one at a time from now on; one that fails twice alone is given up."""
        self._failures += 1
        if self._failures > MAX_FAILURES_IN_A_ROW:
            raise JqserveError(f"{self._failures} steps failed in a row; the last one with: {error}") from error
        log.error("a step with %d sequences failed: %s", len(plan.sequences), error, exc_info=error)
        in_flight, self._in_flight = self._in_flight, None
        events = []
        alone = plan.sequences[0] if len(plan.sequences) == 1 else None
        if alone is not None and alone.probation and alone.finish is None:
            alone.failures_alone += 1
            if alone.failures_alone >= MAX_FAILURES_ALONE:
                events.append(StepEvent(alone.rid, (), FinishReason.ERROR, error=f"the step failed: {error}"))
                self._end(alone, FinishReason.ERROR)
        del in_flight  # its results depend on what the failed step left
        self.runner.reset()
        self.scheduler.requeue(plan.sequences)
        return events

    def _stalled(self) -> list[StepEvent]:
        """Nothing can be scheduled though requests wait: an engine's fault, which must not become a hang."""
        sequence = self.scheduler.waiting[0] if self.scheduler.waiting else self.scheduler.running[0]
        log.error("nothing can be scheduled; giving up on request %d: %s", sequence.rid, self.stats())
        self._end(sequence, FinishReason.ERROR)
        return [StepEvent(sequence.rid, (), FinishReason.ERROR, error="no step could be scheduled for this request")]

    def _time(self, phase: str, since: float) -> float:
        now = time.perf_counter()
        self.host_seconds[phase] += now - since
        return now
