"""What a user's program imports to talk to a jqserve server: no jax, no transformers.

    from jqserve.client import Client

    with Client("127.0.0.1:30000") as client:
        for text in client.generate("Once upon a time", max_new_tokens=64):
            print(text, end="", flush=True)

`AsyncClient` is the same for asyncio. The generated stubs are in `jqserve.server.pb`.
"""

from jqserve.client.aio import AsyncClient, AsyncStream
from jqserve.client.connection import Tls
from jqserve.client.errors import ServerError
from jqserve.client.result import Choice, Event, Result
from jqserve.client.sync import Client, Stream

__all__ = ["AsyncClient", "AsyncStream", "Choice", "Client", "Event", "Result", "ServerError", "Stream", "Tls"]
