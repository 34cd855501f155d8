"""Places for messages on their way in, with calls that answer when the test says so."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import grpc.aio
import pytest

from jqserve.errors import JqserveError, QueueFullError, RequestError, RequestTimeoutError
from jqserve.server import receive
from jqserve.server.pb import jqserve_pb2 as pb
from jqserve.server.pb import vllm_engine_pb2 as vll
from jqserve.server.receive import LARGE, GoneError, Receiving
from jqserve.server.sizes import LEAST_IDS, MAX_ENTRIES, check_sizes


class Call:
    """A servicer context whose message comes when `come` is set."""

    reading = 0

    def __init__(self, data: Any = b"x") -> None:
        self.data, self.come = data, asyncio.Event()

    async def read(self) -> Any:
        Call.reading += 1
        try:
            await self.come.wait()
        finally:
            Call.reading -= 1
        return self.data


def ready(data: Any = b"x") -> Call:
    call = Call(data)
    call.come.set()
    return call


async def start(receiving: Receiving, call: Call) -> asyncio.Task[Any]:
    task = asyncio.create_task(receiving.receive(call, bytes, lambda message: None))
    await asyncio.sleep(0)
    return task


def test_only_so_many_are_read_at_once() -> None:
    async def run() -> None:
        receiving = Receiving(2**20, 8 * 2**20)
        calls = [Call(bytes([i])) for i in range(20)]
        tasks = [await start(receiving, call) for call in calls]
        assert Call.reading == receiving.places == 8
        for call in calls:
            call.come.set()
        assert [await task for task in tasks] == [bytes([i]) for i in range(20)]
        assert receiving.free == 8

    asyncio.run(run())


def test_who_stalls_gives_way_only_when_somebody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(receive, "PATIENCE", 0.05)

    async def run() -> None:
        receiving = Receiving(2**20, 0)
        stalled = [await start(receiving, Call()) for _ in range(receiving.places)]
        await asyncio.sleep(0.2)
        assert not any(task.done() for task in stalled)
        assert await asyncio.wait_for(receiving.receive(ready(), bytes, lambda message: None), 1) == b"x"
        assert [task.done() for task in stalled] == [True] + [False] * (receiving.places - 1)
        with pytest.raises(QueueFullError, match="too slowly"):
            await stalled[0]
        for task in stalled[1:]:
            task.cancel()
        await asyncio.gather(*stalled, return_exceptions=True)
        assert receiving.free == receiving.places

    asyncio.run(run())


def test_a_message_that_never_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(receive, "MOST_SECONDS", 0.05)

    async def run() -> None:
        receiving = Receiving(2**20)
        with pytest.raises(RequestTimeoutError):
            await receiving.receive(Call(), bytes, lambda message: None)
        with pytest.raises(GoneError):
            await receiving.receive(ready(grpc.aio.EOF), bytes, lambda message: None)
        assert receiving.free == receiving.places

    asyncio.run(run())


def test_a_caller_who_leaves_the_queue_takes_no_place_along() -> None:
    async def run() -> None:
        receiving = Receiving(2**20, 0)
        calls = [Call() for _ in range(receiving.places)]
        tasks = [await start(receiving, call) for call in calls]
        waiting = [await start(receiving, ready()) for _ in range(3)]
        waiting[0].cancel()
        await asyncio.sleep(0)
        calls[0].come.set()  # its place is given to the second; the third then has the second's
        assert await waiting[1] == await waiting[2] == b"x"
        for call in calls:
            call.come.set()
        await asyncio.gather(*tasks)
        assert receiving.free == receiving.places

    asyncio.run(run())


def test_messages_that_fill_the_memory_are_given_up() -> None:
    """Those during which it grew by more than the budget, and not the one that began when it was full already."""

    async def run() -> None:
        megabytes = [100]
        receiving = Receiving(2**20, 32 * 2**20, lambda: megabytes[0] * 2**20)
        large = [await start(receiving, Call()) for _ in range(3)]
        await asyncio.sleep(3 * receive.LOOK)
        assert not any(task.done() for task in large)
        megabytes[0] += 65
        later = Call()
        small = await start(receiving, later)
        for task in large:
            with pytest.raises(QueueFullError, match="64 MiB together"):
                await asyncio.wait_for(task, 10)
        later.come.set()
        assert await asyncio.wait_for(small, 10) == b"x"
        assert receiving.free == receiving.places
        megabytes[0] += 65  # nobody reads: the watch has ended, and begins again with the next one
        assert await receiving.receive(ready(), bytes, lambda message: None) == b"x"

    asyncio.run(run())


def test_what_large_messages_leave_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once, after the last of them; not what small ones leave."""
    monkeypatch.setattr(receive, "SETTLED", 0.01)

    async def run() -> None:
        megabytes, given = [100], []
        receiving = Receiving(2**20, 2**30, lambda: megabytes[0] * 2**20, lambda: given.append(megabytes[0]))
        for size, wanted in ((10, []), (65, [100])):
            calls = [Call() for _ in range(3)]
            tasks = [await start(receiving, call) for call in calls]
            megabytes[0] += size
            await asyncio.sleep(3 * receive.LOOK)
            for call in calls:
                call.come.set()
            await asyncio.gather(*tasks)
            megabytes[0] = 100
            await asyncio.sleep(3 * receive.LOOK + 0.1)
            assert given == wanted

    asyncio.run(run())


def test_memory_is_really_given_back() -> None:
    """Blocks too small for a mapping of their own, below one that stays: free, and the system's again."""
    blocks = [bytearray(2**16) for _ in range(2048)]
    kept = bytearray(2**16)
    full = receive.resident()
    del blocks
    receive.give_back()
    assert not full or full - receive.resident() > 2**26
    assert kept is not None


def test_large_messages_are_looked_through_and_small_ones_are_not() -> None:
    async def run() -> None:
        receiving, seen = Receiving(2**20), []
        for size in (LARGE - 1, LARGE):
            await receiving.receive(ready(bytes(size)), len, seen.append)
        assert seen == [LARGE]

        def refuse(message: int) -> None:
            raise RequestError("request", "no")

        with pytest.raises(JqserveError):
            await receiving.receive(ready(bytes(LARGE)), len, refuse)
        assert receiving.free == receiving.places

    asyncio.run(run())


def native(**fields: Any) -> Callable[[], Any]:
    return lambda: pb.GenerateRequest(**fields)


def sampling(**fields: Any) -> Callable[[], Any]:
    return native(sampling=pb.SamplingParams(**fields))


MANY = MAX_ENTRIES + 1


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (native(token_ids=pb.TokenIds(ids=[5] * (LEAST_IDS + 1))), "token_ids.ids"),
        (sampling(stop=["a"] * MANY), "sampling.stop"),
        (sampling(stop=["a" * 5000]), "sampling.stop"),
        (sampling(stop_token_ids=[1] * MANY), "sampling.stop_token_ids"),
        (sampling(logit_bias=dict.fromkeys(range(MANY), 1.0)), "sampling.logit_bias"),
        (native(model="m" * 5000), "model"),
        (native(text="x" * 2000), "text"),
        (native(chat=pb.Chat(messages=[pb.ChatMessage(role="user", content="x" * 2000)])), "chat.messages.content"),
        (native(choice=pb.Choice(options=["a"] * MANY)), "choice.options"),
        (lambda: pb.ScoreRequest(inputs=[pb.ScoreInput()] * MANY), "inputs"),
        (lambda: vll.AbortRequest(request_ids=["x"] * MANY), "request_ids"),
        (lambda: pb.GenerateRequest.FromString(b"\x9a\x3f\x00" * 9), "request"),
    ],
)
def test_parts_that_are_too_large(make: Callable[[], Any], field: str) -> None:
    with pytest.raises(RequestError) as caught:
        check_sizes(make(), 512, 1000)
    assert caught.value.field == field


def test_what_may_be_meant_passes() -> None:
    whole = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[70_000] * 100_000))
    whole.sampling.CopyFrom(pb.SamplingParams(stop=["a"] * 32, logit_bias={5: 1.0}, temperature=1.0))
    check_sizes(whole, 131_072, 1000)
    check_sizes(pb.GenerateRequest(text="x" * 1000, json_schema="{}"), 512, 1000)
    check_sizes(pb.ScoreRequest(inputs=[pb.ScoreInput(token_ids=pb.TokenIds(ids=[1, 2]))] * 64), 512, 1000)
