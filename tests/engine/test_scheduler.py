"""The scheduler against a simulated device: pages and positions must fit, whatever is added, ended or preempted."""

from __future__ import annotations

import numpy as np
import pytest

from jqserve.engine.buckets import make_buckets
from jqserve.engine.plan import Plan
from jqserve.engine.request import FinishReason
from jqserve.engine.sequence import Sequence
from tests.engine.scheduling import PAGE, TILE, check_pages, resolve, scheduler, sequence


def test_a_long_prompt_is_cut_into_chunks_beside_decode_rows() -> None:
    s = scheduler()
    s.add(sequence(0, 3))
    resolve(s.schedule(), s)
    s.add(sequence(1, 40))
    plans = []
    for _ in range(3):
        plans.append(s.schedule())
        resolve(plans[-1], s)
    assert [len(p.decodes) for p in plans] == [1, 1, 1]
    assert [(c.start, c.length, c.sample) for p in plans for c in p.chunks] == [
        (0, 16, False), (16, 16, False), (32, 8, True),
    ]  # fmt: skip
    assert [p.decodes[0].position for p in plans] == [3, 4, 5]


def test_chunks_of_several_prompts_share_the_tile_budget_in_order() -> None:
    s = scheduler(tiles=3)
    for rid, length in enumerate([5, 9, 30]):
        s.add(sequence(rid, length))
    plan = s.schedule()
    assert [(c.sequence.rid, c.length) for c in plan.chunks] == [(0, 5), (1, 9)]
    plan = s.schedule()
    assert [(c.sequence.rid, c.length) for c in plan.chunks] == [(2, 24)]


def test_nobody_overtakes_the_head_of_the_queue() -> None:
    s = scheduler(pages=10)
    s.add(sequence(0, 30))
    resolve(s.schedule(), s)
    s.add(sequence(1, 36))
    s.add(sequence(2, 1))
    for _ in range(3):
        plan = s.schedule()
        assert {q.rid for q in plan.sequences} == {0}
        resolve(plan, s)


def test_slots_bound_the_running() -> None:
    s = scheduler(slots=2, tiles=8)
    for rid in range(5):
        s.add(sequence(rid, 2))
    assert len(s.schedule().chunks) == 2
    assert len(s.running) == 2 and len(s.waiting) == 3


def test_the_youngest_is_preempted_and_comes_back_to_its_place() -> None:
    s = scheduler(pages=4, tiles=4)
    old, young, later = sequence(0, 7, new=20), sequence(1, 3, new=10), sequence(2, 3)
    for q in (old, young, later):
        s.add(q)
    while young.preemptions == 0:
        resolve(s.schedule(), s)
    assert young.slot is None and young.pages == [] and young.computed == 0
    assert [q.rid for q in s.waiting] == [1, 2] and [q.rid for q in s.running] == [0]
    assert len(young.tokens) > 3  # what it had generated is kept, and will be recomputed


def test_a_step_may_be_planned_before_the_last_one_is_read() -> None:
    s = scheduler()
    q = sequence(0, 3, new=3)
    s.add(q)
    plans = [s.schedule() for _ in range(4)]
    assert [bool(p) for p in plans] == [True, True, True, False]  # the limit is known beforehand
    assert [row.position for p in plans for row in p.decodes] == [3, 4]
    for plan in plans:
        resolve(plan, s)
    assert q.finish is FinishReason.LENGTH and len(q.tokens) == 6 and s.pool.used == 0


def test_suspects_run_alone_until_they_have_passed() -> None:
    s = scheduler(tiles=4)
    q = [sequence(i, 4) for i in range(3)]
    for one in q:
        s.add(one)
    plan = s.schedule()
    s.requeue(plan.sequences)
    assert s.pool.used == 0 and not s.running and s.suspects == set(q)
    for one in q:
        plan = s.schedule()
        assert plan.sequences == [one]
        s.passed(one, one.computed)
        resolve(plan, s)
    assert not s.suspects
    assert len(s.schedule().decodes) == 3


def test_priorities_go_first_and_are_preempted_last() -> None:
    s = scheduler(pages=6, slots=2, tiles=1)
    low, higher = sequence(0, 7, new=12), sequence(2, 7, priority=2)
    s.add(low)
    resolve(s.schedule(), s)
    s.add(high := sequence(1, 7, new=12, priority=1))
    s.add(higher)
    assert [q.rid for q in s.waiting] == [2, 1]
    for _ in range(40):
        resolve(s.schedule(), s)
        if low.finish is not None:
            break
    assert low.preemptions >= 1 and high.preemptions == higher.preemptions == 0
    assert higher.finish and high.finish and low.finish


def test_a_prompt_does_not_wait_for_those_that_come_after_it() -> None:
    """A long prompt took all tiles until it was done, whoever came meanwhile: with 100,000 tokens, some seconds."""
    s = scheduler(tiles=2)
    s.add(sequence(0, 64))
    s.schedule()
    s.add(sequence(1, 24, priority=1))
    s.add(sequence(2, 24))
    found = [[(c.sequence.rid, c.length) for c in s.schedule().chunks] for _ in range(5)]
    assert found == [[(1, 16)], [(1, 8), (0, 8)], [(0, 16)], [(0, 16)], [(0, 8), (2, 8)]]
    s = scheduler(pages=100, tiles=2)  # nor one that was preempted and comes back to its place
    old, young = sequence(0, 24), sequence(1, 64)
    for q in (old, young):
        s.add(q)
    resolve(s.schedule(), s)
    resolve(s.schedule(), s)
    assert old.on_device and young.remaining
    s.preempt(old)
    s.pool.forget()
    assert [c.sequence.rid for c in s.schedule().chunks] == [0]


def test_several_steps_only_when_nobody_waits_and_somebody_can_use_them() -> None:
    s = scheduler(slots=2, tiles=1, steps=4)
    s.add(sequence(0, 3, new=20))
    assert s.schedule().steps == 1  # its prompt
    plan = s.schedule()
    assert plan.steps == 4 and [(r.position, r.steps, len(r.pages)) for r in plan.decodes] == [(3, 4, 2)]
    s.add(sequence(1, 20, new=3))
    assert s.schedule().steps == s.schedule().steps == s.schedule().steps == 1  # the other's prompt
    plan = s.schedule()
    assert plan.steps == 4 and [r.steps for r in plan.decodes] == [4, 2]
    s.add(sequence(2, 3))
    assert s.schedule().steps == 1  # somebody waits for a slot


def test_several_steps_only_for_few_rows() -> None:
    s = scheduler(slots=4, tiles=4, steps=2, steps_rows=2)
    for rid in range(3):
        s.add(sequence(rid, 3, new=4 if rid else 20))
    seen = []
    for _ in range(30):
        plan = s.schedule()
        seen.append((len(plan.decodes), plan.steps))
        resolve(plan, s)
    assert not s.running and {(3, 1), (1, 2)} <= set(seen) and (3, 2) not in seen


def test_few_steps_left_or_few_pages_are_done_one_by_one() -> None:
    s = scheduler(pages=3, slots=1, steps=4)
    s.add(sequence(0, 3, new=4))
    assert [s.schedule().steps for _ in range(2)] == [1, 4] and not s.schedule()
    s = scheduler(pages=2, slots=1, steps=4)
    s.add(sequence(0, 6, new=4))
    assert [s.schedule().steps for _ in range(4)] == [1, 1, 1, 1]  # the sequence may grow to 10, and 8 fit


def test_fewer_tiles_while_somebody_decodes() -> None:
    s = scheduler(tiles=4, decode_tiles=1)
    s.add(sequence(0, 30, new=30))
    assert [c.length for c in s.schedule().chunks] == [30]
    s.add(sequence(1, 30))
    assert [[c.length for c in s.schedule().chunks] for _ in range(4)] == [[8], [8], [8], [6]]


def test_fewer_tiles_the_deeper_the_prompt_that_is_computed() -> None:
    s = scheduler(tiles=4)
    s.tiles_behind = lambda tokens: 4 if tokens < 30 else 1
    s.add(sequence(0, 3, new=40))
    s.schedule()
    s.add(sequence(1, 80))
    assert [[c.length for c in s.schedule().chunks] for _ in range(4)] == [[32], [8], [8], [8]]
    s = scheduler(tiles=4)
    s.tiles_behind = lambda tokens: 4 if tokens < 30 else 1
    for rid, length in ((0, 3), (1, 64), (2, 64)):
        s.add(sequence(rid, length, new=40))
        s.schedule()
    # The second prompt stands at 0 behind the first, which is deep: as soon as it is reached, its own depth counts.
    assert [[(c.sequence.rid, c.length) for c in s.schedule().chunks] for _ in range(5)] == [
        [(1, 8)], [(1, 8)], [(1, 8)], [(2, 32)], [(2, 8)],
    ]  # fmt: skip


def test_admission_by_forecast_leaves_room_to_grow() -> None:
    """Ten requests of 4 + 36 tokens (10 pages each) in 50 pages: by the forecast that learned their length, at most
    five run at once and nobody is preempted; without it all are admitted, and most are thrown out again."""

    def run(conservativeness: float) -> tuple[int, int]:
        s = scheduler(pages=52, slots=10, tiles=10, conservativeness=conservativeness, prefix_cache=False)
        s.forecast.share = 1.0
        todo = [sequence(i, 4, new=36) for i in range(10)]
        for q in todo:
            s.add(q)
        most = 0
        for _ in range(1000):
            resolve(s.schedule(), s)
            most = max(most, len(s.running))
            if all(q.finish for q in todo):
                return most, s.preemptions
        raise AssertionError("it never ends")

    most, preemptions = run(1.0)
    assert 4 <= most <= 6 and preemptions == 0
    most, preemptions = run(0.0)
    assert most == 10 and preemptions >= 5


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_random_traffic_on_a_simulated_device(seed: int, overlap: bool) -> None:
    """Every position that a row reads holds what its sequence's tokens up to there give, in a page that it holds.

    Prompts begin alike, tokens come one or several at a time, sequences are aborted, and now and then a step fails.
    """
    random = np.random.default_rng(seed)
    pages, slots, tiles = int(random.integers(12, 30)), int(random.integers(2, 9)), int(random.integers(1, 5))
    options = {"steps": int(random.integers(1, 7)), "prefix_cache": seed % 4 != 3}
    s = scheduler(pages, slots, tiles, **options, conservativeness=float(seed % 3 == 2) / 4)
    longest = pages * PAGE
    written: dict[int, int] = {}  # page * PAGE + offset -> hash of the tokens up to that position
    live: dict[int, Sequence] = {}
    in_flight: list[Plan] = []
    todo = []
    for i in range(60):
        length, same = int(random.integers(1, longest // 2)), int(random.integers(0, longest // 2))
        ids = tuple(range(length)) if length <= same else (*range(same), *range(1000 * i, 1000 * i + length - same))
        todo.append(sequence(i, ids, int(random.integers(1, longest // 2)), priority=int(random.integers(0, 2))))
    for _ in range(5000):
        if not (todo or live or in_flight):
            break
        while todo and random.random() < 0.5:
            q = todo.pop(0)
            live[q.rid] = q
            s.add(q)
        plan = s.schedule()
        assert sum(-(-c.length // TILE) for c in plan.chunks) <= tiles and len(plan.decodes) <= slots
        check_pages(s)
        for row in plan.decodes:
            assert 1 <= row.steps <= plan.steps
            for i in range(row.steps):
                at = row.position + i
                page = row.pages[at // PAGE - row.position // PAGE]
                written[page * PAGE + at % PAGE] = content(row.sequence, at)
            check_reads(written, row.sequence, row.position + row.steps)
        for c in plan.chunks:
            for position in range(c.start, c.start + c.length):
                page = c.pages[position // PAGE - c.start // PAGE]
                written[page * PAGE + position % PAGE] = content(c.sequence, position)
            check_reads(written, c.sequence, c.start + c.length)
        in_flight.append(plan)
        if random.random() < 0.01:  # the step fails, and with it what is on the device
            s.requeue([q for failed in in_flight for q in failed.sequences])
            in_flight, written = [], {}
            continue
        while len(in_flight) > overlap or (in_flight and not plan):
            done = in_flight.pop(0)
            for q, reached in zip(done.sequences, done.reached):
                s.passed(q, reached)
                if q.finish is None and random.random() < 0.02:  # aborted while under way
                    q.finish = FinishReason.ABORT
                    s.remove(q)
            resolve(done, s)
        live = {rid: q for rid, q in live.items() if q.finish is None}
    else:
        raise AssertionError("it never ends")
    assert s.pool.used == 0 and len(s.free_slots) == slots and s.preemptions > 0
    assert (s.cached_tokens > 0) == options["prefix_cache"]


def content(q: Sequence, position: int) -> int:
    """What the key of a position depends on: the tokens up to it (those not read yet are 7, as all are)."""
    return hash((*q.tokens, *[7] * (position + 1 - len(q.tokens)))[: position + 1])


def check_reads(written: dict[int, int], q: Sequence, length: int) -> None:
    for position in range(length):
        assert written[q.pages[position // PAGE] * PAGE + position % PAGE] == content(q, position)


def test_prompts_come_in_as_many_tiles_as_a_program_has() -> None:
    """Five prompts of a tile each, beside somebody who decodes: four, then the one that is left over with the next."""
    s = scheduler(slots=8, tiles=8, fill=make_buckets(8, 8, fine=True).fill)
    s.add(sequence(0, 3, new=20))
    s.schedule()
    for i in range(1, 6):
        s.add(sequence(i, TILE, new=5))
    assert [len(plan.chunks) for plan in (s.schedule(), s.schedule())] == [4, 1]
    s.add(sequence(6, 3 * TILE, new=5))
    assert [[chunk.length for chunk in s.schedule().chunks] for _ in range(2)] == [[2 * TILE], [TILE]]
