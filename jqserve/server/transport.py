"""Where the server listens: TCP or a Unix socket, in the clear or with TLS, with or without client certificates."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

import grpc
import grpc.aio

from jqserve.errors import UnsupportedError
from jqserve.server.config import ServerConfig


def listen(server: grpc.aio.Server, config: ServerConfig) -> int:
    """Binds; the port (0 for a Unix socket). Raises `UnsupportedError` for files that cannot be used, RuntimeError
    when the address is taken."""
    if config.unix_socket:
        return _listen_unix(server, Path(config.unix_socket).expanduser())
    credentials = tls_credentials(config)
    where = address(config.host, config.port)
    return server.add_insecure_port(where) if credentials is None else server.add_secure_port(where, credentials)


def tls_credentials(config: ServerConfig) -> grpc.ServerCredentials | None:
    """None: plain text. With --tls-client-ca a client has to show a certificate that it signed (mTLS)."""
    if not (config.tls_cert or config.tls_key or config.tls_client_ca):
        return None
    if not (config.tls_cert and config.tls_key):
        raise UnsupportedError("--tls-cert and --tls-key go together; --tls-client-ca needs both")
    certificate, key = read_pem("--tls-cert", config.tls_cert), read_pem("--tls-key", config.tls_key)
    if not config.tls_client_ca:
        return grpc.ssl_server_credentials([(key, certificate)])
    authority = read_pem("--tls-client-ca", config.tls_client_ca)
    return grpc.ssl_server_credentials([(key, certificate)], root_certificates=authority, require_client_auth=True)


def read_pem(flag: str, path: str) -> bytes:
    try:
        data = Path(path).expanduser().read_bytes()
    except OSError as error:
        raise UnsupportedError(f"{flag} {path}: {error.strerror or error}") from None
    if b"-----BEGIN" not in data:
        raise UnsupportedError(f"{flag} {path} is not PEM (it has no '-----BEGIN' line)")
    return data


def _listen_unix(server: grpc.aio.Server, path: Path) -> int:
    """Only this user may connect. A socket that a killed server left behind is replaced, a live one is not."""
    if path.exists():
        if not stat.S_ISSOCK(path.stat().st_mode):
            raise UnsupportedError(f"--unix-socket {path} exists and is not a socket")
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(str(path))
            except OSError:
                path.unlink()
            else:
                raise UnsupportedError(f"--unix-socket {path}: another server listens on it")
    before = os.umask(0o177)
    try:
        server.add_insecure_port(f"unix:{path}")
    finally:
        os.umask(before)
    return 0


def address(host: str, port: int) -> str:
    """IPv6 hosts need brackets."""
    return f"[{host}]:{port}" if ":" in host and not host.startswith("[") else f"{host}:{port}"
