"""OpenTelemetry: one span per Generate, a child of the caller's `traceparent`, when --otlp-traces-endpoint is given."""

from __future__ import annotations

import time
from typing import Any

from grpc.aio import ServicerContext

from jqserve.errors import UnsupportedError
from jqserve.server.generation import Generation


class Tracer:
    """Makes the spans. Raises `UnsupportedError` when the optional packages are absent."""

    def __init__(self, service: str, endpoint: str | None, *, exporter: Any = None) -> None:
        """`endpoint`: an OTLP/gRPC collector, "http://host:4317"; `exporter` replaces it (tests)."""
        try:
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

            if exporter is None:
                from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

                processor: Any = BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint))
            else:
                processor = SimpleSpanProcessor(exporter)
        except ImportError as error:
            raise UnsupportedError(
                f"--otlp-traces-endpoint needs OpenTelemetry ({error}); pip install 'jqserve[tracing]'"
            ) from None
        self._provider = TracerProvider(resource=Resource.create({"service.name": service}))
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("jqserve.server")
        self._propagator = TraceContextTextMapPropagator()

    def start(self, context: ServicerContext, generation: Generation) -> Trace:
        metadata = {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}
        parent = self._propagator.extract(metadata)
        span = self._tracer.start_span("jqserve.generate", context=parent)
        span.set_attribute("gen_ai.request.id", generation.request_id)
        span.set_attribute("gen_ai.usage.input_tokens", generation.prompt_tokens)
        span.set_attribute("gen_ai.request.n", len(generation.sequences))
        return Trace(span)

    def close(self) -> None:
        """Sends what is waiting."""
        self._provider.shutdown()


class Trace:
    """One request's span."""

    def __init__(self, span: Any) -> None:
        self._span = span
        self._began = time.time_ns()

    def end(self, generation: Generation, tokens: int, outcome: str) -> None:
        """Adds the first token of each sequence as an event, at its own time, and closes the span."""
        for sequence in generation.sequences:
            if sequence.tokens:
                at = self._began + int(sequence.first_seconds * 1e9)
                self._span.add_event("first token", {"index": sequence.index}, timestamp=at)
        self._span.set_attribute("gen_ai.usage.output_tokens", tokens)
        self._span.set_attribute("jqserve.cached_tokens", generation.sequences[0].cached_tokens)
        self._span.set_attribute("jqserve.outcome", outcome)
        self._span.end()
