"""A write that gives up on a reader who takes nothing: HTTP/2's flow control would have it wait for ever."""

from __future__ import annotations

import asyncio

from google.protobuf.message import Message
from grpc.aio import ServicerContext

from jqserve.errors import UnreadStreamError


async def write_or_give_up(context: ServicerContext, message: Message, seconds: float) -> None:
    """`seconds` 0: never. Raises `UnreadStreamError`. Generate's many writes cost less: see `Serving.check`."""
    try:
        async with asyncio.timeout(seconds or None):
            await context.write(message)
    except TimeoutError:
        raise UnreadStreamError(f"nobody has read this stream for {seconds:g} s; it is cancelled") from None
