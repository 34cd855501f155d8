"""One Generate call: its n sequences, and the stream of what they give."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence

from jqserve.engine.request import EngineRequest, FinishReason
from jqserve.errors import JqserveError
from jqserve.server.detokenize import Detokenizer
from jqserve.server.link import EngineLink
from jqserve.server.pace import Pace
from jqserve.server.sequence import Delta, Finished
from jqserve.server.sequence import Sequence as RunningSequence

SOON = 0.002  # seconds: not worth another timer


class Generation:
    """Runs `requests` (the n copies) through the link. Iterate it once; `close` in a finally."""

    def __init__(
        self,
        request_id: str,
        requests: Sequence[EngineRequest],
        link: EngineLink,
        make_detokenizer: Callable[[], Detokenizer | None],
        pace: Pace,
        *,
        observe: Callable[[int, float | None], None] = lambda tokens, seconds: None,
        scored: bool = False,
    ) -> None:
        """`observe` is told of every flush: its tokens, and the seconds since the one before it (None: the first).
        `scored`: it is a sequence of a Score call."""
        self.request_id = request_id
        self.scored = scored
        self.prompt_tokens = len(requests[0].prompt)
        self._link = link
        self._pace = pace
        self._due: set[RunningSequence] = set()
        self._wake_up = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self.sequences = [
            RunningSequence(
                index,
                request,
                detokenizer=make_detokenizer(),
                pace=pace,
                wake=self._wake,
                wait=self._start_timer,
                stop=lambda sequence: link.abort((sequence.request.rid,), stopped=True),
                observe=observe,
            )
            for index, request in enumerate(requests)
        ]

    def start(self) -> None:
        """Sends the sequences to the engine. Raises `EngineUnavailableError`."""
        for sequence in self.sequences:
            self._link.add(sequence.request, sequence)

    async def __aiter__(self) -> AsyncIterator[Delta | Finished]:
        """Deltas and one Finished per sequence. Raises the first sequence's error that comes."""
        running = len(self.sequences)
        while running:
            await self._wake_up.wait()
            self._wake_up.clear()
            due, self._due = self._due, set()
            for sequence in sorted(due, key=lambda s: s.index):
                if sequence.over:
                    continue
                ended = sequence.finish is not None  # before the yield: what is pushed meanwhile is the next turn's
                if (delta := sequence.take()) is not None:
                    yield delta
                if ended:
                    if sequence.finish is FinishReason.ERROR:
                        raise sequence.error or JqserveError("the engine failed")
                    running -= 1
                    yield sequence.result()

    def abort(self) -> None:
        """Ends every sequence now, as FinishReason.ABORT; the iteration still delivers what there is."""
        self._link.abort(sequence.request.rid for sequence in self.sequences)
        for sequence in self.sequences:
            sequence.abort()

    def fail(self, error: JqserveError) -> None:
        """Ends every sequence now with an error."""
        self._link.abort(sequence.request.rid for sequence in self.sequences)
        for sequence in self.sequences:
            sequence.fail(error)

    def close(self) -> None:
        """Frees the slots of whatever still runs: the caller is gone, or has all it wanted."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._link.abort(sequence.request.rid for sequence in self.sequences)

    def _wake(self, sequence: RunningSequence) -> None:
        self._due.add(sequence)
        self._wake_up.set()

    def _start_timer(self) -> None:
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._pace.seconds, self._flush_all)

    def _flush_all(self) -> None:
        """Those whose tokens have waited for long enough; the others' are left to become a message of their own."""
        self._timer = None
        seconds, now, rest = self._pace.seconds, time.monotonic(), float("inf")
        for sequence in self.sequences:
            if sequence.pending:
                left = (sequence.since or 0.0) + seconds - now
                if left < SOON:
                    self._due.add(sequence)
                else:
                    rest = min(rest, left)
        if rest < seconds + SOON:
            self._timer = asyncio.get_running_loop().call_later(rest, self._flush_all)
        if self._due:
            self._wake_up.set()
