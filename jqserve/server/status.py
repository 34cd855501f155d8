"""Which gRPC status each error becomes: the one table, and the wrapper that every RPC goes through."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import logging
import uuid
from collections.abc import Awaitable, Callable
from typing import Any, cast

import grpc
from grpc.aio import ServicerContext

from jqserve.errors import (
    EngineFailedError,
    EngineUnavailableError,
    JqserveError,
    ModelNotFoundError,
    PreconditionError,
    QueueFullError,
    RequestError,
    RequestTimeoutError,
    UnreadStreamError,
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
    RequestTimeoutError: grpc.StatusCode.DEADLINE_EXCEEDED,
    UnreadStreamError: grpc.StatusCode.CANCELLED,
    PreconditionError: grpc.StatusCode.FAILED_PRECONDITION,
}
FIELD_METADATA = "jqserve-field"  # trailing metadata of an INVALID_ARGUMENT: the request field at fault

GIVE_UP = 2.0  # seconds for a status to get out; a caller that does not read does not get it

Handler = Callable[[Any, Any, ServicerContext], Awaitable[Any]]


def status_of(error: JqserveError) -> grpc.StatusCode:
    """INTERNAL for an error of ours that is not in the table."""
    return next((STATUS[cls] for cls in type(error).__mro__ if cls in STATUS), grpc.StatusCode.INTERNAL)


@dataclasses.dataclass(frozen=True)
class Refused:
    """Stands for a request that no handler should see (see `jqserve.server.guard`): why."""

    error: JqserveError

    @staticmethod
    def malformed(reason: str) -> Refused:
        """It could not be parsed."""
        return Refused(RequestError("request", f"is not what this RPC takes: {reason}"))


def with_status(handler: Handler) -> Handler:
    """Ends the RPC with the table's status; anything unforeseen is logged under a number that the caller sees too.

    Left to itself, grpc.aio would answer UNKNOWN, which gateways retry. Cancellation passes through. Every end is
    counted in `self.frontend.metrics`.
    """

    @functools.wraps(handler)
    async def wrapped(self: Any, request: Any, context: ServicerContext) -> Any:
        code, trailing = grpc.StatusCode.OK, cast(tuple[tuple[str, str], ...], ())
        try:
            if not isinstance(request, Refused):
                answer = handler(self, request, context)
                del request  # the handler's own now
                return await answer
            code, text, trailing = told(request.error)
        except JqserveError as error:
            code, text, trailing = told(error)
        except grpc.aio.AbortError:
            raise
        except grpc.aio.InternalError:  # a write to a caller who is gone; grpc would log it with a traceback
            code = grpc.StatusCode.CANCELLED
            raise asyncio.CancelledError from None
        except asyncio.CancelledError:
            code = grpc.StatusCode.CANCELLED
            raise
        except Exception:
            number = uuid.uuid4().hex[:8]
            log.exception("%s failed (%s)", handler.__name__, number)
            code, text = grpc.StatusCode.INTERNAL, f"internal error {number}; the server's log says more"
        finally:
            self.frontend.metrics.rpc(handler.__name__, code.name)
        try:
            async with asyncio.timeout(GIVE_UP):
                await context.abort(code, printable(text), trailing)
        except TimeoutError:
            pass
        except grpc.aio.InternalError:  # not even the call's first message has gone out, and no status can
            raise asyncio.CancelledError from None

    return wrapped


def told(error: JqserveError) -> tuple[grpc.StatusCode, str, tuple[tuple[str, str], ...]]:
    """The status, its text, and the trailing metadata."""
    trailing = ((FIELD_METADATA, error.field),) if isinstance(error, RequestError) else ()
    return status_of(error), str(error), trailing


def printable(text: str) -> str:
    """At most 2,000 characters, none of which breaks the status on its way."""
    return text[:2000].encode("utf-8", "replace").decode()
