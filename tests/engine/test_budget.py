from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest

from jqserve.engine import assemble
from jqserve.engine.buckets import Bucket
from jqserve.engine.budget import LATENCY, SLOWDOWN, Budget, bound, chunk
from jqserve.engine.measure import FAR, far, step_plan, typical_context
from tests.engine.conftest import CONTEXT, PAGE, SLOTS, TILE, complete, request


@pytest.mark.parametrize(
    ("seconds", "decode", "tiles"),
    [
        ({1: 0.010, 4: 0.020, 16: 0.048}, 0.008, 16),  # all within 50 ms
        ({1: 0.010, 4: 0.020, 16: 0.090}, 0.008, 4),
        ({1: 0.070, 4: 0.200}, 0.008, 1),  # even one tile takes longer: the least there is
        ({1: 0.120, 4: 0.180, 16: 0.500}, 0.060, 4),  # three slow decode steps
    ],
)
def test_the_largest_step_within_the_bound(seconds: dict[int, float], decode: float, tiles: int) -> None:
    assert Budget(seconds, decode).tiles() == tiles


def test_fewer_tiles_the_more_of_the_prompt_is_computed() -> None:
    """A tile takes 1 ms, and as much again for each 10,000 tokens before it."""
    budget = Budget({n: 0.012 + 0.001 * n for n in (1, 2, 4, 8, 16)}, 0.012, 1e-7)
    found = {before: budget.tiles(before) for before in (0, 10_000, 20_000, 40_000, 100_000, 10**6)}
    assert found == {0: 16, 10_000: 16, 20_000: 8, 40_000: 4, 100_000: 2, 10**6: 1}
    for before, tiles in found.items():
        assert tiles == 1 or 0.012 + tiles * (0.001 + 1e-7 * before) <= LATENCY


@pytest.mark.parametrize(
    ("seconds", "tiles"),
    [
        (
            {1: 0.010, 4: 0.012, 16: 0.036},
            16,
        ),  # few tokens read the weights as well: half as many are not half the time
        ({1: 0.010, 4: 0.012, 8: 0.0182, 16: 0.036}, 8),  # 1 % slower a token, done in half the time
        ({1: 0.002, 2: 0.0045}, 1),
    ],
)
def test_the_least_chunk_that_is_as_fast(seconds: dict[int, float], tiles: int) -> None:
    assert chunk(seconds) == tiles


def test_the_bound() -> None:
    assert bound(0.001) == LATENCY and bound(1.0) == SLOWDOWN


def test_the_engine_measures_and_takes_it_over(make_core: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    core = make_core()
    buckets = core.runner.buckets
    monkeypatch.setattr(core.runner, "buckets", dataclasses.replace(buckets, mixed=(Bucket(0, 1), *buckets.mixed)))
    times = {0: 0.004, 2: 0.2}

    def seconds(runner: Any, tiles: int, context: int, before: int = 0, alone: bool = False) -> float:
        return tiles * 0.001 if alone else times[tiles] + before / 1e3

    monkeypatch.setattr(assemble, "step_seconds", seconds)
    expected = {"16+0": 0.004, "16+2": 0.2, "16+2 behind 96": 0.296, "0+1": 0.001, "0+2": 0.002}
    assert core.scheduler.tiles == 2
    assert assemble.choose_budget(core) == expected
    assert core.scheduler.tiles == 1  # as fast, and done sooner
    assert core.scheduler.decode_tiles == 2  # the only shape there is
    budget = core.scheduler.tiles_behind.__self__
    assert budget.seconds_behind == pytest.approx(0.096 / (2 * 96))


def test_it_measures_steps_of_everybody_at_a_typical_context(make_core: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With nothing before them decode rows read no keys, and a step seemed shorter than any that is served."""
    core, launched = make_core(), []
    runner = core.runner
    expected = complete(make_core(), [request(i, 20 + i) for i in range(5)])
    launch, compilations = runner.launch, runner.compilations_after_warmup
    monkeypatch.setattr(runner, "launch", lambda plan: launched.append(plan) or launch(plan))
    assert set(assemble.choose_budget(core)) == {"16+0", "16+2", "16+2 behind 96", "0+2"}
    assert runner.compilations_after_warmup == compilations
    deep = [plan for plan in launched if any(c.start for c in plan.chunks)]
    assert {(c.start, c.length) for c in deep[-1].chunks} == {(CONTEXT - 2 * TILE, 2 * TILE)}
    alone = [plan for plan in launched if not plan.decodes]
    assert len(alone) == 2 and all(sum(c.length for c in plan.chunks) == 2 * TILE for plan in alone)
    for plan in launched:
        assert {row.position for row in plan.decodes} <= {CONTEXT // 2}
        assert sum(chunk.length for chunk in plan.chunks) in (0, 2 * TILE)
        assert plan in alone or len(plan.decodes) + len(plan.chunks) == SLOTS == len({s.slot for s in plan.sequences})
    pages = [page for one in launched[0].adopted for page in one.pages]
    assert len(pages) == len(set(pages)) == SLOTS * (CONTEXT // 2 // PAGE + 1) and 0 not in pages
    found = complete(core, [request(i, 20 + i) for i in range(5)])
    assert {rid: one.tokens for rid, one in found.items()} == {rid: one.tokens for rid, one in expected.items()}


def test_a_small_pool_or_context_is_measured_too(make_core: Any) -> None:
    runner = make_core().runner
    for pages, per_sequence, expected in ((3, 16, 0), (17, 16, 7), (33, 16, 15), (10_000, 400, 1024), (10_000, 4, 16)):
        small = SimpleNamespace(
            shape=dataclasses.replace(runner.shape, pages_per_sequence=per_sequence),
            cache_shape=dataclasses.replace(runner.cache_shape, pages=pages),
            buckets=runner.buckets,
        )
        assert typical_context(small) == expected  # type: ignore[arg-type]
        before = far(small, 2)  # type: ignore[arg-type]
        assert before == max(0, min(FAR, PAGE * min(per_sequence, pages - 1) // TILE * TILE - 2 * TILE))
        if before:
            plan = step_plan(small, 2, expected, before=before)  # type: ignore[arg-type]
            ((chunk,), (adopted,)) = plan.chunks, plan.adopted
            assert (chunk.start, chunk.length, adopted.tokens, adopted.slot) == (before, 2 * TILE, before, chunk.slot)
            own = (*adopted.pages, *chunk.pages)
            assert len(own) * PAGE == before + 2 * TILE and len(set(own)) == len(own) and min(own) > 0
        for tiles in (0, 1, 2, 9):
            plan = step_plan(small, tiles, expected, adopt=True)  # type: ignore[arg-type]
            assert sum(chunk.length for chunk in plan.chunks) == tiles * TILE
            assert all(chunk.length <= per_sequence * PAGE for chunk in plan.chunks)
            used = [page for one in (*plan.adopted, *plan.chunks) for page in one.pages]
            assert all(0 < page < pages for page in used)
