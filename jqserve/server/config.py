"""`ServerConfig`: the command line as the front end needs it. The engine's part goes to the engine unread."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal


@dataclasses.dataclass(frozen=True)
class ServerConfig:
    """How to listen, what to load, how to serve it."""

    model_path: str
    host: str = "127.0.0.1"
    port: int = 30000  # 0: a free one
    revision: str | None = None
    tokenizer_path: str | None = None  # None: model_path
    chat_template: str | None = None  # a file, or the template itself
    served_model_name: str | None = None  # None: model_path's last part
    frontend: Literal["process", "inline"] = "process"
    random_seed: int | None = None  # of the seeds drawn for requests that bring none; None: unpredictable
    log_requests: bool = False
    drain_timeout: float = 300.0  # seconds that running requests have to finish after SIGTERM
    ready_file: str | None = None  # written when the server is ready: JSON {host, port, pid, engine_pid}
    ids_only: bool = False  # there is no tokenizer: token ids in and out
    engine: dict[str, Any] = dataclasses.field(default_factory=dict)  # `wire.Configure.config`
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)  # the command line, for GetServerInfo

    @property
    def name(self) -> str:
        return self.served_model_name or self.model_path.rstrip("/").rsplit("/", 1)[-1]
