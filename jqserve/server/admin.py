"""What an operator may ask of the engine: forget cached prefixes, profile. Off unless --admin."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

from grpc.aio import ServicerContext

from jqserve.errors import PreconditionError, RequestError, UnsupportedError
from jqserve.server.frontend import Frontend
from jqserve.server.pb import jqserve_pb2 as pb
from jqserve.server.pb import jqserve_pb2_grpc
from jqserve.server.status import with_status

SERVICE = pb.DESCRIPTOR.services_by_name["Admin"].full_name
MAX_WAIT = 86_400  # seconds


class Admin:
    """The operations, under any RPC surface."""

    def __init__(self, frontend: Frontend) -> None:
        self.frontend = frontend

    async def flush_cache(self) -> int:
        """How many pages were given back."""
        return int((await self._ask("flush_cache"))["pages"])

    async def flush_cache_when_idle(self, seconds: float) -> int:
        """The same, once no request runs. Raises `PreconditionError` when some still do after so many seconds."""
        if not 0 <= seconds <= MAX_WAIT:
            raise RequestError("timeout_s", f"is {seconds:g}; expected 0 to {MAX_WAIT} seconds")
        frontend = self.frontend
        self._need_admin()
        if not frontend.idle.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(frontend.idle.wait(), seconds)
        if count := len(frontend.generations):
            raise PreconditionError(
                f"the cache was not flushed: after {seconds:g} s (timeout_s) requests still run: {count}"
            )
        return await self.flush_cache()

    async def start_profile(self) -> str:
        """The directory on the server where the trace will be."""
        return str((await self._ask("start_profile"))["directory"])

    async def stop_profile(self) -> str:
        return str((await self._ask("stop_profile"))["directory"])

    async def _ask(self, verb: str) -> dict[str, Any]:
        self._need_admin()
        return await self.frontend.need_ready().ask(verb)

    def _need_admin(self) -> None:
        if not self.frontend.config.admin:
            raise UnsupportedError("this server was started without --admin")


class AdminServicer(jqserve_pb2_grpc.AdminServicer):
    def __init__(self, frontend: Frontend) -> None:
        self.frontend = frontend
        self.admin = Admin(frontend)

    @with_status
    async def FlushCache(self, request: pb.FlushCacheRequest, context: ServicerContext) -> pb.FlushCacheResponse:
        return pb.FlushCacheResponse(pages=await self.admin.flush_cache())

    @with_status
    async def StartProfile(self, request: pb.StartProfileRequest, context: ServicerContext) -> pb.StartProfileResponse:
        return pb.StartProfileResponse(directory=await self.admin.start_profile())

    @with_status
    async def StopProfile(self, request: pb.StopProfileRequest, context: ServicerContext) -> pb.StopProfileResponse:
        return pb.StopProfileResponse(directory=await self.admin.stop_profile())
