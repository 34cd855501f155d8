from __future__ import annotations

from typing import Any

import pytest

from jqserve.engine.budget import LATENCY, SLOWDOWN, bound, decode_tiles


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
    from jqserve.engine.assemble import choose_budget

    core = make_core()
    times = {0: 0.004, 2: 0.2}
    monkeypatch.setattr(core.runner, "idle_run", lambda programs, runs: times[programs[0].bucket.tiles])
    assert choose_budget(core) == {"16+0": 0.004, "16+2": 0.2}
    assert core.scheduler.decode_tiles == 2  # the only shape there is
