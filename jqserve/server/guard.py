"""What every RPC passes before its handler: the bearer token, the limits, and requests that are no protobuf.

The services' handlers take a request each. Here they are made handlers of a stream of requests, of which one is read:
only so can it be decided when a message is read, and that one without a token is never read at all.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import hashlib
import hmac
from collections.abc import Awaitable, Callable, Collection
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError, Message

from jqserve.errors import JqserveError
from jqserve.server import health
from jqserve.server.receive import GoneError, Receiving
from jqserve.server.status import Refused

EXEMPT = f"/{health.SERVICE}/"  # orchestrators probe without a token; the answer is one enum


class Guard(grpc.aio.ServerInterceptor):
    """Refuses with UNAUTHENTICATED; turns what cannot be a request into a `Refused`, which the handlers know."""

    def __init__(
        self,
        tokens: Collection[str],
        services: Collection[str],
        refused: Callable[[str, str], None],
        receiving: Callable[[], Receiving],
        check_sizes: Callable[[Message], None],
        most_calls: int,
    ) -> None:
        """`tokens`: any of them is good; none: no token is asked for. `services`: ours. `refused` is told the method
        and the status. `check_sizes` raises `JqserveError` for a large message with a part that is too large.
        `most_calls` of our services at once: gRPC's own limit refuses a call too many after each time it was met. Calls
        of the health service are counted apart, by method, and their messages `receiving` apart: those who need no
        token for it take nothing from those who have one."""
        self._digests = [hashlib.sha256(token.encode()).digest() for token in tokens]
        self._ours = tuple(f"/{service}/" for service in services)
        self._refused = refused
        self._receiving = {"": receiving(), **{EXEMPT + method: receiving() for method in ("Check", "Watch")}}
        self._check_sizes = check_sizes
        self._most_calls, self._calls = most_calls, collections.Counter[str]()
        self._deny = grpc.stream_stream_rpc_method_handler(_deny)
        self._deny_other = grpc.stream_stream_rpc_method_handler(_deny_other)
        self._full = grpc.stream_stream_rpc_method_handler(_full)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        method = handler_call_details.method
        if self._digests and not method.startswith(EXEMPT) and not self._good(handler_call_details.invocation_metadata):
            self._refused(method, "UNAUTHENTICATED")
            sent = any(key == "authorization" for key, _ in handler_call_details.invocation_metadata or ())
            return self._deny_other if sent else self._deny
        handler: Any = await continuation(handler_call_details)
        kind = method if method in self._receiving else ""
        if handler is None or not (kind or method.startswith(self._ours)):
            return handler
        if self._calls[kind] >= self._most_calls:
            self._refused(method, "RESOURCE_EXHAUSTED")
            return self._full
        return self._reading(handler, kind)

    def _good(self, metadata: Any) -> bool:
        """Compares digests, in constant time, and all of them."""
        given = next((value for key, value in metadata or () if key == "authorization"), "")
        scheme, _, token = str(given).partition(" ")
        digest = hashlib.sha256(token.strip().encode("utf-8", "surrogateescape")).digest()
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return scheme.lower() == "bearer" and any(matches)

    def _reading(self, handler: Any, kind: str) -> grpc.RpcMethodHandler:
        """`handler`, of one request, as one that reads this request itself. `kind`: what it is counted among."""
        inner = handler.unary_stream if handler.response_streaming else handler.unary_unary
        deserialize = handler.request_deserializer

        async def read(stream: Any, context: grpc.aio.ServicerContext) -> Any:
            self._calls[kind] += 1
            try:
                request = await self._request(kind, context, deserialize)
                answer = inner(request, context)
                del request  # what a handler lets go, nobody else holds while it streams
                return await answer
            except GoneError:
                # Nobody is there, or the core has refused a message that is too large, or one has ended without any.
                with contextlib.suppress(grpc.aio.InternalError):
                    await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "request: the call ended without one")
                raise asyncio.CancelledError from None
            finally:
                self._calls[kind] -= 1

        make: Any = grpc.stream_unary_rpc_method_handler
        if handler.response_streaming:
            make = grpc.stream_stream_rpc_method_handler
        made: grpc.RpcMethodHandler = make(read, None, handler.response_serializer)
        return made

    async def _request(self, kind: str, context: Any, deserialize: Callable[[bytes], Message]) -> Message | Refused:
        """The call's request. Left to itself, grpc.aio answers one that does not parse with UNKNOWN, which gateways
        retry and count as a fault of this worker."""
        try:
            return await self._receiving[kind].receive(context, deserialize, self._check_sizes)
        except JqserveError as error:
            return Refused(error.with_traceback(None))  # whose frames would keep the message until the next collection
        except (DecodeError, ValueError, RecursionError) as error:
            return Refused.malformed(str(error))


async def _deny(stream: Any, context: grpc.aio.ServicerContext) -> None:
    text = "this server wants a token: send 'authorization: Bearer TOKEN' in the metadata"
    await context.abort(grpc.StatusCode.UNAUTHENTICATED, text)


async def _deny_other(stream: Any, context: grpc.aio.ServicerContext) -> None:
    text = "the token is none of this server's; it is sent as 'authorization: Bearer TOKEN' in the metadata"
    await context.abort(grpc.StatusCode.UNAUTHENTICATED, text)


async def _full(stream: Any, context: grpc.aio.ServicerContext) -> None:
    text = "too many calls at once (--max-concurrent-rpcs); try again later"
    await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, text)
