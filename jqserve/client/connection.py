"""How to reach a server: in the clear, with TLS or mTLS, with a bearer token. The same for both clients."""

from __future__ import annotations

import dataclasses

import grpc

from jqserve.client.requests import CHANNEL_OPTIONS
from jqserve.credentials import out_of_date, read_authority, read_pair, usable_token
from jqserve.errors import UnsupportedError


@dataclasses.dataclass(frozen=True)
class Tls:
    """PEM files. `ca`: who signed the server's certificate (None: the system's authorities); `cert` and `key` (without
    a passphrase): this client's own, for servers that ask for one; `server_name`: the name in the server's certificate,
    if it is not the target's.
    """

    ca: str | None = None
    cert: str | None = None
    key: str | None = None
    server_name: str | None = None

    def credentials(self) -> grpc.ChannelCredentials:
        """Raises `UnsupportedError` for files that cannot be read, or do not fit together."""
        if bool(self.cert) != bool(self.key):
            raise UnsupportedError("TLS: cert and key go together")
        ca = read_authority("TLS ca", self.ca) if self.ca else None
        cert, key = None, None
        if self.cert and self.key:
            cert, key = read_pair(("TLS cert", self.cert), ("TLS key", self.key))
            if problem := out_of_date(cert):
                raise UnsupportedError(f"TLS cert {self.cert} {problem}: no server would take it")
        return grpc.ssl_channel_credentials(root_certificates=ca, private_key=key, certificate_chain=cert)

    def options(self, target: str) -> tuple[tuple[str, object], ...]:
        name = self.server_name
        return (*channel_options(target), *((("grpc.ssl_target_name_override", name),) if name else ()))


def check_target(target: str) -> None:
    """Raises `UnsupportedError`: gRPC would take a URL for a host's name, and a host without a port for port 443."""
    host, _, port = target.rpartition(":")
    scheme = host.partition("://")[0] if "://" in host else ""
    bare_ipv6 = ":" in host and not host.endswith("]") and not host.startswith(("dns:", "ipv4:", "ipv6:"))
    if target.startswith(("unix:", "unix-abstract:")):
        return
    if not host or bare_ipv6 or not port.isdecimal() or not 0 < int(port) < 2**16:
        hint = f"; leave {scheme}:// out" if scheme else "; an IPv6 address is in brackets" if bare_ipv6 else ""
        raise UnsupportedError(f"{target!r} is no target: expected host:port or unix:/path{hint}")


def channel_options(target: str) -> tuple[tuple[str, object], ...]:
    """gRPC sends everything through the proxy that `http_proxy` names, also what is for this machine, which the proxy
    cannot reach: not so here. For other machines the variable holds."""
    local = target.removeprefix("dns:///").removeprefix("ipv4:").startswith(("127.", "localhost", "[::1]"))
    return (*CHANNEL_OPTIONS, *((("grpc.enable_http_proxy", 0),) if local else ()))


def metadata(token: str | None) -> tuple[tuple[str, str], ...]:
    """Of every call. Raises `UnsupportedError` for a token that cannot be sent."""
    if token is None:
        return ()
    try:
        return (("authorization", f"Bearer {usable_token(token)}"),)
    except UnsupportedError as error:
        raise UnsupportedError(f"the token {error}") from None
