"""Stop strings: found wherever the text is cut, never partly emitted, nothing held back without a reason."""

from __future__ import annotations

import random

import pytest

from jqserve.server.stops import StopStrings


def expected(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The definition: cut before the match that can be decided first."""
    for end in range(len(text) + 1):
        ended = [stop for stop in stops if text[:end].endswith(stop)]
        if ended:
            stop = max(ended, key=len)
            return text[: end - len(stop)], stop
    return text, None


@pytest.mark.parametrize("seed", range(100))
def test_like_the_definition_when_fed_by_character(seed: int) -> None:
    rng = random.Random(seed)
    text = "".join(rng.choice("ab") for _ in range(30))
    stops = ["".join(rng.choice("ab") for _ in range(rng.randint(3, 6))) for _ in range(rng.randint(1, 3))]
    matcher, out, met = StopStrings(stops), "", None
    for character in text:
        piece, met = matcher.feed(character)
        out += piece
        if met:
            break
    if met is None:
        out += matcher.flush()
    assert (out, met) == expected(text, stops)


@pytest.mark.parametrize("seed", range(100))
def test_cut_anywhere_the_text_ends_before_a_stop(seed: int) -> None:
    rng = random.Random(seed)
    text = "".join(rng.choice("abc") for _ in range(40))
    stop = "".join(rng.choice("abc") for _ in range(3))
    matcher, out, at, met = StopStrings([stop]), "", 0, None
    while at < len(text) and met is None:
        size = rng.randint(0, 5)
        piece, met = matcher.feed(text[at : at + size])
        out, at = out + piece, at + size
    if met is None:
        out += matcher.flush()
    assert (out, met) == (text.partition(stop)[0], stop if stop in text else None)


def test_only_what_could_become_a_stop_is_held() -> None:
    matcher = StopStrings(["END!"])
    assert matcher.feed("all E") == ("all ", None)
    assert matcher.feed("N") == ("", None)
    assert matcher.feed("x") == ("ENx", None)
    assert matcher.feed("END") == ("", None)
    assert matcher.flush() == "END" and matcher.flush() == ""


def test_the_first_of_several_wins_then_the_longest() -> None:
    assert StopStrings(["cd", "bc"]).feed("abcd") == ("a", "bc")
    assert StopStrings(["b", "bc"]).feed("abcd") == ("a", "bc")
