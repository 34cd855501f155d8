"""One running sequence as the front end sees it: a buffer of tokens on their way to text and to the caller."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

from jqserve.engine.request import EngineRequest, FinishReason, StepEvent, TokenLogprobs
from jqserve.errors import EngineFailedError, EngineUnavailableError, JqserveError, RequestError
from jqserve.server.detokenize import Detokenizer
from jqserve.server.pace import Pace
from jqserve.server.stops import StopStrings


@dataclasses.dataclass(frozen=True)
class Delta:
    """What is new in sequence `index`. `text` may be empty while it is held back."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()


@dataclasses.dataclass(frozen=True)
class Finished:
    """The end of sequence `index`: at most one of the matches is set. Times in seconds since the request was read."""

    index: int
    reason: FinishReason
    completion_tokens: int
    seed: int
    first_token_seconds: float
    total_seconds: float
    matched_stop: str | None = None
    matched_token: int | None = None


class Sequence:
    """A `Sink` that buffers until a flush is due: the first token, as many as the pace says, the end.

    It calls `wake` when one is due, `wait` when tokens stay behind (the owner flushes them after a while), and `stop`
    when a stop string ended it and the engine does not know yet.
    """

    def __init__(
        self,
        index: int,
        request: EngineRequest,
        *,
        detokenizer: Detokenizer | None,
        pace: Pace,
        wake: Callable[[Sequence], None],
        wait: Callable[[], None],
        stop: Callable[[Sequence], None],
        observe: Callable[[int, float | None], None] = lambda tokens, seconds: None,
    ) -> None:
        """`detokenizer` None: ids only, no text."""
        self.index = index
        self.request = request
        self.began = time.monotonic()
        self.tokens = 0
        self.finish: FinishReason | None = None
        self.error: JqserveError | None = None
        self.over = False  # `Finished` has been taken
        self.cached_tokens = 0  # of the prompt, found in the prefix cache
        self.prompt_logprobs: tuple[TokenLogprobs, ...] = ()  # of prompt[sampling.prompt_from:], when asked for
        self.first_seconds = 0.0
        self.since: float | None = None  # when the oldest token came that waits for others
        self._detokenizer = detokenizer
        self._stops = StopStrings(request.sampling.stop) if request.sampling.stop else None
        self._pace = pace
        self._wake, self._wait, self._stop, self._observe = wake, wait, stop, observe
        self._total_seconds = 0.0
        self._last_flush: float | None = None
        self._matched_stop: str | None = None
        self._matched_token: int | None = None
        self._ids: list[int] = []  # not yet sent
        self._logprobs: list[TokenLogprobs] = []
        self._undecoded: list[int] = []
        self._text: list[str] = []

    @property
    def pending(self) -> bool:
        """Something waits for a flush."""
        return bool(self._ids) or bool(self._text) or (self.finish is not None and not self.over)

    def push(self, event: StepEvent) -> None:
        if self.finish is not None:
            return
        first = not self.tokens
        if first and event.token_ids:
            self.first_seconds = time.monotonic() - self.began
        if event.prompt_logprobs:
            self.prompt_logprobs = event.prompt_logprobs
        if event.cached_tokens:
            self.cached_tokens = event.cached_tokens
        if self._stops is not None:
            self._push_watching(event)
        else:
            self._append(event.token_ids, event.logprobs)
        if event.finish is not None and self.finish is None:
            self._end(event)
        if self.finish is not None or (first and self._ids) or self._due():
            self._wake(self)
        elif self._ids:
            if self.since is None:
                self.since = time.monotonic()
            self._wait()

    def _due(self) -> bool:
        if len(self._ids) < self._pace.tokens:
            return False
        spacing = self._pace.spacing
        return not spacing or self._last_flush is None or time.monotonic() - self._last_flush >= spacing

    def fail(self, error: JqserveError | None) -> None:
        if self.finish is not None:
            return
        if error is None and self.tokens:
            error = EngineFailedError("the engine process died while this request was running")
        self.finish = FinishReason.ERROR
        self.error = error or EngineUnavailableError("the engine process died before this request began; try again")
        self._wake(self)

    def abort(self) -> None:
        """The Abort RPC: ends now, with what has been generated."""
        if self.finish is None:
            self._finish(FinishReason.ABORT)
            self._wake(self)

    def take(self) -> Delta | None:
        """Everything since the last call, or None when there is nothing."""
        self._decode()
        text = "".join(self._text)
        if not text and not self._ids:
            return None
        delta = Delta(self.index, text, tuple(self._ids), tuple(self._logprobs))
        if self._ids:
            last, self._last_flush = self._last_flush, time.monotonic()
            self._observe(len(self._ids), None if last is None else self._last_flush - last)
        self._ids, self._logprobs, self._text = [], [], []
        self.since = None
        return delta

    def result(self) -> Finished:
        """Once, after `finish` is set and the last delta is taken."""
        assert self.finish is not None
        self.over = True
        return Finished(
            self.index,
            self.finish,
            self.tokens,
            self.request.sampling.seed or 0,
            self.first_seconds,
            self._total_seconds,
            self._matched_stop,
            self._matched_token,
        )

    def _append(self, ids: tuple[int, ...], logprobs: tuple[TokenLogprobs, ...]) -> None:
        self.tokens += len(ids)
        self._ids += ids
        self._logprobs += logprobs
        self._undecoded += ids

    def _push_watching(self, event: StepEvent) -> None:
        """Token by token, so that the one that completes a stop string is the last one counted and sent."""
        stopping = event.matched_stop
        for i, token in enumerate(event.token_ids):
            self._append((token,), event.logprobs[i : i + 1])
            if stopping is not None and i == len(event.token_ids) - 1:
                self._undecoded.pop()  # its text is not output, so it cannot complete a stop string
                return
            self._decode()
            if self._matched_stop is not None:
                self._finish(FinishReason.STOP)
                if event.finish is None:
                    self._stop(self)
                return

    def _decode(self) -> None:
        if not self._undecoded or self._detokenizer is None:
            return
        text = self._detokenizer.feed(self._undecoded)
        self._undecoded = []
        if self._stops is not None and self.tokens >= self.request.sampling.min_new_tokens:
            text, self._matched_stop = self._stops.feed(text)
        if text:
            self._text.append(text)

    def _end(self, event: StepEvent) -> None:
        """The engine says that the sequence has ended."""
        assert event.finish is not None
        if event.finish is FinishReason.ERROR:
            failed = EngineFailedError(event.error or "the engine failed on this request")
            self.error = RequestError(event.field, event.error) if event.field else failed
        if event.matched_stop is not None:
            self._matched_token = event.matched_stop
            if self._undecoded and self._undecoded[-1] == event.matched_stop:
                self._undecoded.pop()  # the text of what stops a sequence is not part of it
        self._finish(event.finish)

    def _finish(self, reason: FinishReason) -> None:
        self._decode()
        if self._stops is not None and self._matched_stop is None and (held := self._stops.flush()):
            self._text.append(held)
        self.finish = reason
        self._total_seconds = time.monotonic() - self.began
