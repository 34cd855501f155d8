"""A prompt of the offline engine: what it tells does not depend on how many tokens a step gives at once."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from jqserve.engine.completion import Completion, Running
from jqserve.engine.request import EngineRequest, FinishReason, SamplingParams, StepEvent, TokenLogprobs
from jqserve.server.detokenize import Detokenizer
from jqserve.server.stops import StopStrings

LETTERS = SimpleNamespace(decode=lambda ids, skip_special_tokens: "".join(chr(97 + i) for i in ids))


def complete(text: str, at_once: int, finish: FinishReason = FinishReason.LENGTH, **sampling: Any) -> Completion:
    """`text`'s letters as the engine's tokens, `at_once` in each event, up to where it would be aborted."""
    aborted: list[int] = []
    core: Any = SimpleNamespace(abort=lambda rid, *, stopped: aborted.append(rid if stopped else -1))
    running = Running(EngineRequest(7, (0,), SamplingParams(**sampling)), LETTERS)
    ids = [ord(letter) - 97 for letter in text]
    for start in range(0, len(ids), at_once):
        part = ids[start : start + at_once]
        last = finish if start + at_once >= len(ids) else None
        matched = ids[-1] if last is FinishReason.STOP else None
        scores = tuple(TokenLogprobs(-float(i)) for i in part)
        if running.take(StepEvent(7, tuple(part), last, matched, scores), core):
            assert aborted == ([] if last else [7])
            return running.completion()
    raise AssertionError("it never ended")


@pytest.mark.parametrize("at_once", [1, 2, 3, 5, 8])
@pytest.mark.parametrize(
    ("text", "sampling", "finish", "expected", "tokens"),
    [
        pytest.param("abcdefgh", {"stop": ("cd",)}, FinishReason.STOP, "ab", 4, id="behind the stop nothing"),
        pytest.param("abcdefgh", {"stop": ("x",)}, FinishReason.LENGTH, "abcdefgh", 8, id="no stop"),
        pytest.param("abcdefgh", {"stop": ("de", "bcde")}, FinishReason.STOP, "a", 5, id="the first to begin"),
        pytest.param("ababababx", {"stop": ("a",), "min_new_tokens": 4}, FinishReason.STOP, "abab", 5, id="minimum"),
        pytest.param("abcdefab", {"stop": ("a",), "min_new_tokens": 3}, FinishReason.STOP, "abcdef", 7, id="past it"),
        pytest.param("abcdxyzx", {"stop": ("cd",), "min_new_tokens": 4}, FinishReason.LENGTH, "abcdxyzx", 8, id="half"),
    ],
)
def test_the_same_however_many_tokens_come_at_once(
    text: str, sampling: dict[str, Any], finish: FinishReason, expected: str, tokens: int, at_once: int
) -> None:
    """As the server does it: a stop string ends the answer with the token that completes it, and one that stands in
    what the first min_new_tokens - 1 tokens gave is text like any other."""
    done = complete(text, at_once, **sampling)
    assert (done.text, done.finish, len(done.token_ids)) == (expected, finish, tokens)
    assert [entry.token for entry in done.logprobs] == [97.0 - ord(letter) for letter in text[:tokens]]


def test_a_stop_token_completes_no_stop_string() -> None:
    done = complete("abcd", 4, FinishReason.STOP, stop=("cd", "d"))
    assert (done.text, len(done.token_ids), done.finish) == ("abc", 4, FinishReason.STOP)


def test_logprobs_of_the_prompt_are_kept() -> None:
    core: Any = None
    running = Running(EngineRequest(7, (1, 2, 3), SamplingParams(max_new_tokens=0, prompt_logprobs=1)), LETTERS)
    scores = (TokenLogprobs(-1.0, (2,), (-1.0,)), TokenLogprobs(-2.0, (5,), (-0.5,)))
    assert running.take(StepEvent(7, (), FinishReason.LENGTH, prompt_logprobs=scores), core)
    done = running.completion()
    assert done.prompt_logprobs == scores and done.token_ids == () and done.text == ""


BYTES = SimpleNamespace(decode=lambda ids, skip_special_tokens: bytes(ids).decode("utf-8", "replace"))


@pytest.mark.parametrize(
    ("ids", "stop", "expected"),
    [
        pytest.param("Grün 日".encode(), (), "Grün 日", id="whole"),
        pytest.param("Grün 日".encode()[:-1], (), "Grün ", id="cut by its limit"),
        pytest.param("a😀".encode()[:-2], (), "a", id="cut in the middle"),
        pytest.param(b"a\xff!b", ("!",), "a\ufffd", id="broken, and cut by a stop string"),
        pytest.param(b"a\xffb", (), "a\ufffdb", id="broken in the middle"),
        pytest.param(b"a" + b"\xff" * 8, (), "a", id="broken at the end"),
        pytest.param(b"a" + b"\xff" * 9, (), "a" + 8 * "\ufffd", id="broken for long"),
    ],
)
def test_half_a_character_at_the_end_is_no_text_as_on_the_server(ids: bytes, stop: Any, expected: str) -> None:
    core: Any = SimpleNamespace(abort=lambda rid, *, stopped: None)
    running = Running(EngineRequest(7, (0,), SamplingParams(stop=stop)), BYTES)
    server = Detokenizer(lambda ids: BYTES.decode(ids, True))
    pieces, stops = [], StopStrings(stop)
    for i, token in enumerate(ids):
        piece, matched = stops.feed(server.feed([token]))
        pieces.append(piece)
        ended = running.take(StepEvent(7, (token,), FinishReason.LENGTH if i == len(ids) - 1 else None), core)
        assert ended == (matched is not None or i == len(ids) - 1)
        if ended:
            break
    assert running.completion().text == "".join(pieces) == expected
