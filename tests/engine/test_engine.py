"""The loop over a real (tiny) model: what a request gives alone is what it gives in any company."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jqserve.engine.request import EngineRequest, FinishReason
from jqserve.errors import QueueFullError, RequestError
from tests.engine.conftest import (
    CONTEXT,
    EOS,
    PAGE,
    STEPS,
    MakeCore,
    Outcome,
    assert_all_free,
    complete,
    drain,
    prompt,
    request,
)

LENGTHS = [1, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 40, 64, 90]


@pytest.fixture(scope="module")
def dense(model: Any, params: Any) -> Any:
    """Greedy tokens by recomputing everything with dense attention, no pages: an independent path."""
    from jqserve.models.build import build

    forward = jax.jit(lambda p, tokens: build(model, p).full(tokens))

    def generate(ids: tuple[int, ...], new: int) -> list[int]:
        tokens = list(ids)
        for _ in range(new):
            logits = forward(params, jnp.asarray(tokens + [0] * (CONTEXT - len(tokens))))
            tokens.append(int(jnp.argmax(logits[len(tokens) - 1])))
            if tokens[-1] == EOS:
                break
        return tokens[len(ids) :]

    return generate


@pytest.fixture(scope="module")
def alone(make_core: MakeCore) -> Any:
    """What each request gives in an engine of its own."""

    def run(requests: list[EngineRequest]) -> dict[int, Outcome]:
        outcomes: dict[int, Outcome] = {}
        core = make_core(overlap=False, prefix_cache=False)
        for one in requests:
            outcomes |= complete(core, [one])
        return outcomes

    return run


def mixed_requests() -> list[EngineRequest]:
    kinds: list[dict[str, Any]] = [
        {},
        {"temperature": 1.0, "seed": 11},
        {"temperature": 0.8, "top_k": 9, "seed": 12, "logprobs": 2},
        {"temperature": 1.2, "top_p": 0.8, "repetition_penalty": 1.2, "seed": 13},
        {"temperature": 0.0, "presence_penalty": 0.7, "frequency_penalty": 0.6, "logprobs": 0},
        {"temperature": 1.0, "min_p": 0.05, "seed": 14, "logit_bias": ((5, 3.0), (9, -50.0)), "min_new_tokens": 6},
    ]
    return [request(i, n, max_new_tokens=20, **kinds[i % len(kinds)]) for i, n in enumerate(LENGTHS)]


def assert_same(got: dict[int, Outcome], expected: dict[int, Outcome]) -> None:
    assert got.keys() == expected.keys()
    for rid, outcome in expected.items():
        assert got[rid].tokens == outcome.tokens, f"request {rid}"
        assert (got[rid].finish, got[rid].matched) == (outcome.finish, outcome.matched)
        for a, b in zip(got[rid].logprobs, outcome.logprobs, strict=True):
            assert a.token == pytest.approx(b.token, abs=1e-4) and a.top_ids == b.top_ids
            assert a.top == pytest.approx(b.top, abs=1e-4)


@pytest.mark.parametrize("overlap", [True, False])
def test_greedy_equals_the_dense_path(make_core: MakeCore, dense: Any, overlap: bool) -> None:
    requests = [request(i, n) for i, n in enumerate(LENGTHS)]
    outcomes = complete(make_core(overlap=overlap), requests)
    for one in requests:
        assert outcomes[one.rid].tokens == dense(one.prompt, 16), f"prompt of {len(one.prompt)}"


@pytest.fixture(scope="module")
def expected(alone: Any) -> dict[int, Outcome]:
    return alone(mixed_requests())


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="full batch"),
        pytest.param({"overlap": False}, id="no overlap"),
        pytest.param({"tiles": 1}, id="small chunks"),
        pytest.param({"slots": 3}, id="few slots"),
        pytest.param({"pages": 16}, id="preemption"),
        pytest.param({"pages": 16, "overlap": False}, id="preemption, no overlap"),
        pytest.param({"steps": STEPS}, id="several steps"),
        pytest.param({"pages": 16, "steps": STEPS}, id="preemption, several steps"),
        pytest.param({"pages": 16, "prefix_cache": False}, id="preemption, no prefix cache"),
    ],
)
def test_company_changes_nothing(make_core: MakeCore, expected: Any, options: dict[str, Any]) -> None:
    """Greedy, seeded, penalised, biased, scored: the same tokens alone, in a batch, chunked, preempted."""
    core = make_core(**options)
    assert_same(complete(core, mixed_requests()), expected)
    if "pages" in options:
        assert core.stats().preemptions >= 3
    assert core.stats().compilations_after_warmup == 0


FAMILY = prompt(37, seed=77)


def alike_requests() -> list[EngineRequest]:
    """Prompts that begin alike, for 0 to 37 tokens, and go on differently; every kind of sampling."""
    kinds = [one.sampling for one in mixed_requests()[:6]]
    requests = []
    for i in range(12):
        ids = FAMILY[: 37 - 3 * i] + prompt(4 + i, seed=i)
        sampling = dataclasses.replace(kinds[i % 6], repetition_penalty=1.3 if i % 4 == 0 else 1.0)
        requests.append(EngineRequest(i, ids, sampling))
    return requests


@pytest.fixture(scope="module")
def expected_alike(alone: Any) -> dict[int, Outcome]:
    return alone(alike_requests())


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("steps", [1, STEPS])
@pytest.mark.parametrize("mixed", [True, False])
@pytest.mark.parametrize("prefix_cache", [True, False])
def test_no_switch_changes_a_token(
    make_core: MakeCore, expected_alike: Any, overlap: bool, steps: int, mixed: bool, prefix_cache: bool
) -> None:
    """Overlap, several steps a dispatch, prefill mixed with decode, prefix cache: on and off, greedy and seeded."""
    core = make_core(slots=3, overlap=overlap, steps=steps, mixed=mixed, prefix_cache=prefix_cache)
    dispatched = spy(core)
    assert_same(complete(core, alike_requests()), expected_alike)
    assert any(plan.steps > 1 for plan in dispatched) == (steps > 1)
    assert any(plan.decodes and plan.chunks for plan in dispatched) == mixed
    assert (core.stats().cached_tokens > 100) == prefix_cache
    assert core.stats().compilations_after_warmup == 0


def spy(core: Any) -> list[Any]:
    """The plans that the engine dispatches, as they come."""
    plans, schedule = [], core.scheduler.schedule

    def watched() -> Any:
        plans.append(schedule())
        return plans[-1]

    core.scheduler.schedule = watched
    return plans


def test_cached_tokens_are_told_once_and_penalties_know_them(make_core: MakeCore, alone: Any) -> None:
    """The second request finds all full pages of the first; its penalties still see the tokens that stand there."""
    penalties = {"repetition_penalty": 1.5, "frequency_penalty": 0.5, "ignore_eos": True, "max_new_tokens": 24}
    first = request(0, FAMILY, **penalties)
    core = make_core()
    told = [event.cached_tokens for event in events_of(core, [first])]
    assert set(told) == {0}
    answer = complete(core, [request(1, FAMILY, **penalties)])[1].tokens
    again = request(2, (*FAMILY, *answer[:10]), **penalties)
    told = [event.cached_tokens for event in events_of(core, [again])]
    assert told == [40, *[0] * 23]  # five pages of the 47 tokens
    core = make_core()
    complete(core, [first])
    assert_same(complete(core, [again]), alone([again]))


def events_of(core: Any, requests: list[EngineRequest]) -> list[Any]:
    for one in requests:
        core.add(one)
    events = []
    while core.has_work():
        events += core.step()
    return events


@pytest.mark.parametrize("overlap", [True, False])
def test_copies_of_a_prompt_compute_it_once(make_core: MakeCore, overlap: bool) -> None:
    """And draw what they draw alone."""
    ids = prompt(PAGE + 3, 5)
    copies = [request(i, ids, temperature=1.0, seed=i, repetition_penalty=1.3) for i in range(5)]
    alone = [complete(make_core(), [one])[one.rid].tokens for one in copies]
    core = make_core(overlap=overlap)
    outcomes = complete(core, copies)
    assert core.scheduler.admitted_tokens == 5 * len(ids) and core.scheduler.cached_tokens == 4 * PAGE
    assert [outcomes[one.rid].tokens for one in copies] == alone


def test_a_preempted_sequence_finds_its_own_pages(make_core: MakeCore) -> None:
    requests = [request(i, 6 + i, max_new_tokens=50, ignore_eos=True) for i in range(4)]
    computed = {}
    for prefix_cache in (True, False):
        core = make_core(pages=20, prefix_cache=prefix_cache)
        plans = spy(core)
        complete(core, requests)
        assert core.stats().preemptions > 0
        computed[prefix_cache] = sum(chunk.length for plan in plans for chunk in plan.chunks)
    assert computed[True] < computed[False]


def test_penalties_count_every_token_once(make_core: MakeCore) -> None:
    """A frequency penalty so strong that no token comes twice, through preemptions too."""
    requests = [
        request(i, 5 + i, max_new_tokens=30, frequency_penalty=2.0, logit_bias=((EOS, -99.0),)) for i in range(9)
    ]
    strong = [request(20 + i, 12, max_new_tokens=30, repetition_penalty=10.0, ignore_eos=True) for i in range(3)]
    core = make_core(pages=24)
    outcomes = complete(core, requests + strong)
    assert core.stats().preemptions > 0
    for one in requests:
        counts = np.bincount(outcomes[one.rid].tokens)
        assert counts.max() <= 3  # logits spread over ~10: three penalties of 2 push any token out
    plain = complete(make_core(), requests)
    assert_same({r.rid: outcomes[r.rid] for r in requests}, plain)


def test_logprobs_belong_to_the_tokens(make_core: MakeCore, model: Any, params: Any) -> None:
    from jqserve.models.build import build

    one = request(0, 12, logprobs=4, max_new_tokens=6, ignore_eos=True)
    outcome = complete(make_core(), [one])[0]
    tokens = [*one.prompt, *outcome.tokens]
    logits = build(model, params).full(jnp.asarray(tokens))
    logprobs = np.asarray(jax.nn.log_softmax(logits, -1))[len(one.prompt) - 1 : -1]
    for i, entry in enumerate(outcome.logprobs):
        assert entry.token == pytest.approx(float(logprobs[i, outcome.tokens[i]]), abs=1e-4)
        best = np.argsort(-logprobs[i])[:4]
        assert entry.top_ids == tuple(best.tolist())
        assert entry.top == pytest.approx(logprobs[i, best].tolist(), abs=1e-4)


def test_ends(make_core: MakeCore) -> None:
    core = make_core()
    free = complete(core, [request(0, 9, max_new_tokens=20, ignore_eos=True)])[0]
    assert len(free.tokens) == 20 and free.finish is FinishReason.LENGTH and free.matched is None
    stop = free.tokens[7]
    first = free.tokens.index(stop)
    ended = complete(core, [request(1, prompt(9, 0), max_new_tokens=20, stop_token_ids=(stop,), ignore_eos=True)])[1]
    assert ended.tokens == free.tokens[: first + 1]
    assert ended.finish is FinishReason.STOP and ended.matched == stop
    late = complete(
        core,
        [request(2, prompt(9, 0), max_new_tokens=20, min_new_tokens=12, stop_token_ids=(stop,), ignore_eos=True)],
    )[2]
    assert stop not in late.tokens[:12]
    forced = complete(core, [request(3, 9, logit_bias=((EOS, 1000.0),))])[3]
    assert forced.tokens == [EOS] and forced.finish is FinishReason.STOP and forced.matched == EOS
    banned = complete(core, [request(4, 9, logit_bias=((EOS, 1000.0),), min_new_tokens=3)])[4]
    assert len(banned.tokens) == 4 and banned.tokens[3] == EOS and EOS not in banned.tokens[:3]
    full = complete(core, [request(5, CONTEXT - 3, max_new_tokens=50, ignore_eos=True)])[5]
    assert len(full.tokens) == 3 and full.finish is FinishReason.LENGTH


def test_refusals_leave_nothing_behind(make_core: MakeCore) -> None:
    core = make_core(max_queued=2, slots=1)
    with pytest.raises(RequestError, match="prompt"):
        core.add(request(0, CONTEXT))
    with pytest.raises(RequestError, match="top_p"):
        core.add(request(0, 4, top_p=2.0))
    assert not core.has_work()
    for rid in range(3):  # one slot, two in the queue
        core.add(request(rid, 4))
    with pytest.raises(QueueFullError, match="max_queued 2"):
        core.add(request(3, 4))
    with pytest.raises(RequestError, match="rid"):
        core.add(request(1, 4))
    assert len(drain(core)) == 3
    core.add(request(3, 4))
    drain(core)


@pytest.mark.parametrize("overlap", [True, False])
def test_abort_at_any_time(make_core: MakeCore, expected: Any, overlap: bool) -> None:
    """Waiting, in the middle of a prompt, decoding, or just dispatched: gone at once, and the others do not notice."""
    for steps in range(0, 12, 2):
        core = make_core(pages=40, overlap=overlap)
        outcomes: dict[int, Outcome] = {}
        for one in mixed_requests():
            core.add(one)
        for _ in range(steps):
            for event in core.step():
                outcomes.setdefault(event.rid, Outcome()).take(event)
        gone = [rid for rid in range(0, len(LENGTHS), 2) if rid not in outcomes or outcomes[rid].finish is None]
        assert all(core.abort(rid) for rid in gone) and not core.abort(gone[0]) and not core.abort(999)
        before = {rid: len(outcomes[rid].tokens) for rid in gone if rid in outcomes}
        drain(core, outcomes)
        assert all(len(outcomes[rid].tokens) == count for rid, count in before.items())  # no event after an abort
        for rid, outcome in outcomes.items():
            if rid not in gone:
                assert outcome.tokens == expected[rid].tokens
        assert_all_free(core)


def test_an_answer_that_a_stop_string_ended_tells_the_forecast_how_long_answers_are(make_core: MakeCore) -> None:
    """Else it knew of the long ones only."""
    for stopped in (False, True):
        core = make_core()
        before = core.scheduler.forecast.share
        core.add(request(1, 10, max_new_tokens=100, ignore_eos=True))
        for _ in range(6):
            core.step()
        assert core.abort(1, stopped=stopped)
        drain(core)
        assert (core.scheduler.forecast.share < before) is stopped


@dataclasses.dataclass
class Doomed:
    """A launched step that fails when it is read."""

    plan: Any
    output: str = "under way"


class Failing:
    """A runner whose steps fail when `fails(plan)`; `late`: not when dispatched, but when read."""

    def __init__(self, runner: Any, fails: Any, late: bool) -> None:
        self.runner, self.fails, self.late = runner, fails, late
        self.resets = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.runner, name)

    def launch(self, plan: Any) -> Any:
        failing = self.fails(plan)
        if failing and not self.late:
            raise RuntimeError("RESOURCE_EXHAUSTED: made up")
        launched = self.runner.launch(plan)
        return Doomed(plan) if failing else launched

    def read(self, launched: Any) -> Any:
        if isinstance(launched, Doomed):
            raise RuntimeError("INTERNAL: made up")
        return self.runner.read(launched)

    def reset(self) -> None:
        self.resets += 1
        self.runner.reset()


@pytest.fixture
def failing_core(make_core: MakeCore) -> Any:
    def make(fails: Any, *, late: bool, overlap: bool, **options: Any) -> Any:
        core = make_core(overlap=overlap, **options)
        core.runner = Failing(core.runner, fails, late)
        return core

    return make


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("overlap", [True, False])
def test_a_step_that_fails_once_loses_nobody(failing_core: Any, expected: Any, overlap: bool, late: bool) -> None:
    calls = iter(range(10**6))
    core = failing_core(lambda plan: next(calls) in (0, 6, 7, 30), late=late, overlap=overlap)
    assert_same(complete(core, mixed_requests()), expected)
    assert core.runner.resets >= 3


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("overlap", [True, False])
def test_a_request_that_always_fails_is_found(failing_core: Any, expected: Any, overlap: bool, late: bool) -> None:
    """Request 5 breaks every step that takes it past its 18th position; it alone is given up."""

    def fails(plan: Any) -> bool:
        reached = {row.sequence.rid: row.position + 1 for row in plan.decodes}
        reached |= {chunk.sequence.rid: chunk.start + chunk.length for chunk in plan.chunks}
        return reached.get(5, 0) > 18

    core = failing_core(fails, late=late, overlap=overlap)
    outcomes = complete(core, mixed_requests())
    broken = outcomes.pop(5)
    assert broken.finish is FinishReason.ERROR and "made up" in broken.error
    assert broken.tokens == expected[5].tokens[: len(broken.tokens)]
    assert_same(outcomes, {rid: o for rid, o in expected.items() if rid != 5})


@pytest.mark.parametrize("overlap", [True, False])
def test_a_step_that_cannot_be_handed_over_loses_nobody(
    make_core: MakeCore, runner: Any, expected: Any, overlap: bool
) -> None:
    """It fails on the dispatching thread, the next one may be in line behind it, and the engine hears of it late."""
    core = make_core(overlap=overlap)
    program, calls = runner.program, iter(range(10**6))

    def broken(*arguments: Any) -> Any:
        raise RuntimeError("RESOURCE_EXHAUSTED: made up")

    runner.program = lambda wanted: broken if next(calls) in (0, 6, 7, 30) else program(wanted)
    try:
        assert_same(complete(core, mixed_requests()), expected)
    finally:
        del runner.program
    assert next(calls) > 40


def test_a_device_that_never_works_again_ends_the_engine_loudly(failing_core: Any) -> None:
    core = failing_core(lambda plan: True, late=False, overlap=True)
    outcomes = complete(core, [request(i, 5) for i in range(4)])
    assert all(o.finish is FinishReason.ERROR for o in outcomes.values())


def test_nan_logits_end_that_request_only(make_core: MakeCore, runner: Any, expected: Any) -> None:
    core = make_core()
    read = runner.read

    def poisoned(launched: Any) -> Any:
        result = read(launched)
        at = [s.rid for s in launched.plan.sequences]
        if 3 in at and result.tokens[at.index(3)]:
            result.tokens[at.index(3)] = [-1]
        return result

    runner.read = poisoned
    try:
        outcomes = complete(core, mixed_requests())
    finally:
        del runner.read
    assert outcomes[3].finish is FinishReason.ERROR and "NaN" in outcomes[3].error
    assert outcomes[4].tokens == expected[4].tokens


def test_no_compilation_while_serving(make_core: MakeCore) -> None:
    """Counted by JAX itself: not even a stray eager operation compiles once the engine is warm."""
    complete(make_core(), [request(0, 5)])
    compiled: list[str] = []
    listener = lambda name, *_, **__: compiled.append(name) if "backend_compile" in name else None  # noqa: E731
    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        core = make_core(pages=20)
        complete(core, mixed_requests())
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)
    assert not compiled and core.stats().compilations_after_warmup == 0
    assert core.stats().preemptions > 0


def test_stats(make_core: MakeCore) -> None:
    core = make_core()
    for i in range(6):
        core.add(request(i, 4, max_new_tokens=8, ignore_eos=True))
    for _ in range(4):
        core.step()
    stats = core.stats()
    assert stats.running == 6 and 6 <= stats.pages_used <= 12 and stats.pages_total == 256
    drain(core)
    assert core.stats().generated_tokens == 48 and core.stats().mean_batch > 4
    loop = {"receive", "schedule", "launch", "wait", "mask", "emit", "send"}
    assert set(core.stats().host_seconds) == loop | {"dispatch"} and core.stats().host_seconds["dispatch"] > 0
