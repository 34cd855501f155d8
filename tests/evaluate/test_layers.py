"""Errors by layer: of rounding they are what rounding gives; scales that were folded do not count as errors."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import jqserve
from jqserve.evaluate.layers import layer_errors, weight_errors
from tests.checkpoint import tiny


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make(tmp_path_factory.mktemp("base")).path


def test_a_model_has_no_error_against_itself(base: Path) -> None:
    loaded = jqserve.load(base, dtype="float32")
    for error in layer_errors(*loaded, loaded, np.arange(32).reshape(2, 16)):
        assert error.own == error.accumulated == 999
        assert set(error.weights.values()) == {999}


def test_the_damaged_layer_is_found(base: Path) -> None:
    """Noise of 1 % of one weight: 40 dB there, and nothing in the layers before."""
    model, clean = jqserve.load(base, dtype="float32")
    _, noisy = jqserve.load(base, dtype="float32")
    down = noisy["layers"]["1"]["mlp"]["down"]
    rng = np.random.default_rng(0)
    down["weight"] = down["weight"] + 0.01 * jnp.std(down["weight"]) * rng.normal(size=down["weight"].shape)
    first, second = layer_errors(model, noisy, (model, clean), np.arange(32).reshape(2, 16))
    assert first.own == first.accumulated == 999
    assert second.weights["down"] == pytest.approx(40, abs=0.5)
    assert second.weights["up"] == 999
    assert 20 < second.own < 60


def test_folded_scales_are_taken_back(base: Path) -> None:
    model, params = jqserve.load(base, dtype="float32")
    layer = params["layers"]["0"]
    rng = np.random.default_rng(1)
    c = model.config
    s, of_value = (rng.uniform(0.5, 2, n).astype(np.float32) for n in (c.hidden_size, c.kv_heads * c.head_dim))
    qkv = layer["attn"]["qkv"]["weight"] * s[None]
    values = np.concatenate([np.ones(qkv.shape[0] - len(of_value), np.float32), of_value])
    wide = np.repeat(of_value.reshape(c.kv_heads, 1, c.head_dim), c.heads // c.kv_heads, 1).reshape(-1)
    attn = {"qkv": {"weight": qkv / values[:, None]}, "o": {"weight": layer["attn"]["o"]["weight"] * wide[None]}}
    folded = {**layer, "attn": attn, "attn_norm": {"weight": layer["attn_norm"]["weight"] / s}}
    assert min(weight_errors(c, folded, layer).values()) > 90
    blind = {**folded, "attn_norm": layer["attn_norm"]}
    assert weight_errors(c, blind, layer)["q"] < 20
