"""A caller who reads nothing, not even into a buffer: gRPC's own clients always read ahead."""

from __future__ import annotations

import socket
import struct

HEADERS, DATA, SETTINGS = 1, 0, 4  # HTTP/2's frame types (RFC 9113, 6)
INITIAL_WINDOW_SIZE = 4  # a setting


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def call(port: int, method: str, message: bytes) -> socket.socket:
    """A call that reads nothing: its window is 0."""
    fields = {":method": "POST", ":scheme": "http", ":path": method, ":authority": "x", "te": "trailers"}
    fields["content-type"] = "application/grpc"
    block = b"".join(b"\0" + bytes([len(k)]) + k.encode() + bytes([len(v)]) + v.encode() for k, v in fields.items())
    data = b"\0" + struct.pack(">I", len(message)) + message
    sock = socket.create_connection(("127.0.0.1", port))
    sock.sendall(
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(SETTINGS, 0, 0, struct.pack(">HI", INITIAL_WINDOW_SIZE, 0))
    )
    sock.sendall(frame(HEADERS, 4, 1, block) + frame(DATA, 1, 1, data))
    return sock
