"""What Prometheus and a collector see, with the echoing engine; the dashboard asks for nothing else."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from prometheus_client.parser import text_string_to_metric_families

from jqserve.cli import top
from jqserve.client import Client, ServerError
from jqserve.server import metrics_http
from jqserve.server.config import ServerConfig
from jqserve.server.histogram import Histogram
from jqserve.server.pb import jqserve_pb2 as pb
from jqserve.server.throughput import Throughput
from jqserve.server.tracing import Tracer
from tests.server.fake_engine import BROKEN, SLOW
from tests.server.running_server import Running, running_server

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ServerConfig("/models/echo", port=0, ids_only=True, served_model_name="echo", metrics_port=0)


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[Running, Client]]:
    with running_server(CONFIG) as pair:
        yield pair


def scrape(running: Running) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    """sample name -> labels (without the model's) -> value"""
    url = f"http://127.0.0.1:{running.server.metrics_port}/metrics"
    text = urllib.request.urlopen(url, timeout=10).read().decode()
    found: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            assert sample.labels["model_name"] == "echo", sample
            labels = tuple(sorted((k, v) for k, v in sample.labels.items() if k != "model_name"))
            found.setdefault(sample.name, {})[labels] = sample.value
    return found


def test_requests_are_counted(server: tuple[Running, Client]) -> None:
    running, client = server
    before = scrape(running)

    def grew(name: str, **labels: str) -> float:
        key = tuple(sorted(labels.items()))
        return after[f"jqserve:{name}"].get(key, 0) - before.get(f"jqserve:{name}", {}).get(key, 0)

    client.generate([5, 6], max_new_tokens=9, n=2, seed=1).wait()
    client.generate([5, 6, 7], max_new_tokens=5, seed=1, flush_tokens=1).wait()
    for options in ({"n": 0}, {"seed": BROKEN}):
        with pytest.raises(ServerError):
            client.generate([5], **options).wait()  # type: ignore[typeddict-item]
    cancelled = client.generate([5], max_new_tokens=400, seed=SLOW)
    next(cancelled.events())
    cancelled.cancel()
    while running.server.frontend.generations:
        time.sleep(0.01)
    after = scrape(running)
    assert grew("num_requests_total") == 4 and grew("num_aborted_requests_total") == 1
    assert grew("prompt_tokens_total") == 2 + 3 + 1 + 1
    assert grew("finished_sequences_total", reason="length") == 3
    assert grew("grpc_requests_total", method="Generate", code="OK") == 2
    assert grew("grpc_requests_total", method="Generate", code="INVALID_ARGUMENT") == 1
    assert grew("grpc_requests_total", method="Generate", code="INTERNAL") == 1
    assert grew("grpc_requests_total", method="Generate", code="CANCELLED") == 1
    assert grew("e2e_request_latency_seconds_count") == grew("time_to_first_token_seconds_count") == 3
    assert grew("generation_tokens_histogram_sum") == 9 + 9 + 5
    assert grew("inter_token_latency_seconds_count") >= 8 + 8 + 4 + 2 - 8  # of the first flush only its first token
    assert grew("stream_flush_tokens_sum") >= 23


def test_scores_are_counted_apart(server: tuple[Running, Client]) -> None:
    running, client = server
    before = scrape(running)
    client.score([[5, 6, 7], [5, 6, 7, 8, 9]])
    after = scrape(running)
    kept = {name for name in before if re.search("prompt|num_|generation|finished_seq|latency|first_token", name)}
    assert len(kept) > 10 and {name: after[name] for name in kept} == {name: before[name] for name in kept}
    assert after["jqserve:scored_sequences_total"][()] - before["jqserve:scored_sequences_total"][()] == 2
    assert after["jqserve:scored_tokens_total"][()] - before["jqserve:scored_tokens_total"][()] == 8
    assert after["jqserve:grpc_requests_total"][("code", "OK"), ("method", "Score")] == 1


def test_the_engines_numbers_and_the_plan_are_there(server: tuple[Running, Client]) -> None:
    running, _ = server
    found = scrape(running)
    assert found["jqserve:ready"][()] == 1
    assert found["jqserve:kernel_plan_bytes"][(("kernel", "unknown"), ("scheme", "int4"))] == 1000
    for name in ("num_running_reqs", "num_queue_reqs", "token_usage", "gen_throughput", "cache_hit_rate", "free_pages"):
        assert found[f"jqserve:{name}"][()] >= 0
    assert {"jqserve:preemptions_total", "jqserve:recompilations_total", "jqserve:cached_tokens_total"} <= set(found)


def test_the_dashboard_is_current_and_asks_only_for_what_there_is(server: tuple[Running, Client]) -> None:
    spec = importlib.util.spec_from_file_location("make_dashboard", ROOT / "docs" / "grafana" / "make.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    text = (ROOT / "docs" / "grafana" / "jqserve.json").read_text()
    assert json.loads(text) == module.dashboard(), "run python docs/grafana/make.py"
    names = set(re.findall(r"jqserve:[a-z0-9_]+", text))
    assert len(names) > 20
    server[1].server_info()  # requests are counted by name once there are some
    phases = {"jqserve:host_seconds_total"}  # the echoing engine has no phases
    assert names - set(scrape(server[0])) <= phases


def test_a_metrics_port_in_use_is_the_users_to_change(server: tuple[Running, Client]) -> None:
    config = dataclasses.replace(CONFIG, metrics_port=server[0].server.metrics_port)
    second = Running(config, wait=False)
    assert second.over.wait(20) and second.code == 2


@pytest.mark.parametrize("path", ["/health", "/", "/metrics/x"])
def test_nothing_but_metrics_is_answered(server: tuple[Running, Client], path: str) -> None:
    """A probe of /health got the metrics and 200, whatever the server's state."""
    url = f"http://127.0.0.1:{server[0].server.metrics_port}"
    with pytest.raises(urllib.error.HTTPError, match="404") as caught:
        urllib.request.urlopen(url + path, timeout=10)
    assert b"metrics are at /metrics" in caught.value.read()
    for found in ("/metrics", "/metrics/", "/metrics?x=1"):
        assert b"jqserve:ready" in urllib.request.urlopen(url + found, timeout=10).read()


def test_the_metrics_port_bounds_its_threads_and_hangs_up_on_idlers(
    server: tuple[Running, Client], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Connections that say nothing, or a byte at a time, cost 16 threads at most, and not for long."""
    running, _ = server
    monkeypatch.setattr(metrics_http, "MAX_SECONDS", 1.5)
    before, began = threading.active_count(), time.monotonic()
    where = ("127.0.0.1", running.server.metrics_port)
    idlers = [socket.create_connection(where, timeout=10) for _ in range(60)]
    dripping, rest = idlers[0], idlers[1:]
    try:
        most = threading.active_count() - before
        # On a slow machine the first are hung up on before the last are accepted, which then wait in their place.
        assert any(idler.recv(100).startswith(b"HTTP/1.0 503") for idler in reversed(rest))
        assert max(most, threading.active_count() - before) <= metrics_http.MAX_CONNECTIONS
        with pytest.raises(OSError):
            while time.monotonic() - began < 20:
                dripping.sendall(b"G")
                time.sleep(0.1)
        assert 1 < time.monotonic() - began < 10
        while threading.active_count() > before:
            assert time.monotonic() - began < 10
            time.sleep(0.05)
        assert scrape(running)["jqserve:ready"][()] == 1
    finally:
        for idler in idlers:
            idler.close()


def test_histograms_count_as_prometheus_does() -> None:
    histogram = Histogram("h", "of what", (1, 2))
    for value, times in ((0.5, 1), (1, 2), (1.5, 1), (3, 2)):
        histogram.observe(value, times)
    samples = {(s.name, s.labels.get("le")): s.value for s in histogram.family((), ()).samples}
    assert samples["h_bucket", "1"] == 3 and samples["h_bucket", "2"] == 4 and samples["h_bucket", "+Inf"] == 6
    assert samples["h_sum", None] == 0.5 + 2 + 1.5 + 6


def test_throughput_is_that_of_the_last_seconds() -> None:
    throughput = Throughput()
    for second in range(20):
        throughput.sample(float(second), 100 * min(second, 10))
    assert throughput.rate == 0
    throughput.sample(20.0, 1000 + 500)
    assert throughput.rate == pytest.approx(100)


def test_a_span_is_the_callers_child_and_ends_with_the_request(server: tuple[Running, Client]) -> None:
    pytest.importorskip("opentelemetry.sdk")
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    running, client = server
    exporter = InMemorySpanExporter()
    running.server.frontend.tracer = Tracer("jqserve", None, exporter=exporter)
    try:
        parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
        request = pb.GenerateRequest(request_id="traced", token_ids=pb.TokenIds(ids=[5, 6]))
        request.sampling.max_new_tokens = 3
        with grpc.insecure_channel(running.target) as channel:
            from jqserve.server.pb import jqserve_pb2_grpc

            stub = jqserve_pb2_grpc.InferenceStub(channel)
            list(stub.Generate(request, metadata=(("traceparent", parent),)))
        client.generate([5], max_new_tokens=1).wait()
    finally:
        running.server.frontend.tracer = None
    first, second = exporter.get_finished_spans()
    assert f"{first.context.trace_id:032x}" == "0af7651916cd43dd8448eb211c80319c"
    assert first.parent is not None and f"{first.parent.span_id:016x}" == "b7ad6b7169203331"
    attributes: Any = first.attributes
    assert attributes["gen_ai.request.id"] == "traced" and attributes["gen_ai.usage.output_tokens"] == 3
    assert attributes["jqserve.outcome"] == "length" and [event.name for event in first.events] == ["first token"]
    assert second.parent is None


def test_top_shows_one_look(server: tuple[Running, Client], capsys: pytest.CaptureFixture[str]) -> None:
    import argparse

    parser = argparse.ArgumentParser()
    top.add_arguments(parser)
    assert top.run(parser.parse_args([server[0].target, "--once"])) == 0
    shown = capsys.readouterr().out
    assert "ready" in shown and "KV pages" in shown and "running" in shown
