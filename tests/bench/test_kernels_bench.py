"""The acceptance table's script on tiny shapes, and its parent's manners with processes that hang or die."""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import pytest

from bench import kernels, peer_tasks
from bench.bars import LLAMA_8B
from bench.peer_tasks import row_of
from bench.quantize_tasks import call, quantize_alternatives
from bench.tasks import Rows, Task, run_tasks
from bench.timing import GpuLock, chain, replicas
from pallas_kernels.quantize.mosaic_sm90 import Split
from tests.pallas_kernels.aot import compile_for_h200

OURS = (
    "hbm",
    "w4a16",
    "fp8_row",
    "fp8_block",
    "int8_row",
    "w8a16",
    "xla_bf16",
    "quantize",
    "prefill",
    "decode",
    *kernels.OF_W4A16,
)


def arguments(**changes) -> argparse.Namespace:
    given = dict(
        rows=None, lock=None, skip="[]", quick=True, shapes="tiny", ms="1,16", threads=1, peers="", peer_seconds=1.0,
        jit_peers=False, deadline=time.time() + 120, budget=60.0, out="", name="kernels", groups="",
    )  # fmt: skip
    return argparse.Namespace(**(given | changes))


@pytest.mark.parametrize("group", OURS)
def test_quick(group, tmp_path):
    path = tmp_path / "rows.jsonl"
    kernels.run_group(arguments(group=group, rows=str(path)))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows and not [row for row in rows if "failed" in row]
    assert all((row["ok"] and row["us"] > 0) if group != "hbm" else row["bytes_per_second"] > 0 for row in rows)


def test_rotation_exceeds_the_l2_five_times():
    assert replicas(4096 * 4096 / 2) * 4096 * 4096 / 2 >= 250e6
    assert replicas(1e9) == 2 and replicas(1) == 40


def test_sums_need_every_shape_and_a_right_result():
    rows = [dict(op="w4a16", m=1, shape=s, us=10.0, kernel_us=9.0, ok=True, bytes=46_000_000) for s in LLAMA_8B]
    rows.append({"op": "hbm", "bytes_per_second": 4.6e12})
    more = kernels.finish(rows)
    assert more["sums"] == [dict(op="w4a16", m=1, us=40.0, kernel_us=36.0, bound_us=40.0, bar_us=50)]
    rows[0]["ok"] = False
    assert kernels.sums(rows) == []


def test_a_failure_is_a_row_and_the_rest_goes_on():
    def broken():
        raise ValueError("no such tile")

    rows = Rows(None, echo=False)
    tasks = [
        Task("a", broken, lambda c: {}),
        Task("b", lambda: 2, lambda c: {"us": c}),
        Task("c", lambda: 3, lambda c: {}),
    ]
    run_tasks(tasks, rows, GpuLock(None), deadline=time.time() + 60, skip=frozenset("c"))
    assert rows.rows == [{"key": "a", "failed": "ValueError: no such tile"}, {"key": "b", "us": 2}]


def test_what_the_time_does_not_reach_is_said():
    rows = Rows(None, echo=False)
    tasks = [Task("a", lambda: 1, lambda c: time.sleep(0.6) or {"us": c}), Task("b", lambda: 2, lambda c: {"us": c})]
    run_tasks(tasks, rows, GpuLock(None), deadline=time.time() + 0.5)
    assert rows.rows == [{"key": "a", "us": 1}, {"key": "b", "skipped": "out of time"}]


def test_the_lock_serves_the_lower_rank_first(tmp_path):
    import threading

    order = []
    first = GpuLock(tmp_path, 0)

    def wait(rank: int) -> None:
        lock = GpuLock(tmp_path, rank)
        with lock.hold(f"rank {rank}"):
            order.append(rank)

    with first.hold("first"):
        assert json.loads((tmp_path / "held.json").read_text())["what"] == "first"
        threads = [threading.Thread(target=wait, args=(rank,)) for rank in (7, 3)]
        for thread in threads:
            thread.start()
        while len(list(tmp_path.glob("want-*"))) < 2:
            time.sleep(0.01)
    for thread in threads:
        thread.join()
    assert order == [3, 7] and not (tmp_path / "held.json").exists()


CHILD = """
import json, os, sys, time
from pathlib import Path
from bench.tasks import Rows, Task, run_tasks
from bench.timing import GpuLock
rows, folder, skip = Path(sys.argv[1]), Path(sys.argv[2]), frozenset(json.loads(sys.argv[3]))
def run(key):
    if key == "hangs": time.sleep(600)
    if key == "dies": os._exit(7)
    if key == "breaks": raise RuntimeError("CUDA_ERROR_LAUNCH_FAILED")
    return {"us": 1.0}
tasks = [Task(k, lambda k=k: k, run, limit=0.3) for k in ("good", "hangs", "dies", "breaks", "last")]
run_tasks(tasks, Rows(rows, echo=False), GpuLock(folder), deadline=time.time() + 60, skip=skip)
"""


def test_hung_and_dead_processes_cost_one_row_each(tmp_path, monkeypatch):
    def start(self):
        import subprocess

        skip = json.dumps([row["key"] for row in self.rows()])
        command = [sys.executable, "-c", CHILD, str(self.path), str(tmp_path), skip]
        return subprocess.Popen(command, env={"JAX_PLATFORMS": "cpu", "PYTHONPATH": ":".join(sys.path)})

    monkeypatch.setattr(kernels.Group, "_start", start)
    group = kernels.Group("w4a16", arguments(), tmp_path, time.time() + 60)
    while group.tend(kernels._held(tmp_path)):
        time.sleep(0.05)
    rows = {row["key"]: row for row in group.rows()}
    assert rows["good"]["us"] == rows["last"]["us"] == 1.0
    assert "hung" in rows["hangs"]["failed"] and "died with 7" in rows["dies"]["failed"]
    assert "LAUNCH_FAILED" in rows["breaks"]["failed"] and len(rows) == 5


def test_peers_need_a_python_with_torch(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(peer_tasks, "python_with_torch", lambda: asked.append(1))
    tasks = peer_tasks.peer_tasks(tmp_path, LLAMA_8B, [1], Rows(None), seconds=1, jit=True)
    assert {"peer machete", "peer prefill", "peer deepgemm"} <= {task.key for task in tasks}
    with pytest.raises(RuntimeError, match="no Python with torch"):
        tasks[0].compile()
    monkeypatch.setattr(peer_tasks, "python_with_torch", lambda: asked.append(1) or "python3")
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "unpack.sh").write_text(f"echo x >> {tmp_path}/unpacked\n")
    assert [task.compile() for task in tasks[:4]] == ["python3"] * 4
    assert (tmp_path / "unpacked").read_text() == "x\n" and len(asked) == 2


def test_a_peer_line_in_our_words():
    line = dict(peer="marlin_vllm0.25.1", scheme="w8a16_g128", N=6144, K=4096, M=16, us=9.5, err=0.002, ok=True)
    row = row_of(line, LLAMA_8B)
    assert row == dict(
        op="peer",
        peer="marlin_w8a16",
        scheme="w8a16_g128",
        shape="qkv",
        n=6144,
        k=4096,
        m=16,
        us=9.5,
        error=0.002,
        ok=True,
    )
    decode = dict(peer="fa3_vllm0.25.1_paged16", scheme="decode_attn_bf16", B=64, ctx=1024, us=81.8, err=0.002)
    assert row_of(decode, LLAMA_8B)["peer"] == "fa3_paged16" and row_of(decode, LLAMA_8B)["rows"] == 64
    assert row_of(dict(meta=1, gpu="x"), LLAMA_8B) is None
    assert (
        "init" in row_of(dict(peer="deepgemm_vllm0.25.1", scheme="fp8_block128", error="init: x"), LLAMA_8B)["failed"]
    )


@pytest.mark.parametrize("carried", [False, True])
@pytest.mark.parametrize("fixed", [1, 0])
def test_a_chain_computes_every_call_of_every_round(fixed: int, carried: bool) -> None:
    if carried and not fixed:
        return
    x = jnp.ones((8, 8))
    weights = tuple((jnp.full((8, 8), float(i)),) if fixed else (x, jnp.full((8, 8), float(i))) for i in (2, 3))
    compiled = chain(jnp.matmul, rounds=3, carried=carried).lower((x,) * fixed, weights).compile()
    assert len(re.findall(r" dot\(", compiled.as_text())) == 6
    result = compiled((x,) * fixed, weights)
    last, others = (result, None) if carried else result
    if carried:
        assert float(last[0, 0]) == 8.0**6 * (2.0 * 3.0) ** 3
    else:
        assert float(last[0, 0]) == 24.0 and others.tolist() == [16.0, 24.0, 16.0, 24.0, 16.0]


@pytest.mark.parametrize("name, inputs", [("silu_mul", 1), ("quantize_rows", 1), ("residual_rms_norm", 2)])
def test_a_chain_of_quantizations_runs_each_call_and_nothing_else(name: str, inputs: int) -> None:
    """Two replicas, three rounds: six kernels, each waiting for the one before; none merged, none to read results."""
    x = jax.ShapeDtypeStruct((16, 2048), jnp.bfloat16)
    fixed = (jax.ShapeDtypeStruct((2048,), jnp.bfloat16),) if inputs == 2 else ()
    run = chain(call(name, None), after=True, rounds=3)
    compiled = compile_for_h200(run, fixed, ((x,) * inputs,) * 2)
    assert compiled.hlo.count("custom-call(") == 6 and "fusion(" not in compiled.hlo


def test_alternatives_hold_whole_rows() -> None:
    tasks = quantize_alternatives((1, 16, 64, 4096, 32768))
    assert len({task.key for task in tasks}) == len(tasks)
    assert {m for task in tasks for m in (1, 16, 64, 4096, 32768) if f" {m} " in task.key} == {1, 16, 64, 4096, 32768}
    for task in tasks:
        split = eval(task.key[task.key.index("Split") :], {"Split": Split})
        width = 14336 if task.key.startswith("silu") else 4096
        assert split.blocks * split.wgs * split.repeats * split.runs * 512 == width
