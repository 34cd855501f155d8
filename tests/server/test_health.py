"""The health service asks for no token, so nothing that is done to it may keep anybody else from being served."""

from __future__ import annotations

import contextlib
import dataclasses
import socket
import struct
import time
from collections.abc import Iterator

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from jqserve.client import Client
from jqserve.server.app import SERVICE
from jqserve.server.config import ServerConfig
from tests.server.running_server import Running, running_server

CONFIG = ServerConfig("/models/echo", port=0, ids_only=True)
TOKEN = "s3cret"
WATCH, CHECK = "/grpc.health.v1.Health/Watch", "/grpc.health.v1.Health/Check"
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


@pytest.fixture
def stack() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as stack:
        yield stack


def test_a_watcher_who_reads_nothing_does_not_keep_the_server_from_ending(stack: contextlib.ExitStack) -> None:
    running = Running(CONFIG)
    message = health_pb2.HealthCheckRequest(service=SERVICE).SerializeToString()
    stack.enter_context(call(running.server.port, WATCH, message))
    end = time.monotonic() + 10
    with grpc.insecure_channel(running.target) as channel:
        watching = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=SERVICE))
        assert next(watching).status == health_pb2.HealthCheckResponse.SERVING
        time.sleep(0.2)
        running.drain()
        assert next(watching).status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert time.monotonic() < end
        assert running.stop() == 0


def test_watchers_without_a_token_leave_room_for_those_with_one(stack: contextlib.ExitStack) -> None:
    config = dataclasses.replace(CONFIG, api_keys=(TOKEN,), max_concurrent_rpcs=8)
    with running_server(config) as (running, _), Client(running.target, token=TOKEN) as client:
        for _ in range(60):
            stack.enter_context(call(running.server.port, WATCH, b""))
        time.sleep(0.5)
        assert client.generate([5], max_new_tokens=2).wait().token_ids == [5, 5]
        with grpc.insecure_channel(running.target) as channel:
            health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
            assert health.status == health_pb2.HealthCheckResponse.SERVING


def test_what_is_asked_of_health_is_small_and_known() -> None:
    with running_server(CONFIG) as (running, _), grpc.insecure_channel(running.target) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for service, code in (("nobody.Here", "NOT_FOUND"), ("x" * 2**21, "INVALID_ARGUMENT")):
            with pytest.raises(grpc.RpcError) as caught:
                stub.Check(health_pb2.HealthCheckRequest(service=service))
            assert caught.value.code().name == code
        unknown = next(stub.Watch(health_pb2.HealthCheckRequest(service="nobody.Here")))
        assert unknown.status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        with pytest.raises(grpc.RpcError) as caught:
            channel.unary_unary(CHECK)(b"\xff\xff")
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
