"""Spans over the wire, to a real OTLP collector: there, away, back again, and silent."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Iterator

import grpc
import pytest

from jqserve.client import Client
from jqserve.server.config import ServerConfig
from jqserve.server.pb import jqserve_pb2 as pb
from jqserve.server.pb import jqserve_pb2_grpc, vllm_engine_pb2_grpc
from jqserve.server.pb import vllm_engine_pb2 as vll
from tests.gateway.smg import free_port
from tests.server.collector import collector
from tests.server.fake_engine import BROKEN
from tests.server.program import eventually
from tests.server.running_server import Running

CONFIG = ServerConfig("/models/echo", port=0, ids_only=True, served_model_name="echo")
TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SERVER_KIND, ERROR = 2, 2  # of the protocol: Span.SPAN_KIND_SERVER, Status.STATUS_CODE_ERROR


@contextlib.contextmanager
def serving(endpoint: str) -> Iterator[Running]:
    running = Running(dataclasses.replace(CONFIG, otlp_traces_endpoint=endpoint))
    try:
        yield running
    finally:
        running.drain()
        assert running.over.wait(60), "the server did not stop"


@pytest.fixture(autouse=True)
def spans_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")  # ms; the SDK's own is seconds


@pytest.mark.parametrize("form", ["http://{}", "{}"], ids=["url", "host:port"])
def test_a_span_reaches_the_collector_as_the_callers_child(form: str) -> None:
    request = pb.GenerateRequest(request_id="traced", token_ids=pb.TokenIds(ids=[5, 6]))
    request.sampling.max_new_tokens, request.sampling.n = 3, 2
    metadata = (("traceparent", f"00-{TRACE}-{SPAN}-01"), ("tracestate", "vendor=1"))
    with collector() as (spans, port), serving(form.format(f"127.0.0.1:{port}")) as running:
        before = time.time_ns()
        with grpc.insecure_channel(running.target) as channel:
            list(jqserve_pb2_grpc.InferenceStub(channel).Generate(request, metadata=metadata))
            list(
                vllm_engine_pb2_grpc.VllmEngineStub(channel).Generate(
                    vll.GenerateRequest(
                        request_id="compatible",
                        tokenized=vll.TokenizedInput(input_ids=[5]),
                        sampling_params=vll.SamplingParams(max_tokens=2),
                    ),
                    metadata=metadata,
                )
            )
        after = time.time_ns()
        eventually(lambda: len(spans.spans) == 2, 30)  # while the server runs, not only at its end
    native, compatible = spans.spans
    for span in (native, compatible):
        assert (span.service, span.message.name, span.message.kind) == ("jqserve", "jqserve.generate", SERVER_KIND)
        assert (span.trace_id, span.parent_id, span.message.trace_state) == (TRACE, SPAN, "vendor=1")
        assert span.message.status.code != ERROR
        assert before <= span.message.start_time_unix_nano <= span.message.end_time_unix_nano <= after
    assert native.span_id != compatible.span_id
    assert native.attributes == {
        "gen_ai.request.id": "traced",
        "gen_ai.request.n": 2,
        "gen_ai.usage.input_tokens": 2,
        "gen_ai.usage.output_tokens": 6,
        "jqserve.cached_tokens": 0,
        "jqserve.outcome": "length, length",
    }
    assert [event.name for event in native.message.events] == ["first token"] * 2
    assert sorted(event.attributes[0].value.int_value for event in native.message.events) == [0, 1]
    assert compatible.attributes["gen_ai.request.id"] == "compatible"


def test_a_request_that_fails_or_has_no_parent_has_a_span_too_and_one_not_sampled_none() -> None:
    with collector() as (spans, port):
        with serving(f"http://127.0.0.1:{port}") as running, grpc.insecure_channel(running.target) as channel:
            stub = jqserve_pb2_grpc.InferenceStub(channel)
            request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5]))
            request.sampling.seed = BROKEN
            with pytest.raises(grpc.RpcError):
                list(stub.Generate(request))
            request.sampling.seed, request.sampling.max_new_tokens = 1, 2
            list(stub.Generate(request, metadata=(("traceparent", f"00-{TRACE}-{SPAN}-00"),)))
            list(stub.Generate(request, metadata=(("traceparent", "nonsense"),)))
        # the server's end has sent what was waiting
        failed, alone = spans.spans
    assert failed.message.status.code == ERROR and "broken" in failed.message.status.message
    assert "broken" in failed.attributes["jqserve.outcome"]
    assert failed.parent_id == alone.parent_id == "" and failed.trace_id != alone.trace_id


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Of ours and of the SDK, as an operator sees them."""
    names = ("jqserve", "opentelemetry")
    return [r.getMessage() for r in caplog.records if r.name.startswith(names) and r.levelno >= logging.WARNING]


def test_without_a_collector_serving_goes_on_with_one_warning(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then one comes, and is used; then it goes, which is news again."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "0.5")  # many failures in little time
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "8")
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "4")
    caplog.set_level(logging.INFO)
    port = free_port()
    with serving(f"http://127.0.0.1:{port}") as running, Client(running.target) as client:
        outage = running.server.frontend.tracer._outage  # type: ignore[union-attr]
        assert outage is not None
        exports = []  # one for each batch that the collector was offered
        export = outage._exporter.export
        monkeypatch.setattr(outage._exporter, "export", lambda batch: (exports.append(len(batch)), export(batch))[1])

        def serving_until(condition: Callable[[], bool]) -> None:
            def asked() -> bool:
                assert client.generate([5, 6], max_new_tokens=2).wait().token_ids == [5, 6]
                return condition()

            eventually(asked, 60)

        serving_until(lambda: len(exports) >= 6)
        for _ in range(50):  # the queue of eight is full
            serving_until(lambda: True)
        (said,) = warnings(caplog)
        assert f"http://127.0.0.1:{port} takes no spans" in said and "UNAVAILABLE" in said
        with collector(port) as (spans, _):
            serving_until(lambda: bool(spans.spans) and not outage.away)
        assert len(warnings(caplog)) == 1 and "takes spans again" in caplog.text
        serving_until(lambda: len(warnings(caplog)) > 1)
        more = len(exports) + 4
        serving_until(lambda: len(exports) >= more)
    assert len(warnings(caplog)) == 2


def test_a_collector_that_is_away_does_not_hold_the_end(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "120")  # it tries again after 1, 2, 4, 8, 16 s
    monkeypatch.setattr("jqserve.server.tracing.CLOSE_SECONDS", 120)
    with serving(f"http://127.0.0.1:{free_port()}") as running, Client(running.target) as client:
        client.generate([5], max_new_tokens=1).wait()
        eventually(lambda: len(warnings(caplog)) == 1, 30)
        client.generate([5], max_new_tokens=1).wait()
        began = time.monotonic()
    assert time.monotonic() - began < 20 and len(warnings(caplog)) == 1


def test_a_collector_that_never_answers_holds_the_end_for_a_few_seconds(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "120")
    monkeypatch.setattr("jqserve.server.tracing.CLOSE_SECONDS", 0.5)
    with collector(hold=True) as (spans, port):
        with serving(f"http://127.0.0.1:{port}") as running, Client(running.target) as client:
            client.generate([5], max_new_tokens=1).wait()
            assert spans.called.wait(30)
            for _ in range(5):
                assert client.generate([5, 6], max_new_tokens=2).wait().token_ids == [5, 6]
            assert warnings(caplog) == []  # it may still answer
            began = time.monotonic()
        assert time.monotonic() - began < 20  # of 120
        (said,) = warnings(caplog)
        assert "takes no spans" in said
