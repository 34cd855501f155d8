"""Certificates, keys and tokens, checked before gRPC sees them.

Its own answer to a key of another certificate is a port that cannot be bound, or a handshake that fails without a
reason; a certificate without its key ends the client's process (grpcio 1.80.1: "Check failed: private_key != nullptr").
"""

from __future__ import annotations

import base64
import binascii
import datetime
import os
import re
import ssl
from pathlib import Path

from jqserve.errors import UnsupportedError

CERTIFICATE = re.compile(rb"-----BEGIN CERTIFICATE-----(.+?)-----END CERTIFICATE-----", re.S)


def read_pem(what: str, path: str) -> bytes:
    """`what`: the flag or argument, for the error. Raises `UnsupportedError`."""
    try:
        data = Path(path).expanduser().read_bytes()
    except OSError as error:
        raise UnsupportedError(f"{what} {path}: {error.strerror or error}") from None
    if b"-----BEGIN" not in data:
        raise UnsupportedError(f"{what} {path} is not PEM (it has no '-----BEGIN' line)")
    return data


def read_authority(what: str, path: str) -> bytes:
    """Certificates of authorities, as PEM. Raises `UnsupportedError` where there is none to trust."""
    data = read_pem(what, path)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(str(Path(path).expanduser()))
    except ssl.SSLError as error:
        raise UnsupportedError(f"{what} {path} holds no certificate that can be read ({reason(error)})") from None
    return data


def read_pair(certificate: tuple[str, str], key: tuple[str, str]) -> tuple[bytes, bytes]:
    """A certificate chain and its private key; (what, path) of each. Raises `UnsupportedError` unless they fit."""
    chain, private = read_authority(*certificate), read_pem(*key)
    named = " ".join(key)

    def passphrase() -> str:
        raise UnsupportedError(
            f"{named} has a passphrase, and gRPC takes keys without one only: openssl pkey -in {key[1]} -out PLAIN"
        )

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    files = [str(Path(path).expanduser()) for _, path in (certificate, key)]
    try:
        context.load_cert_chain(files[0], files[1], password=passphrase)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise UnsupportedError(f"{named} is not the key of {' '.join(certificate)}") from None
        raise UnsupportedError(f"{named} holds no private key that can be read ({reason(error)})") from None
    return chain, private


def reason(error: ssl.SSLError) -> str:
    return (error.reason or "it is not what PEM says it is").lower().replace("_", " ")


def out_of_date(pem: bytes, now: datetime.datetime | None = None) -> str:
    """That a certificate of the chain has expired, or is not valid yet, and since or until when; "": all are valid."""
    now = now or datetime.datetime.now(datetime.UTC)
    for body in CERTIFICATE.findall(pem):
        try:
            begin, end = validity(base64.b64decode(body))
        except (binascii.Error, IndexError, ValueError):
            continue  # gRPC has the last word on what is no certificate
        if now > end:
            return f"has expired on {end:%Y-%m-%d %H:%M} UTC"
        if now < begin:
            return f"is not valid before {begin:%Y-%m-%d %H:%M} UTC"
    return ""


def validity(der: bytes) -> tuple[datetime.datetime, datetime.datetime]:
    """From and to when a certificate is valid (RFC 5280, 4.1.2.5), which Python's ssl tells of a peer's only."""
    _, certificate, _ = element(der, 0)
    _, fields, at = element(certificate, 0)
    tag, _, at = element(fields, 0)
    for _ in range(3 if tag == 0xA0 else 2):  # [version,] serial number, signature, issuer
        _, _, at = element(fields, at)
    _, times, _ = element(fields, at)
    _, first, at = element(times, 0)
    _, last, _ = element(times, at)
    return point(first), point(last)


def element(data: bytes, at: int) -> tuple[int, bytes, int]:
    """DER's (tag, content, where the next one begins)."""
    tag, length = data[at], data[at + 1]
    at += 2
    if length & 0x80:
        size = length & 0x7F
        length, at = int.from_bytes(data[at : at + size]), at + size
    return tag, data[at : at + length], at + length


def point(text: bytes) -> datetime.datetime:
    """UTCTime has two digits of the year, of which 50 and later are the last century's; GeneralizedTime has four."""
    digits = text.decode("ascii").rstrip("Z")
    if len(digits) == 12:
        digits = ("20" if digits[:2] < "50" else "19") + digits
    return datetime.datetime.strptime(digits, "%Y%m%d%H%M%S").replace(tzinfo=datetime.UTC)


def read_by_others(path: str) -> str:
    """What is wrong with a secret's file; "": only its user and group may read it."""
    mode = os.stat(Path(path).expanduser()).st_mode & 0o777
    return f"every user of this machine may open it (mode {mode:04o}): chmod o= {path}" if mode & 0o007 else ""


def usable_token(token: str) -> str:
    """A bearer token without the white space around it. Raises `UnsupportedError`, and does not show it."""
    token = token.strip()
    if not token:
        raise UnsupportedError("is empty")
    if not (token.isascii() and token.isprintable()):
        raise UnsupportedError("has characters that gRPC cannot carry in a header: printable ASCII is what it takes")
    return token


def read_tokens(what: str, path: str) -> list[str]:
    """One a line; empty lines and those that begin with # do not count. Raises `UnsupportedError`."""
    try:
        lines = Path(path).expanduser().read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        text = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UnsupportedError(f"{what} {path}: {text or error}") from None
    tokens = []
    for number, line in enumerate(lines, 1):
        if line.strip() and not line.lstrip().startswith("#"):
            try:
                tokens.append(usable_token(line))
            except UnsupportedError as error:
                raise UnsupportedError(f"{what} {path}, line {number}: the token {error}") from None
    if not tokens:
        raise UnsupportedError(f"{what} {path} holds no token")
    return tokens
