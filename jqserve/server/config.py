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
    grpc_compat: Literal["vllm", "sglang", "none"] = "vllm"  # the gateway protocol beside the native service
    unix_socket: str | None = None  # listen here instead of on host and port
    tls_cert: str | None = None  # PEM files; a client CA asks clients for certificates (mTLS)
    tls_key: str | None = None
    tls_client_ca: str | None = None
    api_keys: tuple[str, ...] = dataclasses.field(default=(), repr=False)  # any of them opens; none: no token is asked
    max_message_bytes: int = 4 * 2**20  # of one request; a 128k-token prompt of ids is under 0.5 MB
    max_prompt_bytes: int = 0  # of a text or chat; 0: 32 a token of the context length
    max_concurrent_rpcs: int = 4096
    max_request_seconds: float = 0.0  # 0: as long as it takes
    stream_interval: int = 0  # tokens of a message; 0: four, and more when many streams are answered
    unread_seconds: float = 60.0  # a stream whose reader takes nothing for so long is cancelled; 0: never
    metrics_port: int | None = None  # None: no metrics; 0: a free one
    metrics_host: str = "127.0.0.1"
    otlp_traces_endpoint: str | None = None
    admin: bool = False
    ids_only: bool = False  # there is no tokenizer: token ids in and out
    engine: dict[str, Any] = dataclasses.field(default_factory=dict)  # `wire.Configure.config`
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)  # the command line, for GetServerInfo

    @property
    def name(self) -> str:
        return self.served_model_name or self.model_path.rstrip("/").rsplit("/", 1)[-1]
