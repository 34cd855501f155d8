"""How request messages come in: a bounded number at once, the large ones one after the other.

gRPC reads a message into memory as fast as it comes once somebody asks for it; until then HTTP/2's windows hold it back
after some 64 KiB. So a message is only asked for when there is a place: as many as `BUDGET` holds of the largest size.
A sender who stalls keeps his place for `PATIENCE` seconds when others wait for one.

The core refuses a message larger than the limit only when it has all of it: 16 uploads of 64 MiB that stopped before
their end took 1 GB under a limit of 4 MiB. So the process's memory is looked at while messages come in, and one during
which it has grown by more than twice the budget is given up. Twice: messages of the right size, as bytes and parsed,
have taken more than once. What the core frees then lies scattered over the C library's arenas, which keep it: three
such attacks in a row left 570, 850 and 1,200 MB behind, so it is asked to give back what is free.

A large message is parsed and looked through (`sizes`) before the next one is: before this was so, 48 messages of 16 MiB
took the front end from 87 MB to 12 GB, for their parts, as Python objects, are ten times as large.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import ctypes
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc.aio

from jqserve.errors import QueueFullError, RequestTimeoutError

BUDGET = 256 * 2**20  # bytes of messages on their way in
LEAST_PLACES = 8
LARGE = 2**16  # bytes; a smaller message usually lies in HTTP/2's window before it is asked for
PATIENCE = 1.0  # seconds
MOST_SECONDS = 60.0  # that a message may take, whoever waits
LOOK = 0.02  # seconds from one look at the memory to the next; loopback brings some 20 MB meanwhile
GROWN = 2**26  # bytes that messages have added, from which on what they leave is given back
SETTLED = 1.0  # seconds after the last message, when the core has freed what it had of it
STATM = Path("/proc/self/statm")


class GoneError(Exception):
    """The caller hung up before his message was there, or it was larger than gRPC was told to take."""


def resident() -> int:
    """Bytes of this process in memory; 0 where there is no /proc, and then nothing is given up for its size."""
    with contextlib.suppress(OSError):
        return int(STATM.read_bytes().split()[1]) * resource.getpagesize()
    return 0


def give_back() -> None:
    """Has the C library return free memory to the system, where it can (glibc). Takes some ms without the GIL."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


class Receiving:
    """All on one event loop."""

    def __init__(
        self,
        most_bytes: int,
        budget: int = BUDGET,
        resident: Callable[[], int] = resident,
        give_back: Callable[[], None] = give_back,
    ) -> None:
        """`most_bytes`: of one message, which gRPC itself enforces once it has it. `resident`: bytes in memory;
        `give_back` is called on a thread when messages have taken much of it and are gone."""
        self.free = self.places = max(LEAST_PLACES, budget // most_bytes)
        self._most_growth = 2 * max(budget, LEAST_PLACES * most_bytes)
        self._resident, self._give_back = resident, give_back
        self._settling: asyncio.TimerHandle | None = None
        self._watch: asyncio.Task[None] | None = None
        self._size = 0  # what `resident` last said: asked for once a look, for it takes 50 us
        self._one_large = asyncio.Lock()
        self._reading: dict[asyncio.Timeout, tuple[float, int]] = {}  # -> when it began, and at how many bytes
        self._too_large: set[asyncio.Timeout] = set()
        self._waiting: collections.deque[asyncio.Future[None]] = collections.deque()

    async def receive[M](self, context: Any, parse: Callable[[bytes], M], look: Callable[[M], None]) -> M:
        """The call's message, parsed; a large one looked through. Raises what `parse` and `look` raise; `GoneError`;
        `QueueFullError` for one that stalls while others wait for its place; `RequestTimeoutError` for one that never
        ends."""
        await self._take_place()
        try:
            data = await self._read(context)
            if len(data) < LARGE:
                return parse(data)
            async with self._one_large:
                began = time.monotonic()
                try:
                    message = parse(data)
                    del data
                    look(message)
                    return message
                finally:  # 16 MiB take 0.1 s, in which nobody is served: the next one waits as long again
                    await asyncio.sleep(time.monotonic() - began)
        finally:
            self._give_place()

    async def _read(self, context: Any) -> bytes:
        clock = asyncio.get_running_loop().time
        began = clock()
        limit = asyncio.timeout_at(began + MOST_SECONDS)
        try:
            async with limit:
                if self._watch is None:
                    self._size = self._resident()
                    self._watch = asyncio.create_task(self._look())
                self._reading[limit] = (began, self._size)
                self._hurry()
                try:
                    data = await context.read()
                finally:
                    del self._reading[limit]
        except TimeoutError:
            if limit in self._too_large:
                raise QueueFullError(
                    f"messages of more than {self._most_growth >> 20} MiB together were on their way in; "
                    "send smaller ones, or fewer at once"
                ) from None
            if clock() - began < MOST_SECONDS:
                raise QueueFullError("the message came too slowly while others waited; try again later") from None
            raise RequestTimeoutError(f"the message did not come to its end in {MOST_SECONDS:g} s") from None
        finally:
            self._too_large.discard(limit)
        if data is grpc.aio.EOF:
            raise GoneError
        return data  # type: ignore[no-any-return]

    async def _take_place(self) -> None:
        if self.free:
            self.free -= 1
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        self._hurry()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._give_place()  # it had just become ours
            raise

    def _give_place(self) -> None:
        """To whoever has waited longest."""
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        self.free += 1

    def _hurry(self) -> None:
        """Those who have read longest, one for everybody who waits, have no more than PATIENCE."""
        for _, (limit, (began, _)) in zip(range(len(self._waiting)), self._reading.items()):
            when = limit.when()
            if not limit.expired() and (when is None or when > began + PATIENCE):
                limit.reschedule(began + PATIENCE)

    async def _look(self) -> None:
        """As long as anything is read. What came within one look is spared: it is most likely small."""
        clock = asyncio.get_running_loop().time
        least = most = self._size
        try:
            while self._reading:
                await asyncio.sleep(LOOK)
                now, self._size = clock(), self._resident()
                least, most = min(least, self._size), max(most, self._size)
                for limit, (began, before) in self._reading.items():
                    if self._size - before > self._most_growth and now - began >= LOOK and not limit.expired():
                        self._too_large.add(limit)
                        limit.reschedule(now)
        finally:
            self._watch = None
            if most - least > GROWN and self._settling is None:
                self._settling = asyncio.get_running_loop().call_later(SETTLED, self._settled)

    def _settled(self) -> None:
        self._settling = None
        asyncio.get_running_loop().run_in_executor(None, self._give_back)
