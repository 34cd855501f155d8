"""The engine's end of the link to the front end: a blocking socket that speaks `wire`.

The engine process (`jqserve.engine.process`) is expected to do this:

    channel = Channel.from_fd(fd)        # or Channel(sock), when it is a thread of the front end (--frontend inline)
    channel.exit_on_hangup()             # process only: the front end's death ends us, even inside a long compilation
    configure = channel.receive()[0]     # wire.Configure
    ... load and warm up: wire.Progress("forecast", table, {"rows": [...]}), ("load", "12/42 model.layers.3.mlp"), ...
    ... on JqserveError: wire.Failed(str(error), user=True), exit 2; on anything else: user=False, exit 1
    channel.send(wire.Ready(engine.model_info()))
    while True:
        messages = channel.receive(timeout=0 if engine.has_work() else None)   # EOFError: the front end is gone, leave
        for message in messages:
            wire.Add   -> engine.add(message.request), or on RequestError / QueueFullError / EngineUnavailableError
                          channel.send(wire.Rejected(rid, "request" | "queue_full" | "unavailable", text, field))
            wire.Abort -> engine.abort(rid, stopped=message.stopped) for each; no answer; an event for it that is
                          already packed does no harm
        events = engine.step()
        channel.send(wire.Step(tuple(events), stats))      # one message a step, after the next step is dispatched

`Ready.info` is JSON; the front end reads these keys of it: model_path, architecture, model_type, vocab_size,
context_length (tokens of prompt and answer together), max_running_requests, max_queued, eos_token_ids,
sampling_defaults (non-default fields of SamplingParams from generation_config.json), quantization (text), dtype,
plan (rows of LoadPlan.to_json()), kv {dtype, page_size, pages, bytes, tokens}, device, load_seconds, warmup_seconds.
Everything that is missing is shown as unknown; everything else in it is passed on in GetServerInfo's JSON.

A drain is the front end's business: it stops adding, waits for its streams, and closes the link.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import threading
from collections.abc import Callable

from jqserve.engine.wire import Decoder, Message, encode

SEND_BUFFER = 4 * 2**20  # bytes: a front end that is busy for a second does not make a step wait
READ_SIZE = 2**18


class Channel:
    """Sends and receives messages on a connected stream socket. One reader thread and one writer thread at a time."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(True)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        self._sock = sock
        self._decoder = Decoder()

    @classmethod
    def from_fd(cls, fd: int) -> Channel:
        """Takes over an inherited descriptor; programs that this process starts (ptxas) do not inherit it again."""
        os.set_inheritable(fd, False)
        return cls(socket.socket(fileno=fd))

    def send(self, message: Message) -> None:
        """Raises EOFError when the other side is gone."""
        try:
            self._sock.sendall(encode(message))
        except OSError as error:
            raise EOFError("the front end closed the link") from error

    def receive(self, timeout: float | None = None) -> list[Message]:
        """Every message that has arrived, in order. Waits up to `timeout` seconds (None: for ever) for the first one.

        Empty when the time is up. Raises EOFError when the other side is gone, `wire.WireError` for a broken stream.
        """
        messages: list[Message] = []
        wait = timeout
        while select.select([self._sock], [], [], wait)[0]:
            try:
                data = self._sock.recv(READ_SIZE)
            except OSError as error:
                raise EOFError("the front end closed the link") from error
            if not data:
                if messages:
                    break  # deliver what came before the end; the next call meets it again
                raise EOFError("the front end closed the link")
            messages += self._decoder.feed(data)
            wait = 0 if messages else timeout
        return messages

    def on_hangup(self, action: Callable[[], None]) -> None:
        """Calls `action` from a daemon thread as soon as the other side is gone, whatever this process is doing."""

        def watch() -> None:
            poll = select.poll()
            poll.register(self._sock, select.POLLRDHUP | select.POLLHUP | select.POLLERR)
            poll.poll()
            action()

        threading.Thread(target=watch, name="link-watch", daemon=True).start()

    def exit_on_hangup(self, code: int = 0) -> None:
        """Ends this process as soon as the other side is gone, and not before: it is the front end that drains.

        SIGTERM and SIGINT, which a service manager or a terminal may send to both processes, are therefore ignored.
        """
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        self.on_hangup(lambda: os._exit(code))

    def close(self) -> None:
        self._sock.close()
