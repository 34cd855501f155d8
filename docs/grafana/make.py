#!/usr/bin/env python
"""Writes jqserve.json, a Grafana dashboard of a fleet of workers: import it, and choose the Prometheus data source."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

P = "jqserve:"
PLAN = 'jqserve:kernel_plan_bytes{model_name=~"$model"}'
WHERE = '{model_name=~"$model"}'


def rate(name: str, by: str = "") -> str:
    inner = f"rate({P}{name}{WHERE}[1m])"
    return f"sum by ({by}) ({inner})" if by else f"sum({inner})"


def quantile(q: float, name: str) -> str:
    return f"histogram_quantile({q}, sum by (le) (rate({P}{name}_bucket{WHERE}[1m])))"


def quantiles(name: str) -> list[tuple[str, str]]:
    return [(f"p{int(q * 100)}", quantile(q, name)) for q in (0.5, 0.9, 0.99)]


def total(name: str) -> str:
    return f"sum({P}{name}{WHERE})"


#: title, unit, [(legend, query)]
PANELS: list[tuple[str, str, list[tuple[str, str]]]] = [
    ("Tokens", "tokens/s", [("generated", rate("generation_tokens_total")), ("prompt", rate("prompt_tokens_total"))]),
    ("Sequences", "short", [("running", total("num_running_reqs")), ("waiting", total("num_queue_reqs"))]),
    ("Time to first token", "s", quantiles("time_to_first_token_seconds")),
    ("Between tokens", "s", quantiles("inter_token_latency_seconds")),
    ("Whole request", "s", quantiles("e2e_request_latency_seconds")),
    ("RPCs by status", "reqps", [("{{code}}", rate("grpc_requests_total", "code"))]),
    ("KV pages in use", "percentunit", [("{{instance}}", f"{P}token_usage{WHERE}")]),
    ("Prefix cache hits", "percentunit", [("{{instance}}", f"{P}cache_hit_rate{WHERE}")]),
    ("Free and cached pages", "short", [("free", total("free_pages")), ("cached", total("cached_pages"))]),
    ("Preemptions", "short", [("{{instance}}", f"rate({P}preemptions_total{WHERE}[1m])")]),
    ("Evictions", "short", [("{{instance}}", f"rate({P}evictions_total{WHERE}[1m])")]),
    ("Recompilations (should stay 0)", "short", [("{{instance}}", f"{P}recompilations_total{WHERE}")]),
    ("Engine's host thread by phase", "percentunit", [("{{phase}}", rate("host_seconds_total", "phase"))]),
    ("Sequences in a step", "short", [("{{instance}}", f"{P}mean_batch{WHERE}")]),
    ("Tokens a message", "short", quantiles("stream_flush_tokens")),
    ("Prompt lengths", "short", quantiles("prompt_tokens_histogram")),
    ("Answer lengths", "short", quantiles("generation_tokens_histogram")),
    ("Weights by kernel", "bytes", [("{{scheme}}: {{kernel}}", f"sum by (scheme, kernel) ({PLAN})")]),
]  # fmt: skip


def panel(index: int, title: str, unit: str, queries: list[tuple[str, str]]) -> dict[str, Any]:
    source = {"type": "prometheus", "uid": "${source}"}
    return {
        "id": index + 1,
        "type": "timeseries",
        "title": title,
        "datasource": source,
        "gridPos": {"h": 8, "w": 8, "x": index % 3 * 8, "y": index // 3 * 8},
        "fieldConfig": {"defaults": {"unit": unit, "min": 0}, "overrides": []},
        "targets": [
            {"refId": chr(65 + i), "expr": query, "legendFormat": legend, "datasource": source}
            for i, (legend, query) in enumerate(queries)
        ],
    }


def dashboard() -> dict[str, Any]:
    model = f"label_values({P}num_running_reqs, model_name)"
    variables = [
        {"name": "source", "label": "Data source", "type": "datasource", "query": "prometheus"},
        {
            "name": "model",
            "label": "Model",
            "type": "query",
            "datasource": {"type": "prometheus", "uid": "${source}"},
            "query": model,
            "includeAll": True,
            "allValue": ".*",
            "current": {"text": "All", "value": "$__all"},
            "refresh": 2,
        },
    ]
    return {
        "title": "jqserve",
        "uid": "jqserve",
        "schemaVersion": 39,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "templating": {"list": variables},
        "panels": [panel(i, *entry) for i, entry in enumerate(PANELS)],
    }


if __name__ == "__main__":
    Path(__file__).with_name("jqserve.json").write_text(json.dumps(dashboard(), indent=1) + "\n")
