"""A sequence's buffer: when it flushes, how it ends, what it says then."""

from __future__ import annotations

import grpc
import pytest

from jqserve.engine.request import EngineRequest, FinishReason, SamplingParams, StepEvent
from jqserve.errors import EngineFailedError, EngineUnavailableError, JqserveError, QueueFullError, RequestError
from jqserve.server.detokenize import Detokenizer
from jqserve.server.pace import MESSAGES, MOST_SPACING, Pace
from jqserve.server.sequence import Sequence
from jqserve.server.status import STATUS, status_of


class Watched(Sequence):
    """Token i is the letter chr(97 + i)."""

    def __init__(self, text: bool = True, **sampling: object) -> None:
        self.calls: list[str] = []
        self.pace = Pace()
        super().__init__(
            0,
            EngineRequest(1, (0,), SamplingParams(seed=3, **sampling)),  # type: ignore[arg-type]
            detokenizer=Detokenizer(lambda ids: "".join(chr(97 + i) for i in ids)) if text else None,
            pace=self.pace,
            wake=lambda s: self.calls.append("wake"),
            wait=lambda: self.calls.append("wait"),
            stop=lambda s: self.calls.append("stop"),
        )

    def event(self, *ids: int, **fields: object) -> str:
        """Pushes; returns what it called."""
        self.calls.clear()
        self.push(StepEvent(1, ids, **fields))  # type: ignore[arg-type]
        return " ".join(self.calls)


def test_the_first_token_wakes_then_every_four() -> None:
    sequence = Watched()
    assert sequence.event(0) == "wake"
    delta = sequence.take()
    assert delta is not None and (delta.text, delta.token_ids) == ("a", (0,))
    assert [sequence.event(i) for i in (1, 2, 3, 4)] == ["wait", "wait", "wait", "wake"]
    delta = sequence.take()
    assert delta is not None and delta.text == "bcde" and sequence.take() is None


def test_among_many_streams_messages_are_further_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """All streams together send MESSAGES a second; the first token and the end never wait."""
    now = [100.0]
    monkeypatch.setattr("jqserve.server.sequence.time.monotonic", lambda: now[0])
    sequence = Watched()
    sequence.pace.streams(256)
    assert sequence.pace.spacing == sequence.pace.seconds == 256 / MESSAGES > 0.05
    assert sequence.event(0) == "wake" and sequence.take() is not None
    called = []
    for i in range(1, 12):
        now[0] += 0.01
        called.append(sequence.event(i))
    assert called == ["wait"] * 10 + ["wake"]
    assert len(sequence.take().token_ids) == 11  # type: ignore[union-attr]
    assert sequence.event(1, finish=FinishReason.LENGTH) == "wake"
    sequence.pace.streams(10**6)
    assert sequence.pace.spacing == MOST_SPACING
    fixed = Pace(4, fixed=True)
    fixed.streams(10**6)
    assert (fixed.spacing, fixed.seconds) == (0, 0.05)


def test_the_end_wakes_and_reports_once() -> None:
    sequence = Watched()
    sequence.event(0)
    assert sequence.event(1, finish=FinishReason.LENGTH) == "wake"
    delta, end = sequence.take(), sequence.result()
    assert delta is not None and delta.text == "ab"
    assert (end.reason, end.completion_tokens, end.seed, end.matched_token) == (FinishReason.LENGTH, 2, 3, None)
    assert sequence.event(5) == ""  # late


def test_a_stop_token_gives_no_text() -> None:
    sequence = Watched()
    sequence.event(0, 1, finish=FinishReason.STOP, matched_stop=1)
    delta = sequence.take()
    assert delta is not None and (delta.text, delta.token_ids) == ("a", (0, 1))
    assert sequence.result().matched_token == 1


def test_a_stop_string_ends_it_at_the_token_that_completes_it() -> None:
    sequence = Watched(stop=("cd",))
    assert sequence.event(0, 1, 2, 3, 4) == "stop wake"
    delta, end = sequence.take(), sequence.result()
    assert delta is not None and (delta.text, delta.token_ids) == ("ab", (0, 1, 2, 3))
    assert (end.reason, end.matched_stop, end.completion_tokens) == (FinishReason.STOP, "cd", 4)


def test_a_stop_string_in_the_engines_last_event_needs_no_abort() -> None:
    sequence = Watched(stop=("b",))
    assert sequence.event(0, 1, 2, finish=FinishReason.LENGTH) == "wake"
    assert sequence.finish is FinishReason.STOP and sequence.result().completion_tokens == 2


def test_stop_strings_wait_for_min_new_tokens() -> None:
    sequence = Watched(stop=("a",), min_new_tokens=3)
    for token in (0, 1, 2, 0, 1):
        sequence.event(token)
    delta = sequence.take()
    assert delta is not None and delta.text == "abc" and sequence.finish is FinishReason.STOP


def test_ids_only() -> None:
    sequence = Watched(text=False)
    sequence.event(0, finish=FinishReason.STOP, matched_stop=0)
    delta = sequence.take()
    assert delta is not None and (delta.text, delta.token_ids) == ("", (0,))


def test_a_dead_engine_is_unavailable_for_what_had_not_begun_and_internal_for_what_ran() -> None:
    queued, running = Watched(), Watched()
    running.event(0)
    for sequence, kind in ((queued, EngineUnavailableError), (running, EngineFailedError)):
        sequence.fail(None)
        assert type(sequence.error) is kind and sequence.finish is FinishReason.ERROR


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RequestError("x", "y"), grpc.StatusCode.INVALID_ARGUMENT),
        (QueueFullError(), grpc.StatusCode.RESOURCE_EXHAUSTED),
        (EngineUnavailableError(), grpc.StatusCode.UNAVAILABLE),
        (JqserveError(), grpc.StatusCode.INTERNAL),
    ],
)
def test_the_status_table(error: JqserveError, code: grpc.StatusCode) -> None:
    assert status_of(error) is code and grpc.StatusCode.UNKNOWN not in STATUS.values()
