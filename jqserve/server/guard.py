"""What every RPC passes before its handler: the bearer token, and requests that are not protobuf."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Awaitable, Callable, Collection
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from jqserve.server.status import Malformed

EXEMPT = "/grpc.health.v1.Health/"  # orchestrators probe without a token; the answer is one enum


class Guard(grpc.aio.ServerInterceptor):
    """Refuses with UNAUTHENTICATED; turns bytes that do not parse into a `Malformed`, which is INVALID_ARGUMENT.

    Left to itself, grpc.aio answers a request that does not parse with UNKNOWN, which gateways retry and count as a
    fault of this worker.
    """

    def __init__(self, tokens: Collection[str], services: Collection[str], refused: Callable[[str], None]) -> None:
        """`tokens`: any of them is good; none: no token is asked for. `services`: ours, which know `Malformed`."""
        self._digests = [hashlib.sha256(token.encode()).digest() for token in tokens]
        self._ours = tuple(f"/{service}/" for service in services)
        self._refused = refused
        self._deny = grpc.unary_unary_rpc_method_handler(_deny)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        method = handler_call_details.method
        if self._digests and not method.startswith(EXEMPT) and not self._good(handler_call_details.invocation_metadata):
            self._refused(method)
            return self._deny
        handler: Any = await continuation(handler_call_details)
        if handler is not None and method.startswith(self._ours):
            handler = handler._replace(request_deserializer=_tolerant(handler.request_deserializer))
        return handler

    def _good(self, metadata: Any) -> bool:
        """Compares digests, in constant time, and all of them."""
        given = next((value for key, value in metadata or () if key == "authorization"), "")
        scheme, _, token = str(given).partition(" ")
        digest = hashlib.sha256(token.strip().encode("utf-8", "surrogateescape")).digest()
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return scheme.lower() == "bearer" and any(matches)


async def _deny(request: Any, context: grpc.aio.ServicerContext) -> None:
    text = "this server wants a token: send 'authorization: Bearer TOKEN' in the metadata"
    await context.abort(grpc.StatusCode.UNAUTHENTICATED, text)


def _tolerant(deserialize: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    def parse(data: bytes) -> Any:
        try:
            return deserialize(data)
        except (DecodeError, ValueError, RecursionError) as error:
            return Malformed(str(error))

    return parse
