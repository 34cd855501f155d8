"""Starts the engine at the other end of a socket pair: a process of its own, or a thread of this one."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence

from jqserve.engine import wire
from jqserve.engine.channel import Channel
from jqserve.server.link import EngineLink

log = logging.getLogger("jqserve.server")

ENGINE_COMMAND = (sys.executable, "-m", "jqserve.engine.process", "--fd")  # the descriptor's number follows
OnProgress = Callable[[wire.Progress], None]


class RunningEngine:
    """An engine and the link to it."""

    def __init__(self, link: EngineLink, process: subprocess.Popen[bytes] | None) -> None:
        self.link = link
        self._process = process
        self.pid = process.pid if process else 0

    async def stop(self, timeout: float = 10.0) -> None:
        """Closes the link, upon which the engine exits; after `timeout` seconds it is killed."""
        self.link.close()
        if self._process is None:
            return
        try:
            await asyncio.to_thread(self._process.wait, timeout)
        except subprocess.TimeoutExpired:
            log.warning("the engine process %d did not exit in %g s; killing it", self.pid, timeout)
            self._process.kill()
            await asyncio.to_thread(self._process.wait)

    async def how_it_ended(self) -> str:
        """The exit status in words, for the log."""
        if self._process is None:
            return "the engine thread ended"
        try:
            code = await asyncio.to_thread(self._process.wait, 5.0)
        except subprocess.TimeoutExpired:
            return "it closed its link but still runs"
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"


Launch = Callable[[OnProgress], Awaitable[RunningEngine]]  # one of the functions below, its options filled in


async def _connect(ours: socket.socket, on_progress: OnProgress) -> EngineLink:
    ours.setblocking(False)
    _, link = await asyncio.get_running_loop().create_unix_connection(lambda: EngineLink(on_progress), sock=ours)
    return link


async def launch_process(
    on_progress: OnProgress,
    *,
    command: Sequence[str] = ENGINE_COMMAND,
    environment: Mapping[str, str] | None = None,
) -> RunningEngine:
    """The engine in a child process. `environment`: variables to set (or, when empty, to unset) for it.

    The child is in a session of its own, so that a Ctrl-C in the terminal reaches only the front end, which drains.
    Its standard output goes to our standard error.
    """
    ours, theirs = socket.socketpair()
    variables = {**os.environ, **(environment or {})}
    with theirs:
        process = subprocess.Popen(
            [*command, str(theirs.fileno())],
            pass_fds=(theirs.fileno(),),
            stdin=subprocess.DEVNULL,
            stdout=2,
            start_new_session=True,
            env={name: value for name, value in variables.items() if value},
        )
    link = await _connect(ours, on_progress)
    loop = asyncio.get_running_loop()

    def watch() -> None:
        # The socket's end says the same sooner; this also covers a descriptor that leaked to a child of the engine.
        process.wait()
        with contextlib.suppress(RuntimeError):  # the loop is closed: we are exiting ourselves
            loop.call_soon_threadsafe(loop.call_later, 1.0, link.close)

    threading.Thread(target=watch, name="engine-watch", daemon=True).start()
    return RunningEngine(link, process)


async def launch_thread(on_progress: OnProgress, *, serve: Callable[[Channel], object]) -> RunningEngine:
    """The engine in a thread of this process: `serve` runs until its channel ends. For tests and debugging."""
    ours, theirs = socket.socketpair()
    channel = Channel(theirs)

    def run() -> None:
        try:
            serve(channel)
        except EOFError:
            pass
        except Exception:
            log.exception("the engine thread failed")
        finally:
            channel.close()

    link = await _connect(ours, on_progress)
    threading.Thread(target=run, name="engine", daemon=True).start()
    return RunningEngine(link, None)
