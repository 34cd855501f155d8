"""The blocking client. One may be shared by many threads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, Unpack

import grpc

from jqserve.client.connection import Tls, channel_options, check_target, metadata
from jqserve.client.errors import from_rpc
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


class Stream:
    """A running request. Iterate it for the text as it comes (of choice 0; `events` for all n), or call `wait`.

    Leaving the iteration early does not stop the server: `cancel` does, and so does leaving a `with` block.
    """

    def __init__(self, call: Any) -> None:
        self._call = call
        self.result = Result()  # grows as the stream is read

    def events(self) -> Iterator[Event]:
        """Everything, of every choice. Raises `ServerError`."""
        try:
            for response in self._call:
                if (event := self.result.add(response)) is not None:
                    yield event
        except grpc.RpcError as error:
            raise from_rpc(error) from error

    def __iter__(self) -> Iterator[str]:
        return (event.text for event in self.events() if event.index == 0 and event.text)

    def wait(self) -> Result:
        """Reads to the end."""
        for _ in self.events():
            pass
        return self.result

    def cancel(self) -> None:
        """Frees the server's slots at once. The iteration then raises `ServerError` (CANCELLED)."""
        self._call.cancel()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.cancel()


class Client:
    """A connection to `target` ("host:port" or "unix:/path"). Errors of the server are `ServerError`."""

    def __init__(
        self,
        target: str = "127.0.0.1:30000",
        *,
        token: str | None = None,
        tls: Tls | None = None,
        channel: grpc.Channel | None = None,
    ) -> None:
        """`token`: what the server's --api-key-file holds; `tls`: for a server with --tls-cert; `channel`: instead of
        one to `target`. Raises `UnsupportedError` for a target that is a URL, or has no port, and for what cannot be
        sent or read of the others."""
        if channel is None:
            check_target(target)
        if channel is None and tls is not None:
            channel = grpc.secure_channel(target, tls.credentials(), options=tls.options(target))
        self._channel = channel or grpc.insecure_channel(target, options=channel_options(target))
        self._metadata = metadata(token)
        self.stub = jqserve_pb2_grpc.InferenceStub(self._channel)

    def generate(self, prompt: Prompt, *, timeout: float | None = None, **options: Unpack[Options]) -> Stream:
        """Starts a request: `prompt` is a text, chat messages, or token ids. `timeout` (seconds) is its deadline."""
        return Stream(self.stub.Generate(generate_request(prompt, **options), timeout=timeout, metadata=self._metadata))

    def abort(self, request_id: str, *, timeout: float | None = 30.0) -> bool:
        """Ends a request, whoever started it. False: none with this id runs."""
        return bool(self._unary(self.stub.Abort, pb.AbortRequest(request_id=request_id), timeout).found)

    def tokenize(
        self, prompt: str | Messages, *, add_special_tokens: bool = True, timeout: float | None = 30.0
    ) -> list[int]:
        """Of a text, or of chat messages as the template renders them."""
        request = tokenize_request(prompt, add_special_tokens)
        return list(self._unary(self.stub.Tokenize, request, timeout).token_ids)

    def detokenize(
        self, token_ids: Sequence[int], *, skip_special_tokens: bool = False, timeout: float | None = 30.0
    ) -> str:
        request = pb.DetokenizeRequest(token_ids=token_ids, skip_special_tokens=skip_special_tokens)
        return str(self._unary(self.stub.Detokenize, request, timeout).text)

    def score(
        self,
        inputs: Sequence[str | Sequence[int]],
        *,
        context: int | Sequence[int] = 1,
        top_logprobs: int = 0,
        timeout: float | None = 300.0,
    ) -> list[pb.Scored]:
        """The logprob of every token of texts or token ids, but for the first `context` of each."""
        request = score_request(inputs, context, top_logprobs)
        return list(self._unary(self.stub.Score, request, timeout).results)

    def model_info(self, *, timeout: float | None = 30.0) -> pb.GetModelInfoResponse:
        response: pb.GetModelInfoResponse = self._unary(self.stub.GetModelInfo, pb.GetModelInfoRequest(), timeout)
        return response

    def server_info(self, *, timeout: float | None = 30.0) -> pb.GetServerInfoResponse:
        response: pb.GetServerInfoResponse = self._unary(self.stub.GetServerInfo, pb.GetServerInfoRequest(), timeout)
        return response

    def close(self) -> None:
        self._channel.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _unary(self, method: Any, request: Any, timeout: float | None) -> Any:
        try:
            return method(request, timeout=timeout, metadata=self._metadata)
        except grpc.RpcError as error:
            raise from_rpc(error) from error
