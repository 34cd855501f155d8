"""The scheduler and prompts that begin alike: what is computed is found again, and copies wait for the first."""

from __future__ import annotations

import pytest

from jqserve.engine.request import FinishReason
from jqserve.engine.scheduler import Scheduler
from jqserve.engine.sequence import Sequence
from tests.engine.scheduling import PAGE, check_pages, resolve, scheduler, sequence


def finish(s: Scheduler, q: Sequence) -> Sequence:
    s.add(q)
    for _ in range(100):
        if q.finish is not None:
            return q
        resolve(s.schedule(), s)
    raise AssertionError("it never ends")


def test_a_known_prefix_is_not_computed_again() -> None:
    s = scheduler()
    first = finish(s, sequence(0, tuple(range(10)), new=4))  # 14 tokens, of which 13 were computed: three full pages
    assert s.pool.used == 0 and s.pool.cached == 3 and first.cached_tokens == 0
    s.add(q := sequence(1, (*range(10), 7, 7, 5), new=4))
    plan = s.schedule()
    assert [(c.start, c.length) for c in plan.chunks] == [(12, 1)] and q.first_cached == 12
    assert [(a.tokens, len(a.pages), a.slot) for a in plan.adopted] == [(12, 3, q.slot)]
    s.add(other := sequence(2, (*range(4), 99, 98, 97), new=4))
    plan = s.schedule()
    assert other.first_cached == 4 and s.pool.references(q.pages[0]) == 2 and other.pages[0] == q.pages[0]
    assert (s.cached_tokens, s.admitted_tokens) == (16, 10 + 13 + 7)


def prefill(s: Scheduler, todo: list[Sequence]) -> tuple[int, list[list[int]]]:
    """Runs them all; (prompt tokens computed, who had a chunk in each step)."""
    for q in todo:
        s.add(q)
    tokens, steps = 0, []
    while any(q.finish is None for q in todo):
        plan = s.schedule()
        assert plan, "nothing can be scheduled"
        check_pages(s)
        tokens += sum(c.length for c in plan.chunks)
        steps.append([c.sequence.rid for c in plan.chunks])
        resolve(plan, s)
    return tokens, [rids for rids in steps if rids]


@pytest.mark.parametrize("length", [5, 7, 8, 9, 30, 61])
@pytest.mark.parametrize("mixed", [True, False])
def test_copies_of_a_prompt_wait_for_its_first(length: int, mixed: bool) -> None:
    """Each computed the whole prompt, because nothing of it was in the cache yet when they were admitted together."""
    s = scheduler(200, slots=8, tiles=64, mixed=mixed)
    tokens, _ = prefill(s, [sequence(i, tuple(range(length))) for i in range(6)])
    assert tokens == length + 5 * (length - (length - 1) // PAGE * PAGE)
    s = scheduler(200, slots=8, tiles=64, mixed=mixed, prefix_cache=False)
    assert prefill(s, [sequence(i, tuple(range(length))) for i in range(6)]) == (6 * length, [[0, 1, 2, 3, 4, 5]])


def test_copies_wait_for_one_step_in_which_others_may_start() -> None:
    s = scheduler(slots=8, tiles=16)
    copies, other, short = [sequence(i, tuple(range(20))) for i in range(3)], sequence(3, 20), sequence(4, (1, 2))
    tokens, steps = prefill(s, [*copies, other, short])
    assert steps == [[0, 3, 4], [1, 2]] and tokens == 20 + 20 + 2 + 4 + 4
    # A prompt over several steps: its copies come with the step after its last.
    s = scheduler(slots=8, tiles=2)
    tokens, steps = prefill(s, [sequence(i, tuple(range(40))) for i in range(3)])
    assert steps == [[0], [0], [0], [1, 2]] and tokens == 40 + 4 + 4
    # Less than half in common is not worth a step; more is.
    for same, expected in ((8, [[0, 1]]), (12, [[0], [1]])):
        s = scheduler(slots=8, tiles=16)
        todo = [sequence(0, tuple(range(20))), sequence(1, (*range(same), *range(100, 120 - same)))]
        assert prefill(s, todo)[1] == expected


def test_copies_wait_for_a_first_that_is_scored_too() -> None:
    """It takes nothing from the cache itself, but leaves its pages there."""
    s = scheduler(slots=8, tiles=16)
    first, copy = sequence(0, tuple(range(20))), sequence(1, tuple(range(20)))
    first.scores = {}
    assert prefill(s, [first, copy]) == (20 + 4, [[0], [1]])


def test_nobody_waits_for_a_prompt_that_comes_after_it_or_is_gone() -> None:
    s = scheduler(slots=8, tiles=2)
    low, high = sequence(0, tuple(range(40))), sequence(1, tuple(range(40)), priority=1)
    s.add(low)
    s.schedule()
    s.add(high)
    s.add(sequence(2, tuple(range(40))))
    steps = [[c.sequence.rid for c in s.schedule().chunks] for _ in range(4)]
    assert steps == [[1], [1, 0], [0], [2]]  # nor does it make its copy wait, which comes before it
    s = scheduler(slots=8, tiles=4)
    first, second = sequence(0, tuple(range(30))), sequence(1, tuple(range(30)))
    s.add(first)
    s.add(second)
    assert [c.sequence.rid for c in s.schedule().chunks] == [0]
    first.finish = FinishReason.ABORT
    s.remove(first)
    assert [c.sequence.rid for c in s.schedule().chunks] == [1]


def test_the_last_token_is_always_computed() -> None:
    s = scheduler()
    finish(s, sequence(0, tuple(range(12)), new=1))
    s.add(sequence(1, tuple(range(12)), new=1))
    assert [(c.start, c.length) for c in s.schedule().chunks] == [(8, 4)]


def test_without_the_prefix_cache_nothing_is_kept() -> None:
    s = scheduler(prefix_cache=False)
    finish(s, sequence(0, tuple(range(12))))
    assert s.pool.cached == 0
    s.add(sequence(1, tuple(range(12))))
    assert [c.start for c in s.schedule().chunks] == [0]


def test_a_failure_forgets_every_prefix_and_an_error_its_own() -> None:
    s = scheduler()
    finish(s, sequence(0, 12))
    s.add(sequence(1, 12))
    s.requeue(s.schedule().sequences)
    assert s.pool.cached == s.pool.used == 0 and s.pool.free == s.pool.total
    s = scheduler()
    finish(s, sequence(0, 12))
    s.add(bad := sequence(1, 12))
    s.schedule()
    bad.finish = FinishReason.ERROR
    s.remove(bad)
    assert s.pool.cached == 4  # of the first: 12 + 8 tokens, 19 computed
