"""OpenTelemetry: one span per Generate, and per sequence of a Score, a child of the caller's `traceparent`, when
--otlp-traces-endpoint is given."""

from __future__ import annotations

import threading
import time
from typing import Any

from grpc.aio import ServicerContext

from jqserve.errors import UnsupportedError
from jqserve.server.generation import Generation
from jqserve.server.outage import Outage

CLOSE_SECONDS = 5.0  # for the last spans; the SDK would wait half a minute for a collector that does not answer


class Tracer:
    """Makes the spans. Raises `UnsupportedError` when the optional packages are absent."""

    def __init__(self, service: str, endpoint: str | None, *, exporter: Any = None) -> None:
        """`endpoint`: an OTLP/gRPC collector: "http://host:4317", the same without "http://" (as SGLang and smg write
        it), or "https://host:4317"; `exporter` replaces it (tests)."""
        self._outage: Outage | None = None
        try:
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor
            from opentelemetry.trace import SpanKind, StatusCode
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

            if exporter is None:
                from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

                where = endpoint if endpoint and "://" in endpoint else f"http://{endpoint}"
                exporter = OTLPSpanExporter(endpoint=where)
                self._outage = Outage(exporter, where)
                processor: Any = BatchSpanProcessor(self._outage)  # type: ignore[arg-type]  # its base may be absent
            else:
                processor = SimpleSpanProcessor(exporter)
        except ImportError as error:
            raise UnsupportedError(
                f"--otlp-traces-endpoint needs OpenTelemetry ({error}); pip install 'jqserve[tracing]'"
            ) from None
        self._exporter = exporter
        self._kind, self._failed = SpanKind.SERVER, StatusCode.ERROR
        resource = Resource.create({"service.name": service})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)  # `close` does it
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("jqserve.server")
        self._propagator = TraceContextTextMapPropagator()

    def start(self, context: ServicerContext, generation: Generation) -> Trace:
        metadata = {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}
        parent = self._propagator.extract(metadata)
        what = "score" if generation.scored else "generate"
        span = self._tracer.start_span(f"jqserve.{what}", context=parent, kind=self._kind)
        span.set_attribute("gen_ai.request.id", generation.request_id)
        span.set_attribute("gen_ai.usage.input_tokens", generation.prompt_tokens)
        span.set_attribute("gen_ai.request.n", len(generation.sequences))
        return Trace(span, self._failed)

    def close(self) -> None:
        """Sends what is waiting, for at most `CLOSE_SECONDS`, and not at all when nobody took the last spans either."""
        give_up = threading.Timer(CLOSE_SECONDS, self._exporter.shutdown)
        give_up.daemon = True
        if self._outage is not None and self._outage.away:
            self._exporter.shutdown()
        else:
            give_up.start()
        self._provider.shutdown()
        give_up.cancel()
        if self._outage is not None:
            self._outage.close()


class Trace:
    """One request's span."""

    def __init__(self, span: Any, failed: Any) -> None:
        """`failed`: OpenTelemetry's status of a span that ended in an error."""
        self._span, self._failed = span, failed
        self._began = time.time_ns()

    def end(self, generation: Generation, tokens: int, outcome: str, *, failed: bool = False) -> None:
        """Adds the first token of each sequence as an event, at its own time, and closes the span."""
        for sequence in generation.sequences:
            if sequence.tokens:
                at = self._began + int(sequence.first_seconds * 1e9)
                self._span.add_event("first token", {"index": sequence.index}, timestamp=at)
        self._span.set_attribute("gen_ai.usage.output_tokens", tokens)
        self._span.set_attribute("jqserve.cached_tokens", generation.sequences[0].cached_tokens)
        self._span.set_attribute("jqserve.outcome", outcome)
        if failed:
            self._span.set_status(self._failed, outcome)
        self._span.end()
