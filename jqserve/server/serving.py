"""One Generate call while it is answered: its writes, its limits, its end, and what is told of it."""

from __future__ import annotations

import asyncio
import logging
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any

from grpc.aio import ServicerContext

from jqserve.errors import JqserveError, RequestTimeoutError, UnreadStreamError
from jqserve.server.generation import Generation
from jqserve.server.sequence import Finished

if TYPE_CHECKING:
    from jqserve.server.frontend import Frontend

log = logging.getLogger("jqserve.requests")


class Serving:
    """Use it in a `with` around the iteration: it ends the generation, whatever happens.

    HTTP/2's flow control stops a writer only once the windows are full, but then for ever: `check`, called once in a
    while for every call, ends one whose write has waited too long, and one that takes longer than the server allows.
    """

    def __init__(self, frontend: Frontend, generation: Generation, context: ServicerContext) -> None:
        self.generation = generation
        self._frontend = frontend
        self._context = context
        self._began = time.monotonic()
        self._writing_since: float | None = None
        self._task = asyncio.current_task()
        self._error: JqserveError | None = None
        self._reasons: list[str] = []
        self._trace = frontend.tracer.start(context, generation) if frontend.tracer else None

    async def write(self, message: Any) -> None:
        self._writing_since = time.monotonic()
        await self._context.write(message)
        self._writing_since = None

    def finished(self, item: Finished) -> None:
        """One of the sequences has ended by itself."""
        self._reasons.append(item.reason.name.lower())
        self._frontend.metrics.finished(item, self.generation)

    def check(self, now: float, max_seconds: float, unread_seconds: float) -> None:
        """Ends the call when it is over one of the limits (seconds; 0: none)."""
        if self._error is not None:
            return
        if unread_seconds and self._writing_since is not None and now - self._writing_since > unread_seconds:
            self._error = UnreadStreamError(f"nobody has read this stream for {unread_seconds:g} s; it is cancelled")
            if self._task is not None:
                self._task.cancel()  # it waits in a write, which nothing else would end
        elif max_seconds and now - self._began > max_seconds:
            self._error = RequestTimeoutError(f"the request took longer than {max_seconds:g} s, this server's limit")
            self.generation.fail(self._error)
            if self._writing_since is not None and self._task is not None:
                self._task.cancel()

    def __enter__(self) -> Serving:
        self._frontend.servings.add(self)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        frontend, generation = self._frontend, self.generation
        frontend.servings.discard(self)
        frontend.finish(generation)
        outcome = ", ".join(self._reasons) or "cancelled"
        if self._error is not None:
            error = self._error
        if isinstance(error, Exception):
            outcome = f"{type(error).__name__}: {error}"
        tokens = sum(sequence.tokens for sequence in generation.sequences)
        frontend.metrics.ended(generation, tokens)
        if self._trace is not None:
            self._trace.end(generation, tokens, outcome, failed=isinstance(error, Exception))
        if frontend.config.log_requests:
            seconds = time.monotonic() - self._began
            request_id = generation.request_id
            log.info("%s: %d + %d tokens in %.3f s, %s", request_id, generation.prompt_tokens, tokens, seconds, outcome)
        if isinstance(self._error, JqserveError) and kind is asyncio.CancelledError:
            if self._task is not None:
                self._task.uncancel()
            raise self._error
