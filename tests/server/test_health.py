"""The health service asks for no token, so nothing that is done to it may keep anybody else from being served."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from jqserve.client import Client
from jqserve.server.app import SERVICE
from jqserve.server.config import ServerConfig
from tests.server.closed_window import call
from tests.server.running_server import Running, running_server

CONFIG = ServerConfig("/models/echo", port=0, ids_only=True)
TOKEN = "s3cret"
WATCH, CHECK = "/grpc.health.v1.Health/Watch", "/grpc.health.v1.Health/Check"


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
