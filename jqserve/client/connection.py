"""How to reach a server: in the clear, with TLS or mTLS, with a bearer token. The same for both clients."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import grpc

from jqserve.client.requests import CHANNEL_OPTIONS


@dataclasses.dataclass(frozen=True)
class Tls:
    """PEM files. `ca`: who signed the server's certificate (None: the system's authorities); `cert` and `key`: this
    client's own, for servers that ask for one; `server_name`: the name in the certificate, if it is not the target's.
    """

    ca: str | None = None
    cert: str | None = None
    key: str | None = None
    server_name: str | None = None

    def credentials(self) -> grpc.ChannelCredentials:
        """Raises OSError for a file that cannot be read."""
        ca, key, cert = (Path(path).read_bytes() if path else None for path in (self.ca, self.key, self.cert))
        return grpc.ssl_channel_credentials(root_certificates=ca, private_key=key, certificate_chain=cert)

    def options(self) -> tuple[tuple[str, object], ...]:
        name = self.server_name
        return (*CHANNEL_OPTIONS, *((("grpc.ssl_target_name_override", name),) if name else ()))


def metadata(token: str | None) -> tuple[tuple[str, str], ...]:
    """Of every call."""
    return (("authorization", f"Bearer {token}"),) if token else ()
