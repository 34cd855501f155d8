"""grpc.health.v1: "" lives as long as the process serves; a service's name is there while its requests are served.

Ours, and not grpcio-health-checking's servicer: its Watch writes while it holds the lock that `set` needs, so that one
watcher who read nothing (an HTTP/2 window of 0) kept the server from being ready, or from ending. No token is asked for
here, so what callers may hold is bounded: here the watchers, in `guard` the calls and their messages.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from grpc.aio import ServicerContext
from grpc_health.v1 import health_pb2, health_pb2_grpc

from jqserve.errors import ModelNotFoundError, QueueFullError
from jqserve.server.status import with_status
from jqserve.server.unread import write_or_give_up

if TYPE_CHECKING:
    from jqserve.server.frontend import Frontend

SERVICE = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
MOST_WATCHERS = 256
UNREAD_SECONDS = 10.0  # a watcher who takes none of its few bytes for so long is let go

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


class HealthServicer(health_pb2_grpc.HealthServicer):
    def __init__(self, frontend: Frontend) -> None:
        self.frontend = frontend
        self._statuses = {"": SERVING}
        self._watchers = 0
        self._changed = asyncio.Event()
        self._over = False

    def set(self, service: str, *, serving: bool) -> None:
        """After `shut_down` nothing serves again."""
        self._statuses[service] = SERVING if serving and not self._over else NOT_SERVING
        self._changed.set()
        self._changed = asyncio.Event()

    def shut_down(self) -> None:
        self._over = True
        for service in self._statuses:
            self.set(service, serving=False)

    @with_status
    async def Check(
        self, request: health_pb2.HealthCheckRequest, context: ServicerContext
    ) -> health_pb2.HealthCheckResponse:
        status = self._statuses.get(request.service)
        if status is None:
            known = ", ".join(sorted(self._statuses)).strip(", ")
            raise ModelNotFoundError(f"service: {request.service[:80]!r} is not served here; there are {known}")
        return health_pb2.HealthCheckResponse(status=status)

    @with_status
    async def Watch(self, request: health_pb2.HealthCheckRequest, context: ServicerContext) -> None:
        if self._watchers >= MOST_WATCHERS:
            raise QueueFullError(f"{self._watchers} callers watch this server's health; call Check, or try again later")
        self._watchers += 1
        told = None
        try:
            while True:
                changed, status = self._changed, self._statuses.get(request.service, UNKNOWN)
                if status != told:
                    await write_or_give_up(context, health_pb2.HealthCheckResponse(status=status), UNREAD_SECONDS)
                    told = status
                await changed.wait()
        finally:
            self._watchers -= 1
