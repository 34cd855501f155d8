from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest

from jqserve.engine import assemble
from jqserve.engine.budget import LATENCY, SLOWDOWN, bound, decode_tiles
from jqserve.engine.measure import step_plan, typical_context
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
    assert decode_tiles(seconds, decode) == tiles


def test_the_bound() -> None:
    assert bound(0.001) == LATENCY and bound(1.0) == SLOWDOWN


def test_the_engine_measures_and_takes_it_over(make_core: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    core = make_core()
    times = {0: 0.004, 2: 0.2}
    monkeypatch.setattr(assemble, "step_seconds", lambda runner, tiles, context: times[tiles])
    assert assemble.choose_budget(core) == {"16+0": 0.004, "16+2": 0.2}
    assert core.scheduler.decode_tiles == 2  # the only shape there is


def test_it_measures_steps_of_everybody_at_a_typical_context(make_core: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With nothing before them decode rows read no keys, and a step seemed shorter than any that is served."""
    core, launched = make_core(), []
    runner = core.runner
    expected = complete(make_core(), [request(i, 20 + i) for i in range(5)])
    launch, compilations = runner.launch, runner.compilations_after_warmup
    monkeypatch.setattr(runner, "launch", lambda plan: launched.append(plan) or launch(plan))
    assert set(assemble.choose_budget(core)) == {"16+0", "16+2"} and runner.compilations_after_warmup == compilations
    for plan in launched:
        assert {row.position for row in plan.decodes} == {CONTEXT // 2}
        assert sum(chunk.length for chunk in plan.chunks) in (0, 2 * TILE)
        assert len(plan.decodes) + len(plan.chunks) == SLOTS == len({s.slot for s in plan.sequences})
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
        for tiles in (0, 1, 2, 9):
            plan = step_plan(small, tiles, expected, adopt=True)  # type: ignore[arg-type]
            assert sum(chunk.length for chunk in plan.chunks) == tiles * TILE
            assert all(chunk.length <= per_sequence * PAGE for chunk in plan.chunks)
            used = [page for one in (*plan.adopted, *plan.chunks) for page in one.pages]
            assert all(0 < page < pages for page in used)
