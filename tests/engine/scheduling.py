"""A scheduler, its sequences, and a device that answers every step with the token 7."""

from __future__ import annotations

from typing import Any

from jqserve.engine.pages import PagePool
from jqserve.engine.plan import Plan
from jqserve.engine.request import EngineRequest, FinishReason, SamplingParams
from jqserve.engine.scheduler import Scheduler
from jqserve.engine.sequence import Sequence

PAGE, TILE = 4, 8


def scheduler(pages: int = 100, slots: int = 4, tiles: int = 2, **options: Any) -> Scheduler:
    return Scheduler(PagePool(pages), page_size=PAGE, slots=slots, tile_size=TILE, tiles=tiles, **options)


def sequence(rid: int, prompt: int | tuple[int, ...], new: int = 8, priority: int = 0) -> Sequence:
    ids = tuple(1000 * rid + i for i in range(prompt)) if isinstance(prompt, int) else prompt
    request = EngineRequest(rid, ids, SamplingParams(max_new_tokens=new), priority)
    return Sequence(request, rid, len(ids) + new, list(ids), frozenset())


def resolve(plan: Plan, sched: Scheduler) -> None:
    """What the engine does with a step's tokens (all 7)."""
    for seq, count in zip(plan.sequences, plan.sampled):
        if seq.finish is None and count:
            seq.pending -= count
            seq.tokens += [7] * count
            sched.publish(seq)
            if len(seq.tokens) >= seq.limit:
                seq.finish = FinishReason.LENGTH
                sched.remove(seq)


def check_pages(s: Scheduler) -> None:
    held = [page for q in s.running for page in q.pages]
    assert s.at_limits == sum(-(-q.limit // s.page_size) for q in s.running)
    assert len(set(held)) == s.pool.used and all(s.pool.references(page) == held.count(page) for page in set(held))
    assert all(len(q.pages) == len(set(q.pages)) for q in s.running)
    taken = [q.slot for q in s.running]
    assert None not in taken and len(set(taken) | set(s.free_slots)) == len(taken) + len(s.free_slots)
    for queue in (s.waiting, s.running):
        order = [(-q.request.priority, q.arrival) for q in queue]
        assert order == sorted(order)
