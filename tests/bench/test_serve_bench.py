"""The serving benchmark's arithmetic by hand, and the scripts themselves once, on tiny models."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from bench.decode import beside
from bench.latency import Record, percentile, spread, summarize
from bench.launch_cost import told
from bench.load_inprocess import drive
from bench.profile import idle, table
from bench.serve import cases, items_of, picture, with_costs
from bench.startup import caches
from bench.step_gaps import gaps
from bench.svg import ticks
from bench.workload import Item
from jqserve.errors import QueueFullError

ROOT = Path(__file__).resolve().parents[2]


def test_random_workload() -> None:
    items = items_of("random:100/20", 50, 1000, 0.5, seed=1)
    assert len(items) == 50 and items == items_of("random:100/20", 50, 1000, 0.5, seed=1)
    assert all(50 <= len(i.prompt) <= 100 and 10 <= i.output <= 20 for i in items)
    assert len({len(i.prompt) for i in items}) > 10 and len({i.prompt for i in items}) == 50
    assert all(125 <= token < 875 for i in items for token in i.prompt)
    fixed = items_of("random:100/20", 3, 1000, 1.0, seed=2)
    assert {(len(i.prompt), i.output) for i in fixed} == {(100, 20)}


def test_shared_prefix_workload() -> None:
    items = items_of("shared:3x4:50+10/7", 99, 1000, 1.0, seed=0)
    assert len(items) == 12 and {(len(i.prompt), i.output) for i in items} == {(60, 7)}
    prefixes = [i.prompt[:50] for i in items]
    assert sorted(prefixes.count(p) for p in set(prefixes)) == [4, 4, 4]


@pytest.mark.parametrize("name", ["random:5", "shared:3:50+10/7", "other:1/2"])
def test_unknown_workloads_are_told(name: str) -> None:
    with pytest.raises(SystemExit, match="expected random"):
        items_of(name, 1, 100, 1.0, 0)


def records() -> list[Record]:
    one = Record(10, began=1.0, arrivals=[(1.5, 1), (1.7, 4), (2.1, 2)], ended=2.2, cached_tokens=5)
    one.server_first, one.server_total = 0.4, 1.0
    two = Record(30, began=2.0, arrivals=[(2.1, 1)], ended=3.0)
    return [one, two, Record(5, began=0.0, error="RESOURCE_EXHAUSTED")]


def test_a_record() -> None:
    one, two, _ = records()
    assert one.output_tokens == 7 and one.ttft == 0.5
    assert one.tpot == pytest.approx(0.6 / 6) and two.tpot is None
    assert one.gaps == pytest.approx([0.2, 0, 0, 0, 0.4, 0])
    assert one.server_tpot == pytest.approx(0.1)


def test_summary() -> None:
    row = summarize(records())
    assert (row["requests"], row["failed"], row["seconds"]) == (3, 1, 2.0)
    assert (row["input_tokens_per_second"], row["output_tokens_per_second"]) == (20, 4)
    assert row["mean_concurrency"] == 1.1 and row["cached_share"] == 0.125
    assert row["ttft_ms"] == {"mean": 300.0, "p50": 100.0, "p99": 500.0}
    assert row["itl_ms"]["mean"] == 100.0 and row["itl_ms"]["p50"] == 0 and row["itl_ms"]["p99"] == 400.0
    assert summarize([records()[2]]) == {"requests": 1, "failed": 1, "error": "RESOURCE_EXHAUSTED"}


def test_percentiles() -> None:
    values = [float(i) for i in range(1, 101)]
    assert (percentile(values, 0.5), percentile(values, 0.99), percentile([3.0], 0.99)) == (50, 99, 3)
    assert spread([]) is None


def test_what_grpc_costs() -> None:
    rows: list[dict[str, Any]] = [
        {"mode": "grpc", "concurrency": 8, "output_tokens_per_second": 97.0},
        {"mode": "engine", "concurrency": 8, "output_tokens_per_second": 100.0},
        {"mode": "grpc", "concurrency": 16, "output_tokens_per_second": 97.0},
    ]
    with_costs(rows)
    assert rows[0]["grpc_cost"] == 0.03 and "grpc_cost" not in rows[2]


def test_the_picture_is_xml_with_every_point() -> None:
    rows = [
        {"mode": mode, "tpot_ms": {"p50": n}, "output_tokens_per_second": 100.0 * n}
        for mode in ("grpc", "<engine>")
        for n in (1, 2, 3)
    ]
    tree = ElementTree.fromstring(picture(rows, "a & b"))
    assert len(tree.findall(".//{*}circle")) == 6 and len(tree.findall(".//{*}polyline")) == 2
    assert ticks(0, 95) == [0, 20, 40, 60, 80, 100] and ticks(0, 0.3)[-1] == pytest.approx(0.3)


def test_kernel_table_and_gaps() -> None:
    spans = [(0.0, 4.0, "a"), (5.0, 2.0, "b"), (6.0, 3.0, "a"), (9.0, 1.0, "b")]
    assert table(spans, 2) == [
        {"kernel": "a", "launches": 1.0, "us": 3.5, "share": 0.7},
        {"kernel": "b", "launches": 1.0, "us": 1.5, "share": 0.3},
    ]
    assert idle(spans) == {"span_us": 10.0, "idle_us": 1.0, "idle_share": 0.1}


def test_gaps_between_dispatches() -> None:
    """Two kernels that each step runs twice, one that marks it; 5 us between steps, 1 before each other kernel."""
    spans, now = [], 0.0
    for name in ["b", "a", "mark"] + ["a", "b", "a", "b", "mark"] * 4 + ["a", "b"]:
        now += 5.0 if spans and spans[-1][2] == "mark" else 1.0
        spans.append((now, 2.0, name))
        now += 2.0
    found = gaps(spans, 4)
    assert found == {
        "dispatch_us": 19.0,
        "between_us": 5.0,
        "between_share": 0.2632,
        "within_us": 4.0,
        "kernels": 5,
        "counted": 4,
    }
    with pytest.raises(ValueError, match="runs once in each of 40"):
        gaps(spans, 40)


def test_what_xla_says_of_its_updates() -> None:
    log = (
        "I0000 command_buffer_thunk.cc:241] Update command buffer on device #0 by recoding command buffer cmd sequence "
        "after 1 executions since last update; num_commands=303; updated_allocs=3\n"
        "I0000 command_executor.cc:500] Updated 303 commands in 2100 \u03bcs (skipped 12 command updates)\n"
        + 2
        * "I0000 traced_command_buffer.cc:90] Command buffer trace cache hit for command CustomCall\n"
    )
    assert told(log) == {
        "updates": [("303", "3")],
        "commands_us_skipped": [("303", "2100", "12")],
        "traces": {"hit": 2},
    }


def run(name: str, out: Path, *flags: str) -> dict[str, Any]:
    command = [sys.executable, "-m", f"bench.{name}", "--quick", "--out", str(out), *flags]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    text = (out / f"{name}.json").read_text()
    assert not re.search('failed": [^0]', text), text[:4000]  # benches go on past what fails, and note it
    return json.loads(text)


@pytest.mark.slow
def test_decode_bench(tmp_path: Path) -> None:
    rows = run("decode", tmp_path, "--schemes", "fp8", "--points", "2x40", "--decode-steps", "4")["rows"]
    assert len(rows) == 1 and rows[0]["decode_steps"] == 4 and rows[0]["compilations_while_serving"] == 0
    assert rows[0]["step_ms"] > 0 and set(rows[0]["host_ms"]) == {"schedule", "launch", "wait", "emit", "dispatch"}
    assert rows[0]["host_ms"]["dispatch"] > 0


@pytest.mark.slow
def test_step_gaps_bench(tmp_path: Path) -> None:
    rows = run("step_gaps", tmp_path, "--dispatches", "6")["rows"]
    assert [row["decode_steps"] for row in rows] == [1, 2] and all(row["kernels"] > 1 for row in rows)


@pytest.mark.slow
def test_profile_bench(tmp_path: Path) -> None:
    result = run("profile", tmp_path, "--scheme", "bf16", "--steps", "2")
    assert result["steps"] == 2 and result["versions"]["jax"]


@pytest.mark.slow
def test_workloads_with_a_level_of_their_own() -> None:
    args = argparse.Namespace(workload="random:8/8@64,random:9/9@2.5/s,random:1/1", rate=None, concurrency="1,2")
    closed = [{"rate": None, "concurrency": n} for n in (64, 1, 2)]
    assert cases(args) == [
        ("random:8/8", closed[0]),
        ("random:9/9", {"rate": 2.5, "concurrency": None}),
        ("random:1/1", closed[1]),
        ("random:1/1", closed[2]),
    ]
    args.workload = "random:8/8@many"
    with pytest.raises(SystemExit, match="expected requests at once"):
        cases(args)


def test_serve_bench(tmp_path: Path) -> None:
    result = run("serve", tmp_path, "--scheme", "bf16")
    by_mode = {row["mode"]: row for row in result["rows"]}
    assert set(by_mode) == {"grpc", "engine"} and "grpc_cost" in by_mode["grpc"]
    assert all(row["requests"] == 4 and row["failed"] == 0 for row in result["rows"])
    assert (tmp_path / "serve.svg").read_text().startswith("<svg")


@pytest.mark.slow
def test_startup_bench(tmp_path: Path) -> None:
    cold, warm = run("startup", tmp_path, "--scheme", "fp8")["rows"]
    assert cold["compiled"] >= 1 and cold["from_cache"] == 0
    assert warm["compiled"] == 0 and warm["from_cache"] == cold["compiled"]
    phases = {"import", "device", "load", "pages", "warm_up", "first_token"}
    assert set(cold["phases"]) == set(warm["phases"]) == phases
    assert warm["total"] == pytest.approx(sum(warm["phases"].values()), abs=0.1)


def test_a_start_is_called_cold_only_where_nothing_is_kept(tmp_path: Path) -> None:
    kinds, folders = zip(*caches("cold,warm,cold,warm,warm", [], tmp_path))
    assert kinds == ("cold", "warm", "cold", "warm", "warm")
    a, b = folders[0], folders[2]
    assert folders == (a, a, b, b, b) and a != b
    for runs, flags, words in [
        ("warm", [], "it is not warm; give cold,warm"),
        ("cold,hot", [], "hot is neither"),
        ("cold", ["--compilation-cache-dir=/tmp/x"], "the folder is chosen here"),
    ]:
        with pytest.raises(SystemExit, match=words):
            caches(runs, flags, tmp_path)


def test_a_figure_stands_only_beside_the_same_cache() -> None:
    assert beside("fp8", 64, 1024, "bfloat16") == {"vllm": 10439, "aim": 12000}
    assert beside("fp8", 64, 1024, "fp8_e4m3") == beside("fp8", 65, 1024, "bfloat16") == {"vllm": None, "aim": None}


@pytest.mark.parametrize("rate", [None, 1e6])
def test_an_engine_that_takes_no_more_fails_those_requests_and_not_the_bench(rate: float | None) -> None:
    class Full:
        def add(self, request: Any) -> None:
            raise QueueFullError("2 requests wait already")

        def has_work(self) -> bool:
            return False

    engine: Any = Full()
    records = drive(engine, [Item((1, 2), 3)] * 4, concurrency=None if rate else 2, rate=rate)
    assert [record.error for record in records] == ["2 requests wait already"] * 4
    assert summarize(records)["failed"] == 4
