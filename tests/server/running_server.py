"""A server on an event loop of its own thread, with the fake engine in another: starts in milliseconds."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import threading
from collections.abc import Iterator
from pathlib import Path

from jqserve.client import Client
from jqserve.server.app import Server
from jqserve.server.config import ServerConfig
from jqserve.server.launch import Launch, launch_thread
from tests.server import fake_engine

DEMO = Path(__file__).resolve().parents[2] / "jqserve" / "demo" / "model"
LAUNCH_FAKE: Launch = functools.partial(launch_thread, serve=fake_engine.serve)


class Running:
    """`server` until `stop`, which drains it; `code` is then what `run` returned."""

    def __init__(self, config: ServerConfig, launch: Launch = LAUNCH_FAKE, *, wait: bool = True) -> None:
        self.announced: list[str] = []
        self.code: int | None = None
        self.ready = threading.Event()
        self.over = threading.Event()
        self.loop = asyncio.new_event_loop()
        self.server = Server(
            config, launch, announce=self.announced.append, on_ready=lambda port: self.ready.set()
        )  # fmt: skip
        threading.Thread(target=self._run, name="test-server", daemon=True).start()
        if wait:
            assert self.ready.wait(60), self.announced

    def _run(self) -> None:
        try:
            self.code = self.loop.run_until_complete(self.server.run(handle_signals=False))
        finally:
            self.loop.close()
            self.over.set()

    @property
    def target(self) -> str:
        if self.server.config.unix_socket:
            return f"unix:{self.server.config.unix_socket}"
        return f"127.0.0.1:{self.server.port}"

    def drain(self) -> None:
        with contextlib.suppress(RuntimeError):  # it is over already
            self.loop.call_soon_threadsafe(self.server.drain)

    def stop(self) -> int | None:
        self.drain()
        assert self.over.wait(30), "the server did not stop"
        return self.code


@contextlib.contextmanager
def running_server(config: ServerConfig, launch: Launch = LAUNCH_FAKE) -> Iterator[tuple[Running, Client]]:
    running = Running(config, launch)
    try:
        with Client(running.target) as client:
            yield running, client
    finally:
        running.drain()
        running.drain()  # whatever still runs is ended
        running.over.wait(30)
