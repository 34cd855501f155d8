"""Measured configs: where they come from, when they are taken, and what the tuner makes of measurements."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import time

import jax
import jax.numpy as jnp
import pytest

from bench import tune
from bench.tasks import Task
from pallas_kernels import tuning
from pallas_kernels.dispatch import KNOWN_DEVICES, use_device
from pallas_kernels.paged_attention import mosaic_decode_sm90, mosaic_prefill_sm90
from pallas_kernels.paged_attention.config import DecodeConfig, PrefillConfig


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


def test_a_win_within_the_noise_is_no_win():
    request = tuning.Request("op", "m=1", Tile(1), (Tile(1), Tile(2)))
    result = tune.result_of(request, [(10.0, Tile(1)), (9.95, Tile(2))], [])
    assert result["entry"]["config"] == {"n": 1}


def test_candidates_spread_over_the_space():
    request = tuning.Request("op", "m=1", Tile(0), tuple(Tile(n) for n in range(101)))
    chosen = [tile.n for tile in tune.candidates(request, 10)]
    assert chosen[0] == 0 and chosen[1:] == [1, 11, 21, 31, 41, 51, 61, 71, 81, 91]


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
