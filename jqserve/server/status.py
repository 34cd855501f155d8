"""Which gRPC status each error becomes: the one table, and the wrapper that every RPC goes through."""

from __future__ import annotations

import functools
import logging
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
from grpc.aio import ServicerContext

from jqserve.errors import (
    EngineFailedError,
    EngineUnavailableError,
    JqserveError,
    ModelNotFoundError,
    QueueFullError,
    RequestError,
    UnsupportedError,
)

log = logging.getLogger("jqserve.server")

STATUS: dict[type[JqserveError], grpc.StatusCode] = {
    RequestError: grpc.StatusCode.INVALID_ARGUMENT,
    ModelNotFoundError: grpc.StatusCode.NOT_FOUND,
    QueueFullError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    EngineUnavailableError: grpc.StatusCode.UNAVAILABLE,
    UnsupportedError: grpc.StatusCode.UNIMPLEMENTED,
    EngineFailedError: grpc.StatusCode.INTERNAL,
}
FIELD_METADATA = "jqserve-field"  # trailing metadata of an INVALID_ARGUMENT: the request field at fault

Handler = Callable[[Any, Any, ServicerContext], Awaitable[Any]]


def status_of(error: JqserveError) -> grpc.StatusCode:
    """INTERNAL for an error of ours that is not in the table."""
    return next((STATUS[cls] for cls in type(error).__mro__ if cls in STATUS), grpc.StatusCode.INTERNAL)


def with_status(handler: Handler) -> Handler:
    """Ends the RPC with the table's status; anything unforeseen is logged under a number that the caller sees too.

    Left to itself, grpc.aio would answer UNKNOWN, which gateways retry. Cancellation passes through.
    """

    @functools.wraps(handler)
    async def wrapped(self: Any, request: Any, context: ServicerContext) -> Any:
        try:
            return await handler(self, request, context)
        except JqserveError as error:
            trailing = ((FIELD_METADATA, error.field),) if isinstance(error, RequestError) else ()
            await context.abort(status_of(error), str(error), trailing)
        except grpc.aio.AbortError:
            raise
        except Exception:
            number = uuid.uuid4().hex[:8]
            log.exception("%s failed (%s)", handler.__name__, number)
            await context.abort(grpc.StatusCode.INTERNAL, f"internal error {number}; the server's log says more")

    return wrapped
