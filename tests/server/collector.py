"""A real OTLP/gRPC collector, for the tests: keeps every span that it is sent."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest

pytest.importorskip("opentelemetry.sdk")
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as pb
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as rpc


@dataclasses.dataclass(frozen=True)
class Collected:
    """One span, as it came over the wire."""

    service: str
    message: Any  # opentelemetry.proto.trace.v1.trace_pb2.Span

    @property
    def trace_id(self) -> str:
        return str(self.message.trace_id.hex())

    @property
    def span_id(self) -> str:
        return str(self.message.span_id.hex())

    @property
    def parent_id(self) -> str:
        return str(self.message.parent_span_id.hex())

    @property
    def attributes(self) -> dict[str, Any]:
        return {a.key: getattr(a.value, a.value.WhichOneof("value")) for a in self.message.attributes}


class Collector(rpc.TraceServiceServicer):
    """`spans` grows; `release` lets go calls that `hold` has stopped before their answers."""

    def __init__(self, *, hold: bool = False) -> None:
        self.spans: list[Collected] = []
        self.called = threading.Event()
        self.release = threading.Event()
        if not hold:
            self.release.set()

    def Export(self, request: Any, context: grpc.ServicerContext) -> Any:
        self.called.set()
        self.release.wait(60)
        for resource in request.resource_spans:
            service = next(a.value.string_value for a in resource.resource.attributes if a.key == "service.name")
            self.spans += [Collected(service, span) for scope in resource.scope_spans for span in scope.spans]
        return pb.ExportTraceServiceResponse()

    def named(self, name: str) -> list[Collected]:
        return [span for span in self.spans if span.message.name == name]


@contextlib.contextmanager
def collector(port: int = 0, *, hold: bool = False) -> Iterator[tuple[Collector, int]]:
    """Listens on 127.0.0.1; yields it and its port."""
    servicer = Collector(hold=hold)
    server = grpc.server(ThreadPoolExecutor(4))
    rpc.add_TraceServiceServicer_to_server(servicer, server)
    bound = server.add_insecure_port(f"127.0.0.1:{port}")
    server.start()
    try:
        yield servicer, bound
    finally:
        servicer.release.set()
        server.stop(None).wait()
