"""The front end's end of the link to the engine: requests down, and each step's events to their sequences."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from jqserve.engine import wire
from jqserve.engine.request import EngineRequest, EngineStats, SamplingParams, StepEvent
from jqserve.errors import (
    EngineUnavailableError,
    JqserveError,
    PreconditionError,
    QueueFullError,
    RequestError,
    UnsupportedError,
)

SAMPLING_FIELDS = SamplingParams.__dataclass_fields__.keys()

log = logging.getLogger("jqserve.server")


class Sink(Protocol):
    """One sequence's receiver. Neither method may block or raise."""

    def push(self, event: StepEvent) -> None: ...

    def fail(self, error: JqserveError | None) -> None:
        """`error` None: the engine is gone."""


class EngineLink(asyncio.Protocol):
    """Requests down, events up. Everything here runs on the event loop's thread.

    `ready` resolves to `Ready.info`, or raises the engine's own error, or `EngineUnavailableError` if it died. `closed`
    resolves (to why) when the link is down, whoever closed it; every sequence that was running has then been failed.
    """

    def __init__(self, on_progress: Callable[[wire.Progress], None] = lambda _: None) -> None:
        loop = asyncio.get_running_loop()
        self.ready: asyncio.Future[dict[str, Any]] = loop.create_future()
        self.closed: asyncio.Future[str] = loop.create_future()
        self.stats = EngineStats()
        self._on_progress = on_progress
        self._sinks: dict[int, Sink] = {}
        self._asked: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._questions = itertools.count()
        self._decoder = wire.Decoder()
        self._transport: asyncio.WriteTransport | None = None
        self._reason = ""

    @property
    def live(self) -> int:
        """Sequences that the engine has and the front end still wants."""
        return len(self._sinks)

    @property
    def up(self) -> bool:
        return self._transport is not None and not self.closed.done()

    def configure(self, config: dict[str, Any]) -> None:
        """Must be the first message."""
        self._send(wire.Configure(config))

    def add(self, request: EngineRequest, sink: Sink) -> None:
        """Raises `EngineUnavailableError` when the link is down. What the engine refuses comes to `sink.fail`."""
        if not self.up:
            raise EngineUnavailableError(f"the engine is gone: {self._reason}")
        self._send(wire.Add(request))
        self._sinks[request.rid] = sink

    def abort(self, rids: Iterable[int], *, stopped: bool = False) -> None:
        """Forgets the sequences and frees their slots. Ids that have finished are ignored. `stopped`: a stop string has
        ended their answers, which tells the engine how long answers are."""
        live = tuple(rid for rid in rids if self._sinks.pop(rid, None) is not None)
        if live and self.up:
            self._send(wire.Abort(live, stopped))

    async def ask(self, verb: str) -> dict[str, Any]:
        """What the engine does for an operator (`wire.Ask`). Raises `PreconditionError`, `EngineUnavailableError`."""
        if not self.up:
            raise EngineUnavailableError(f"the engine is gone: {self._reason}")
        number = next(self._questions)
        answer = self._asked[number] = asyncio.get_running_loop().create_future()
        self._send(wire.Ask(number, verb))
        try:
            return await answer
        finally:
            self._asked.pop(number, None)

    def close(self) -> None:
        """Ends the session; the engine exits."""
        if self._transport is not None:
            self._transport.close()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        try:
            for message in self._decoder.feed(data):
                self._receive(message)
        except wire.WireError as error:
            log.error("the engine's messages cannot be read: %s", error)
            self._reason = str(error)
            self.close()

    def connection_lost(self, error: Exception | None) -> None:
        reason = self._reason or "the engine process ended"
        self._reason = reason
        if not self.closed.done():
            self.closed.set_result(reason)
        if not self.ready.done():
            self.ready.set_exception(EngineUnavailableError(reason))
            self.ready.exception()  # whoever waits sees it; nobody has to
        for answer in self._asked.values():
            if not answer.done():
                answer.set_exception(EngineUnavailableError(f"the engine is gone: {reason}"))
        sinks, self._sinks = self._sinks, {}
        for sink in sinks.values():
            sink.fail(None)

    def _send(self, message: wire.Message) -> None:
        assert self._transport is not None
        self._transport.write(wire.encode(message))

    def _receive(self, message: wire.Message) -> None:
        if isinstance(message, wire.Step):
            if message.stats is not None:
                self.stats = message.stats
            for event in message.events:
                # An event for a sequence that was aborted meanwhile finds no sink.
                sink = self._sinks.get(event.rid) if event.finish is None else self._sinks.pop(event.rid, None)
                if sink is not None:
                    sink.push(event)
        elif isinstance(message, wire.Rejected):
            sink = self._sinks.pop(message.rid, None)
            if sink is not None:
                sink.fail(rejection(message))
        elif isinstance(message, wire.Answer):
            answer = self._asked.get(message.number)
            if answer is not None and not answer.done():
                if message.error:
                    answer.set_exception(PreconditionError(message.error))
                else:
                    answer.set_result(message.result)
        elif isinstance(message, wire.Progress):
            self._on_progress(message)
        elif isinstance(message, wire.Ready):
            if not self.ready.done():
                self.ready.set_result(message.info)
        elif isinstance(message, wire.Failed):
            self._reason = message.message
            if not self.ready.done():
                error = UnsupportedError if message.user else EngineUnavailableError
                self.ready.set_exception(error(message.message))
                self.ready.exception()
        else:
            raise wire.WireError(f"the engine sent a {type(message).__name__}, which only the front end sends")


def rejection(message: wire.Rejected) -> JqserveError:
    """The error that the engine raised when it refused a request."""
    if message.code == "request":
        field = message.field or "request"
        text = message.message.removeprefix(f"{field}: ")
        return RequestError(f"sampling.{field}" if field in SAMPLING_FIELDS else field, text)
    return QueueFullError(message.message) if message.code == "queue_full" else EngineUnavailableError(message.message)
