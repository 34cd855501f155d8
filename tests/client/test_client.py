"""The two clients against a server with the echoing engine."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import grpc
import pytest

from jqserve.client import AsyncClient, Client, ServerError
from jqserve.client.requests import generate_request, score_request
from jqserve.client.result import Result
from jqserve.errors import UnsupportedError
from jqserve.server.config import ServerConfig
from jqserve.server.pb import jqserve_pb2 as pb
from tests.server.fake_engine import SLOW, STUCK
from tests.server.running_server import DEMO, running_server


@pytest.fixture(scope="module")
def target() -> Iterator[str]:
    with running_server(ServerConfig(str(DEMO), port=0)) as (running, _):
        yield running.target


@pytest.fixture
def client(target: str) -> Iterator[Client]:
    with Client(target) as client:
        yield client


IDS = [656, 904, 1903]  # "one two three"


def test_iterating_gives_text_and_the_result_gathers_it(client: Client) -> None:
    stream = client.generate(IDS, max_new_tokens=9, flush_tokens=1, seed=1)
    pieces = list(stream)
    assert "".join(pieces) == stream.result.text and len(pieces) > 1
    assert stream.result.finish_reason == "length" and stream.result.completion_tokens == 9


def test_the_result_says_what_was_in_the_prefix_cache() -> None:
    result = Result()
    result.add(pb.GenerateResponse(started=pb.Started(request_id="a", prompt_tokens=9, cached_tokens=4)))
    assert (result.request_id, result.prompt_tokens, result.cached_tokens) == ("a", 9, 4)


def test_leaving_a_with_block_cancels(client: Client) -> None:
    with client.generate(IDS, max_new_tokens=500, seed=SLOW) as stream:
        next(iter(stream))
    with pytest.raises(ServerError, match="CANCELLED"):
        stream.wait()


def test_errors_carry_code_and_field(client: Client) -> None:
    with pytest.raises(ServerError) as caught:
        client.generate(IDS, n=0).wait()
    assert (caught.value.code, caught.value.field) == (grpc.StatusCode.INVALID_ARGUMENT, "sampling.n")
    with Client("127.0.0.1:1") as nobody, pytest.raises(ServerError) as caught:
        nobody.server_info(timeout=5)
    assert caught.value.code is grpc.StatusCode.UNAVAILABLE


def test_a_proxy_is_not_asked_for_this_machine(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "grpc_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")  # nothing listens there
    for same in (target, target.replace("127.0.0.1", "localhost")):
        with Client(same) as client:
            assert client.server_info(timeout=10).state == pb.SERVER_STATE_READY

    async def ask() -> int:
        async with AsyncClient(target) as client:
            return (await client.server_info(timeout=10)).state

    assert asyncio.run(ask()) == pb.SERVER_STATE_READY


def test_one_client_for_many_threads(client: Client) -> None:
    results: list[list[int]] = []
    threads = [
        threading.Thread(target=lambda: results.append(client.generate(IDS, max_new_tokens=6, seed=1).wait().token_ids))
        for _ in range(16)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert results == [IDS * 2] * 16


def test_asyncio_client(target: str) -> None:
    async def run() -> None:
        async with AsyncClient(target) as client:
            streams = [client.generate(IDS, max_new_tokens=3 * i, seed=i) for i in range(1, 9)]
            results = await asyncio.gather(*(stream.wait() for stream in streams))
            assert [r.token_ids for r in results] == [IDS * i for i in range(1, 9)]
            text = "".join([piece async for piece in client.generate(IDS, max_new_tokens=3, seed=1)])
            assert text == await client.detokenize(IDS)
            assert await client.tokenize(text) == [1, *IDS]
            assert (await client.model_info()).vocab_size == 4096
            assert (await client.server_info()).state == pb.SERVER_STATE_READY
            assert not await client.abort("nobody")

            stream = client.generate(IDS, max_new_tokens=500, seed=SLOW, request_id="a")
            async for _ in stream:
                stream.cancel()
                break
            with pytest.raises(ServerError, match="CANCELLED"):
                await stream.wait()
            with pytest.raises(ServerError, match="n: is 0"):
                await client.generate(IDS, n=0).wait()

            # Cancelling the task that reads cancels the call with it.
            task = asyncio.create_task(client.generate(IDS, max_new_tokens=9, seed=STUCK, request_id="stuck").wait())
            while not (await client.server_info()).load.running:
                await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            while (await client.server_info()).load.running:
                await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(run(), 30))


def test_requests_say_what_was_meant() -> None:
    request = generate_request("hi", stop="x", temperature=0, logit_bias={5: 1.5}, n=2, output="text", flush_tokens=1)
    assert request.text == "hi" and request.sampling.stop == ["x"] and request.sampling.HasField("temperature")
    assert request.sampling.logit_bias[5] == 1.5 and request.output == pb.OUTPUT_TEXT
    plain = generate_request([{"role": "user", "content": "x"}], template_kwargs={"a": 1}, max_new_tokens=None)  # type: ignore[typeddict-item]
    assert plain.chat.messages[0].content == "x" and plain.chat.template_kwargs_json == '{"a": 1}'
    assert not plain.sampling.HasField("max_new_tokens")
    rich = generate_request([{"role": "user", "content": "x", "name": "y"}])
    assert not rich.chat.messages and '"name": "y"' in rich.chat.messages_json
    assert generate_request([]).WhichOneof("prompt") == "token_ids"


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"max_tokens": 1}, TypeError, "unknown option: max_tokens; there are max_new_tokens, .*ebnf"),
        ({"output": "x"}, ValueError, "output is 'x'"),
        ({"tools": []}, TypeError, "tools: only for a prompt of chat messages"),
        ({"temperature": 1, "seed": -1}, ValueError, "seed=-1: Value out of range"),
        ({"seed": 1, "temperature": "hot"}, TypeError, "temperature='hot': "),
        ({"flush_ms": -1}, ValueError, "flush_ms=-1: "),
    ],
)
def test_bad_arguments_raise_here(options: dict[str, object], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        generate_request("hi", **options)  # type: ignore[arg-type]


def test_the_letters_of_one_text_are_not_scored() -> None:
    with pytest.raises(TypeError, match=r"found one text; give a list of them: \['hello'\]"):
        score_request("hello")


@pytest.mark.parametrize("target", ["grpc://127.0.0.1:30000", "http://127.0.0.1:30000", "127.0.0.1", "::1:30000"])
def test_what_is_no_target(target: str) -> None:
    """gRPC takes a URL for the name of a host, and port 443 where there is none."""
    with pytest.raises(UnsupportedError, match="is no target: expected host:port or unix:/path"):
        Client(target)

    async def connect() -> None:
        AsyncClient(target)

    with pytest.raises(UnsupportedError, match="is no target"):
        asyncio.run(connect())
