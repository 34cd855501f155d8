"""Measured configs: where they come from, when they are taken, and what the tuner makes of measurements."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import json
import sys
import time

import jax
import jax.numpy as jnp
import pytest

import pallas_kernels
from bench import tune
from bench.tasks import Task
from pallas_kernels import tuning
from pallas_kernels.a16 import run
from pallas_kernels.a16.cases import LLAMA_8B
from pallas_kernels.dispatch import KNOWN_DEVICES, use_device
from pallas_kernels.paged_attention import mosaic_decode_sm90, mosaic_prefill_sm90
from pallas_kernels.paged_attention.config import DecodeConfig, PrefillConfig
from pallas_kernels.scaled_matmul import mosaic_sm90
from pallas_kernels.scaled_matmul.problem import Problem


@dataclasses.dataclass(frozen=True)
class Tile:
    n: int = 1


def pick() -> Tile:
    return tuning.choose("op", "m=1", heuristic=Tile, space=lambda: [Tile(2), Tile(1), Tile(3)])


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    tuning._entries.cache_clear()
    yield tmp_path
    tuning._entries.cache_clear()


def write(folder, device: str, config: dict) -> None:
    path = tuning.path_for(KNOWN_DEVICES[device])
    assert path.parent == folder
    path.write_text(json.dumps({"entries": {"op": {"m=1": {"config": config, "us": 1.0}}}}))


def test_names():
    assert tuning.key(m=16, kind="fp8") == "m=16 kind=fp8"
    assert [tuning.bucket(n) for n in (0, 1, 2, 3, 64, 65)] == [1, 1, 2, 4, 64, 128]
    assert tuning.path_for(KNOWN_DEVICES["h100"]).name == "nvidia-h100-80gb-hbm3.json"


def test_a_measured_config_that_this_call_cannot_run_is_passed_over(folder):
    """It was measured with other scales, or at another M of the bucket: the heuristic's is next, not XLA."""
    write(folder, "h200", {"n": 7})

    def check(limit: int, tile: Tile) -> None:
        if tile.n > limit:
            raise NotImplementedError("too large")

    for limit, n in ((7, 7), (6, 1)):
        with use_device(KNOWN_DEVICES["h200"]):
            config = tuning.choose("op", "m=1", heuristic=Tile, space=list, check=functools.partial(check, limit))
        assert config == Tile(n)


def test_measured_before_heuristic_and_only_on_that_device(folder):
    write(folder, "h200", {"n": 7})
    with use_device(KNOWN_DEVICES["h200"]):
        assert pick() == Tile(7)
    with use_device(KNOWN_DEVICES["h100"]):
        assert pick() == Tile(1)


def test_an_outgrown_entry_is_passed_over_aloud(folder):
    write(folder, "h200", {"n": 7, "gone": 1})
    with use_device(KNOWN_DEVICES["h200"]), pytest.warns(UserWarning, match="does not fit Tile"):
        assert pick() == Tile(1)


def test_recording_and_forcing(folder):
    write(folder, "h200", {"n": 7})
    with use_device(KNOWN_DEVICES["h200"]):
        with tuning.recording() as requests:
            assert pick() == Tile(1)  # the heuristic's, not the measured one
        assert requests == [tuning.Request("op", "m=1", Tile(1), (Tile(1), Tile(2), Tile(3)))]
        with tuning.forcing("op", "m=1", Tile(9)), tuning.forcing("other", "m=1", Tile(8)):
            assert pick() == Tile(9)
        assert pick() == Tile(7)


def test_the_tuner_finds_the_fastest_right_config(tmp_path):
    def make() -> Task:
        def run(tile: Tile) -> dict:
            return {"us": 10.0 - tile.n, "kernel_us": None, "ok": tile.n != 3}

        return Task("t", pick, run)

    with concurrent.futures.ThreadPoolExecutor(2) as executor:
        (result,) = tune.tune(make, 8, time.time() + 60, executor)
    assert result["entry"] == {"config": {"n": 2}, "us": 8.0, "heuristic_us": 9.0}
    assert result["tried"] == 2 and "wrong" in result["refused"][0]
    path = tmp_path / "d.json"
    path.write_text(json.dumps({"entries": {"op": {"m=2": {"config": {"n": 5}}}, "else": {}}}))
    tune.merge(path, [result], {"device": "d"})
    written = json.loads(path.read_text())
    assert set(written["entries"]["op"]) == {"m=1", "m=2"} and written["device"] == "d"


def test_a_broken_device_ends_the_process_but_keeps_what_was_measured():
    """Candidates that follow would fail for no fault of theirs; the result says so, and the worker ends by it."""

    def make() -> Task:
        def run(tile: Tile) -> dict:
            if tile.n == 2:
                raise RuntimeError("INTERNAL: CUDA_ERROR_ILLEGAL_ADDRESS")
            return {"us": 10.0 - tile.n, "kernel_us": None}

        return Task("t", pick, run)

    with concurrent.futures.ThreadPoolExecutor(2) as executor:
        (result,) = tune.tune(make, 8, time.time() + 60, executor)
    assert result["device_lost"] and result["entry"]["config"] == {"n": 1}
    assert result["tried"] == 1 and len(result["refused"]) == 1


def test_the_tuner_knows_its_groups(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tune", "--groups", "decode,quantise"])
    with pytest.raises(SystemExit):
        tune.main()
    assert "unknown groups quantise; known: w4a16" in capsys.readouterr().err


def test_the_tuner_asks_for_quantization_too():
    makers = tune.problems("quantize", {}, (1, 4096))
    assert len(makers) == 8
    with use_device(KNOWN_DEVICES["h200"]), tuning.recording() as asked:
        for make in makers[:3]:
            with pytest.raises(Exception, match=r"cpu|CPU"):  # traced; there is nothing to compile it for
                make().compile()
    assert {r.op for r in asked} == {"quantize_residual_norm", "quantize_silu", "quantize_rows"}
    assert all(len(r.space) > 1 for r in asked)


def test_a_win_within_the_noise_is_no_win():
    request = tuning.Request("op", "m=1", Tile(1), (Tile(1), Tile(2)))
    result = tune.result_of(request, [(10.0, Tile(1)), (9.95, Tile(2))], [])
    assert result["entry"]["config"] == {"n": 1}


def test_candidates_spread_over_the_space():
    request = tuning.Request("op", "m=1", Tile(0), tuple(Tile(n) for n in range(101)))
    chosen = [tile.n for tile in tune.candidates(request, 10)]
    assert chosen == [0, 1, 2, 3, 4, 5, 6, 25, 44, 63, 82]
    assert [tile.n for tile in tune.candidates(request, 200)] == list(range(101))


class Now(concurrent.futures.Executor):
    """Runs what is submitted at once, in the thread (and its context) that submits."""

    def submit(self, fn, /, *args, **kwargs):
        future = concurrent.futures.Future()
        future.set_result(fn(*args, **kwargs))
        return future


@pytest.mark.parametrize("op", ["w4a16_matmul", "scaled_matmul"])
def test_what_the_tuner_writes_is_what_the_op_runs(folder, monkeypatch, op: str):
    """From a problem by way of tuned/<device>.json to the kernel's plan, for an H200; only the times are made up."""
    S, (n, k), m = jax.ShapeDtypeStruct, LLAMA_8B["o"], 64
    seen: list = []  # configs that kernels were traced with

    def a16(plan, x, *arrays):
        seen.append(plan.config)
        return jnp.zeros((plan.m, plan.n), x.dtype)

    def problem(*fields):
        seen.append(fields[-1])
        return Problem(*fields)

    monkeypatch.setattr(run, "_wgmma", a16)
    monkeypatch.setattr(mosaic_sm90, "Problem", problem)
    if op == "w4a16_matmul":
        arguments = (
            S((m, k), jnp.bfloat16),
            S((n // 16, 8 * k), jnp.uint8),
            S((n // 16, k // 128, 8, 2), jnp.bfloat16),
        )
        call = functools.partial(pallas_kernels.w4a16_matmul, group_size=128, layout="sm90")
    else:
        fp8, f32 = jnp.float8_e4m3fn, jnp.float32
        arguments = (S((m, k), fp8), S((n, k), fp8), S((m, 1), f32), S((n, 1), f32))
        call = pallas_kernels.scaled_matmul

    def make() -> Task:
        def traced():
            jax.eval_shape(lambda *a: call(*a), *arguments)
            return seen[-1]

        return Task("t", traced, lambda config: {"us": 10.0 - (config != seen[0]), "kernel_us": None})

    with use_device(KNOWN_DEVICES["h200"]):
        results = tune.tune(make, 6, time.time() + 60, Now())
        (result,) = results
        assert result["op"] == op and result["tried"] >= 5 and not result["refused"]
        tune.merge(tuning.path_for(KNOWN_DEVICES["h200"]), results, {"device": "NVIDIA H200"})
        tuning._entries.cache_clear()
        assert make().compile() != seen[0]
    assert dataclasses.asdict(seen[-1]) == result["entry"]["config"]


def test_attention_asks():
    S = jax.ShapeDtypeStruct
    pages = S((64, 8, 16, 128), jnp.bfloat16)
    q, table, lens = S((3, 32, 128), jnp.bfloat16), S((3, 20), jnp.int32), S((3,), jnp.int32)
    with use_device(KNOWN_DEVICES["h200"]), tuning.recording() as requests:
        jax.eval_shape(lambda *a: mosaic_decode_sm90.decode_attention(*a, sm_scale=0.1), q, pages, pages, table, lens)
        tiles = (S((3, 128, 32, 128), jnp.bfloat16), pages, pages, table, lens, lens)
        jax.eval_shape(lambda *a: mosaic_prefill_sm90.prefill_attention(*a, sm_scale=0.1), *tiles)
    decode, prefill = requests
    assert decode.key == "items=32 tokens=512 row_bytes=256" and isinstance(decode.heuristic, DecodeConfig)
    assert len(decode.space) > 10 and isinstance(prefill.heuristic, PrefillConfig) and len(prefill.space) > 3


def test_ops_pass_over_a_measured_config_that_does_not_fit(folder):
    """It runs with its heuristic's, and not as XLA."""
    S = jax.ShapeDtypeStruct
    bf, f8 = jnp.bfloat16, jnp.float8_e4m3fn
    pages = S((64, 8, 64, 128), bf)
    calls = {
        "scaled_matmul": (S((16, 4096), f8), S((4096, 4096), f8), S((16, 1), jnp.float32), S((4096, 1), jnp.float32)),
        "decode_attention": (S((4, 32, 128), bf), pages, pages, S((4, 8), jnp.int32), S((4,), jnp.int32)),
        "prefill_attention": (
            *(S((2, 128, 32, 128), bf), pages, pages, S((2, 8), jnp.int32)),
            *(S((2,), jnp.int32), S((2,), jnp.int32)),
        ),
    }
    for op, args in calls.items():
        options = {} if op == "scaled_matmul" else {"sm_scale": 0.1}
        function = getattr(pallas_kernels, op)
        with use_device(KNOWN_DEVICES["h200"]), tuning.recording() as asked:
            jax.eval_shape(functools.partial(function, **options), *args)
        (request,) = asked
        bad = {"scaled_matmul": {"wgs_k": 3}, "decode_attention": {"stages": 99}}.get(op, {"block_kv": 4096})
        config = dataclasses.asdict(request.heuristic) | bad
        entries = {op: {request.key: {"config": config, "us": 1.0}}}
        tuning.path_for(KNOWN_DEVICES["h200"]).write_text(json.dumps({"entries": entries}))
        tuning._entries.cache_clear()
        chosen = pallas_kernels.explain(op, *args, device=KNOWN_DEVICES["h200"], **options).chosen
        assert chosen == "mosaic_sm90", op
    args = calls["decode_attention"]
    options = dict(sm_scale=0.1, window=None, soft_cap=None, k_scaled=False, v_scaled=False)
    with use_device(KNOWN_DEVICES["h200"]), pytest.raises(NotImplementedError, match="bytes of shared memory"):
        mosaic_decode_sm90.problem(args[0], args[1], args[3], DecodeConfig(stages=99), **options)
