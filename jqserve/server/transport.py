"""Where the server listens: TCP or a Unix socket, in the clear or with TLS, with or without client certificates."""

from __future__ import annotations

import logging
import os
import socket
import stat
from pathlib import Path

import grpc
import grpc.aio

from jqserve.credentials import out_of_date, read_authority, read_by_others, read_pair
from jqserve.errors import UnsupportedError
from jqserve.server.config import ServerConfig

log = logging.getLogger("jqserve.server")

LONGEST_UNIX_PATH = 107  # bytes: sun_path has 108 with its end


def listen(server: grpc.aio.Server, config: ServerConfig) -> int:
    """Binds; the port (0 for a Unix socket). Raises `UnsupportedError` for what cannot be listened on, or with."""
    tls = config.tls_cert or config.tls_key or config.tls_client_ca
    if config.unix_socket:
        if tls:
            raise UnsupportedError("--unix-socket has no TLS: leave out --tls-cert, --tls-key and --tls-client-ca")
        return _listen_unix(server, Path(config.unix_socket).expanduser())
    credentials = tls_credentials(config) if tls else None
    where = address(config.host, config.port)
    if not config.api_keys and not config.tls_client_ca and not _of_this_machine(config.host):
        log.warning(
            "--host %s: whoever can reach this machine can use the server; --api-key-file FILE asks for a token",
            config.host,
        )
    try:
        return server.add_insecure_port(where) if credentials is None else server.add_secure_port(where, credentials)
    except RuntimeError as error:
        raise UnsupportedError(f"cannot listen on {where}: {_why_not(config.host, config.port) or error}") from None


def tls_credentials(config: ServerConfig) -> grpc.ServerCredentials:
    """With --tls-client-ca a client has to show a certificate that it signed (mTLS)."""
    if not (config.tls_cert and config.tls_key):
        raise UnsupportedError("--tls-cert and --tls-key go together; --tls-client-ca needs both")
    certificate, key = read_pair(("--tls-cert", config.tls_cert), ("--tls-key", config.tls_key))
    if problem := read_by_others(config.tls_key):
        log.warning("--tls-key %s: %s", config.tls_key, problem)
    if problem := out_of_date(certificate):
        log.warning("--tls-cert %s %s: clients will refuse it", config.tls_cert, problem)
    if not config.tls_client_ca:
        return grpc.ssl_server_credentials([(key, certificate)])
    authority = read_authority("--tls-client-ca", config.tls_client_ca)
    if problem := out_of_date(authority):
        log.warning("--tls-client-ca %s %s: no client's certificate will do", config.tls_client_ca, problem)
    return grpc.ssl_server_credentials([(key, certificate)], root_certificates=authority, require_client_auth=True)


def _of_this_machine(host: str) -> bool:
    return host.strip("[]") in ("localhost", "::1") or host.startswith("127.")


def _why_not(host: str, port: int) -> str:
    """Why this address cannot be bound, asked of the system itself; "": it can."""
    try:
        family, kind, _, _, where = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.bind(where)
    except OSError as error:
        text = (error.strerror or str(error)).lower()
        return f"{text}; --port 0 picks a free one" if "in use" in text else text
    return ""


def _listen_unix(server: grpc.aio.Server, path: Path) -> int:
    """Only this user may connect. A socket that a killed server left behind is replaced, a live one is not."""
    if len(os.fsencode(path)) > LONGEST_UNIX_PATH:
        raise UnsupportedError(f"--unix-socket {path}: its path has more than {LONGEST_UNIX_PATH} bytes")
    if not path.parent.is_dir():
        raise UnsupportedError(f"--unix-socket {path}: there is no directory {path.parent}")
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
    except RuntimeError as error:
        raise UnsupportedError(f"--unix-socket {path}: {error}; may you write to {path.parent}?") from None
    finally:
        os.umask(before)
    return 0


def address(host: str, port: int) -> str:
    """IPv6 hosts need brackets."""
    return f"[{host}]:{port}" if ":" in host and not host.startswith("[") else f"{host}:{port}"
