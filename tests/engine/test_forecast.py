from __future__ import annotations

import pytest

from jqserve.engine.forecast import CLIP, SMOOTHING, START, Forecast
from jqserve.engine.request import EngineRequest, SamplingParams
from jqserve.engine.sequence import Sequence

PAGE = 4


def sequence(prompt: int, new: int, done: int = 0) -> Sequence:
    tokens = list(range(prompt + done))
    return Sequence(EngineRequest(0, tuple(range(prompt)), SamplingParams()), 0, prompt + new, tokens, frozenset())


@pytest.mark.parametrize(
    ("new", "done", "growth"),
    [
        (100, 0, 50),  # half of the allowance
        (100, 30, 20),
        (100, 50, 1),  # as long as expected: it may end any time
        (100, 80, 5),  # longer than expected: a quarter of what is left
        (1, 0, 1),
        (10**6, 0, CLIP // 2),
        (10, 10, 0),  # at its limit
    ],
)
def test_growth(new: int, done: int, growth: int) -> None:
    assert Forecast(PAGE).growth(sequence(8, new, done)) == growth


def test_it_learns_from_what_ends_and_from_preemptions() -> None:
    forecast = Forecast(PAGE)
    forecast.finished(sequence(8, 100, 100))
    assert forecast.share == pytest.approx(START + SMOOTHING * (1 - START))
    forecast.finished(sequence(8, 100, 0))
    assert forecast.share < START + SMOOTHING / 2
    for _ in range(20):
        forecast.preempted()
    assert forecast.share == 1


def test_the_peak_is_where_most_stand_before_one_ends() -> None:
    """Two of 8 tokens, one with 4 and one with 40 to come: together 8 + 8 + 4 + 4, the long one alone 8 + 40."""
    forecast = Forecast(PAGE)
    forecast.share = 1.0
    half = (PAGE - 1) / 2  # of a page, per sequence
    short, long = (sequence(8, 4), 0), (sequence(8, 40), 0)
    assert forecast.peak([short, long]) == -(-(8 + 40 + half) // PAGE)
    even = [(sequence(8, 40), 0)] * 3
    assert forecast.peak(even) == -(-3 * (8 + 40 + half) // PAGE)
    assert forecast.peak([(sequence(8, 40), 8)] * 3) == -(-3 * (40 + half) // PAGE)  # the prompt is shared
    assert forecast.peak([]) == 0


def test_conservativeness_scales() -> None:
    bold = Forecast(PAGE, conservativeness=0.2)
    assert bold.growth(sequence(8, 100)) == 10


def test_prompts_that_are_only_scored_say_nothing_of_answers() -> None:
    forecast = Forecast(PAGE)
    for _ in range(50):
        forecast.finished(sequence(8, 0))
    assert forecast.share == START
