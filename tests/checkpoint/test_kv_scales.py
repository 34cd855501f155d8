"""FP8 KV cache scales: found under all their names, all or none, positive; where they come from is always said."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest

from jqserve.checkpoint import store
from jqserve.checkpoint.convert import keep_on_host, load
from jqserve.checkpoint.kv_scales import NAMES
from jqserve.engine.cache import kv_dtype, kv_source
from jqserve.engine.config import EngineConfig
from jqserve.engine.load import load_engine
from jqserve.errors import CheckpointError, UnsupportedError
from tests.checkpoint import files, tiny


def scales(params: dict[str, Any]) -> list[tuple[float, float]]:
    layers = [layer["attn"] for layer in params["layers"].values()]
    return [(float(attn["k_scale"]), float(attn["v_scale"])) for attn in layers]


def test_scales_of_the_peer(fixtures_dir: Path, tmp_path: Path) -> None:
    path = fixtures_dir / "ct-fp8-kv"
    tensors = files.read(path / "model.safetensors")
    loaded = load(str(path), device_put=keep_on_host)
    names = [[f"model.layers.{i}.self_attn.{kind}_scale" for kind in "kv"] for i in range(6)]
    assert scales(loaded.params) == [tuple(float(tensors[name][0]) for name in pair) for pair in names]
    assert loaded.plan.notes == ("KV cache scales of 6 layers from the checkpoint (k_scale, v_scale)",)
    store.convert(path, tmp_path / "out")
    again = load(tmp_path / "out", device_put=keep_on_host)
    assert all(a.tobytes() == b.tobytes() for a, b in zip(*(jax.tree.leaves(x.params) for x in (loaded, again))))
    for where in (path, tmp_path / "out"):
        left_out = load(str(where), activations="none", device_put=keep_on_host)
        assert "k_scale" not in left_out.params["layers"]["0"]["attn"]
    shutil.rmtree(tmp_path / "out")


@pytest.mark.parametrize("at", range(len(NAMES["k"])))
def test_every_name(at: int, tmp_path: Path) -> None:
    made = tiny.make(tmp_path)
    for i in range(2):
        for kind, value in (("k", 0.03), ("v", 0.5)):
            made.tensors[f"model.layers.{i}.self_attn.{NAMES[kind][at]}"] = np.array([value], np.float32)
    found = scales(load(str(made.save().path), device_put=keep_on_host).params)
    both = at == len(NAMES["k"]) - 1  # kv_scale is one number for both
    assert found == [(np.float32(0.5 if both else 0.03), np.float32(0.5))] * 2


def damaged(**edits: np.ndarray | None) -> dict[str, np.ndarray]:
    good = {f"model.layers.{i}.self_attn.{x}_scale": np.array([0.1], np.float32) for i in range(2) for x in "kv"}
    for name, value in edits.items():
        if value is None:
            del good[f"model.layers.1.self_attn.{name}"]
        else:
            good[f"model.layers.1.self_attn.{name}"] = value
    return good


DAMAGE = {
    "one missing": (damaged(v_scale=None), "model.layers.1.self_attn.v_scale missing"),
    "keys alone": (
        {name: scale for name, scale in damaged().items() if name.endswith("k_scale")},
        r"layers\.0\.self_attn\.k_scale is there, .*layers\.0\.self_attn\.v_scale, .*layers\.1.*v_scale missing",
    ),
    "not positive": (damaged(k_scale=np.zeros(1, np.float32)), "positive"),
    "not finite": (damaged(k_scale=np.full(1, np.nan, np.float32)), "positive and finite"),
    "one a head": (damaged(k_scale=np.ones(2, np.float32)), r"\[2\] found"),
    "an integer": (damaged(k_scale=np.ones(1, np.int32)), "I32"),
    "two of them": (damaged(kv_scale=np.ones(1, np.float32)), "which of them"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_named(case: str, tmp_path: Path) -> None:
    made = tiny.make(tmp_path)
    made.tensors |= DAMAGE[case][0]
    with pytest.raises(CheckpointError, match=DAMAGE[case][1]):
        load(str(made.save().path), device_put=keep_on_host)


def test_the_dtype_and_its_source() -> None:
    assert kv_dtype("auto", "bfloat16", True) == "fp8_e4m3" and kv_dtype("auto", "bfloat16", False) == "bfloat16"
    assert kv_dtype("bf16", "float32", True) == "bfloat16" and kv_dtype("fp8_e5m2", "bfloat16", False) == "fp8_e5m2"
    assert "of the checkpoint" in kv_source("fp8_e4m3", True) and "1.0" in kv_source("fp8_e5m2", False)
    assert "not used" in kv_source("bfloat16", True) and kv_source("bfloat16", False) == ""
    assert ml_dtypes.finfo(ml_dtypes.float8_e4m3fn).max == 448


def test_a_dtype_that_there_is_not_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    told: list[str] = []
    config = EngineConfig(model_path=str(tiny.make(tmp_path).path), kv_dtype="int8")
    with pytest.raises(UnsupportedError, match=r"--kv-cache-dtype int8.*fp8_e4m3, fp8_e5m2 \(bf16"):
        load_engine(config, lambda stage, text, detail: told.append(text))
    assert told == []
