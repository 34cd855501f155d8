"""The asyncio client."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from types import TracebackType
from typing import Any, Unpack

import grpc
import grpc.aio

from jqserve.client.connection import Tls, channel_options, check_target, metadata
from jqserve.client.errors import ServerError, from_rpc
from jqserve.client.requests import (
    Messages,
    Options,
    Prompt,
    generate_request,
    score_request,
    tokenize_request,
)
from jqserve.client.result import Event, Result
from jqserve.server.pb import jqserve_pb2 as pb
from jqserve.server.pb import jqserve_pb2_grpc


class AsyncStream:
    """A running request. Iterate it for the text as it comes (of choice 0; `events` for all n), or await `wait`.

    Leaving the iteration early does not stop the server: `cancel` does, and so does leaving an `async with` block.
    """

    def __init__(self, call: Any) -> None:
        self._call = call
        self.result = Result()  # grows as the stream is read

    async def events(self) -> AsyncIterator[Event]:
        """Everything, of every choice. Raises `ServerError`."""
        try:
            async for response in self._call:
                if (event := self.result.add(response)) is not None:
                    yield event
        except grpc.RpcError as error:
            raise from_rpc(error) from error
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise  # the reader's own task; grpc has cancelled the call with it
            raise ServerError(grpc.StatusCode.CANCELLED, "cancelled by this client") from None

    async def __aiter__(self) -> AsyncIterator[str]:
        async for event in self.events():
            if event.index == 0 and event.text:
                yield event.text

    async def wait(self) -> Result:
        """Reads to the end."""
        async for _ in self.events():
            pass
        return self.result

    def cancel(self) -> None:
        """Frees the server's slots at once. The iteration then raises `ServerError` (CANCELLED)."""
        self._call.cancel()

    async def __aenter__(self) -> AsyncStream:
        return self

    async def __aexit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.cancel()


class AsyncClient:
    """A connection to `target` ("host:port" or "unix:/path"). Errors of the server are `ServerError`."""

    def __init__(
        self,
        target: str = "127.0.0.1:30000",
        *,
        token: str | None = None,
        tls: Tls | None = None,
        channel: grpc.aio.Channel | None = None,
    ) -> None:
        """`token`: what the server's --api-key-file holds; `tls`: for a server with --tls-cert; `channel`: instead of
        one to `target`. Raises `UnsupportedError` for a target that is a URL, or has no port, and for what cannot be
        sent or read of the others."""
        if channel is None:
            check_target(target)
        if channel is None and tls is not None:
            channel = grpc.aio.secure_channel(target, tls.credentials(), options=tls.options(target))
        self._channel = channel or grpc.aio.insecure_channel(target, options=channel_options(target))
        self._metadata = metadata(token)
        self.stub = jqserve_pb2_grpc.InferenceStub(self._channel)

    def generate(self, prompt: Prompt, *, timeout: float | None = None, **options: Unpack[Options]) -> AsyncStream:
        """Starts a request: `prompt` is a text, chat messages, or token ids. `timeout` (seconds) is its deadline."""
        return AsyncStream(
            self.stub.Generate(generate_request(prompt, **options), timeout=timeout, metadata=self._metadata)
        )

    async def abort(self, request_id: str, *, timeout: float | None = 30.0) -> bool:
        """Ends a request, whoever started it. False: none with this id runs."""
        return bool((await self._unary(self.stub.Abort, pb.AbortRequest(request_id=request_id), timeout)).found)

    async def tokenize(
        self, prompt: str | Messages, *, add_special_tokens: bool = True, timeout: float | None = 30.0
    ) -> list[int]:
        """Of a text, or of chat messages as the template renders them."""
        request = tokenize_request(prompt, add_special_tokens)
        return list((await self._unary(self.stub.Tokenize, request, timeout)).token_ids)

    async def detokenize(
        self, token_ids: Sequence[int], *, skip_special_tokens: bool = False, timeout: float | None = 30.0
    ) -> str:
        request = pb.DetokenizeRequest(token_ids=token_ids, skip_special_tokens=skip_special_tokens)
        return str((await self._unary(self.stub.Detokenize, request, timeout)).text)

    async def score(
        self,
        inputs: Sequence[str | Sequence[int]],
        *,
        context: int | Sequence[int] = 1,
        top_logprobs: int = 0,
        timeout: float | None = 300.0,
    ) -> list[pb.Scored]:
        """The logprob of every token of texts or token ids, but for the first `context` of each."""
        request = score_request(inputs, context, top_logprobs)
        return list((await self._unary(self.stub.Score, request, timeout)).results)

    async def model_info(self, *, timeout: float | None = 30.0) -> pb.GetModelInfoResponse:
        response: pb.GetModelInfoResponse = await self._unary(self.stub.GetModelInfo, pb.GetModelInfoRequest(), timeout)
        return response

    async def server_info(self, *, timeout: float | None = 30.0) -> pb.GetServerInfoResponse:
        request = pb.GetServerInfoRequest()
        response: pb.GetServerInfoResponse = await self._unary(self.stub.GetServerInfo, request, timeout)
        return response

    async def close(self) -> None:
        await self._channel.close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()

    async def _unary(self, method: Any, request: Any, timeout: float | None) -> Any:
        try:
            return await method(request, timeout=timeout, metadata=self._metadata)
        except grpc.RpcError as error:
            raise from_rpc(error) from error
