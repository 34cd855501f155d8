"""The scheduler against a simulated device: pages and positions must fit, whatever is added, ended or preempted."""

from __future__ import annotations

import numpy as np
import pytest

from jqserve.engine.pages import PagePool
from jqserve.engine.request import EngineRequest, FinishReason, SamplingParams
from jqserve.engine.scheduler import Plan, Scheduler
from jqserve.engine.sequence import Sequence

PAGE, TILE = 4, 8


def scheduler(pages: int = 100, slots: int = 4, tiles: int = 2) -> Scheduler:
    return Scheduler(PagePool(pages), page_size=PAGE, slots=slots, tile_size=TILE, tiles=tiles)


def sequence(rid: int, prompt: int, new: int = 8) -> Sequence:
    request = EngineRequest(rid, tuple(range(prompt)), SamplingParams(max_new_tokens=new))
    return Sequence(request, rid, prompt + new, list(request.prompt), frozenset())


def resolve(plan: Plan, sched: Scheduler) -> None:
    """What the engine does with a step's tokens (all 7)."""
    sampled = [row.sequence for row in plan.decodes] + [c.sequence for c in plan.chunks if c.sample]
    for seq in sampled:
        if seq.finish is None:
            seq.pending -= 1
            seq.tokens.append(7)
            if len(seq.tokens) >= seq.limit:
                seq.finish = FinishReason.LENGTH
                sched.remove(seq)


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


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_random_traffic_on_a_simulated_device(seed: int, overlap: bool) -> None:
    """Every KV position that a row reads was written, by this sequence, into a page that it still holds."""
    random = np.random.default_rng(seed)
    pages, slots, tiles = int(random.integers(12, 30)), int(random.integers(2, 9)), int(random.integers(1, 5))
    s = scheduler(pages, slots, tiles)
    longest = pages * PAGE
    written: dict[int, tuple[int, int]] = {}  # page * PAGE + offset -> (rid, position)
    live: dict[int, Sequence] = {}
    in_flight: list[Plan] = []
    todo = [
        sequence(i, int(random.integers(1, longest // 2)), int(random.integers(1, longest // 2))) for i in range(60)
    ]
    todo.reverse()
    for _ in range(5000):
        if not (todo or live or in_flight):
            break
        while todo and random.random() < 0.5:
            q = todo.pop()
            live[q.rid] = q
            s.add(q)
        plan = s.schedule()
        assert sum(-(-c.length // TILE) for c in plan.chunks) <= tiles and len(plan.decodes) <= slots
        check_pages(s)
        for row in plan.decodes:
            written[row.page * PAGE + row.position % PAGE] = (row.sequence.rid, row.position)
            check_reads(written, row.sequence, row.position + 1)
        for c in plan.chunks:
            for position in range(c.start, c.start + c.length):
                page = c.pages[position // PAGE - c.start // PAGE]
                written[page * PAGE + position % PAGE] = (c.sequence.rid, position)
            check_reads(written, c.sequence, c.start + c.length)
        in_flight.append(plan)
        while len(in_flight) > overlap or (in_flight and not plan):
            done = in_flight.pop(0)
            for q in done.sequences:
                if q.finish is None and random.random() < 0.02:  # aborted while under way
                    q.finish = FinishReason.ABORT
                    s.remove(q)
            resolve(done, s)
        live = {rid: q for rid, q in live.items() if q.finish is None}
    else:
        raise AssertionError("it never ends")
    assert s.pool.used == 0 and len(s.free_slots) == slots and s.preemptions > 0


def check_pages(s: Scheduler) -> None:
    held = [page for q in s.running for page in q.pages]
    assert len(held) == len(set(held)) == s.pool.used
    taken = [q.slot for q in s.running]
    assert None not in taken and len(set(taken) | set(s.free_slots)) == len(taken) + len(s.free_slots)
    assert [q.arrival for q in s.waiting] == sorted(q.arrival for q in s.waiting)


def check_reads(written: dict[int, tuple[int, int]], q: Sequence, length: int) -> None:
    for position in range(length):
        assert written[q.pages[position // PAGE] * PAGE + position % PAGE] == (q.rid, position)
