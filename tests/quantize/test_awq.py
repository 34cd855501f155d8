"""Scaling and clipping: the function stays, the error falls."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import jqserve
from jqserve.models.config import ModelConfig
from jqserve.quantize import awq, block
from jqserve.quantize.activations import Activations
from jqserve.quantize.fold import fold, shared
from jqserve.quantize.grid import Grid
from jqserve.quantize.layer import Through, device_layer
from jqserve.quantize.smooth import smooth_scale
from jqserve.quantize.source import Source
from tests.checkpoint import tiny
from tests.models.tiny import TINY

CONFIG: ModelConfig = TINY
GRID = Grid("int", 4, False, (1, 32), "float16")


def layer(seed: int = 0, bias: bool = True) -> block.Layer:
    rng = np.random.default_rng(seed)
    c = CONFIG
    widths = {"qkv": ((c.heads + 2 * c.kv_heads) * c.head_dim, c.hidden_size)}
    widths |= {"o": (c.hidden_size, c.heads * c.head_dim), "gate_up": (2 * c.ffn_size, c.hidden_size)}
    widths |= {"down": (c.hidden_size, c.ffn_size)}
    made = {name: jnp.asarray(rng.normal(0, k**-0.5, (n, k)), jnp.float32) for name, (n, k) in widths.items()}
    for name in ("attn_norm", "mlp_norm"):
        made[name] = jnp.asarray(rng.uniform(0.5, 1.5, c.hidden_size), jnp.float32)
    if bias:
        made["qkv_bias"] = jnp.asarray(rng.normal(size=widths["qkv"][0]), jnp.float32)
    return made


def through(weights: block.Layer, h: jnp.ndarray) -> np.ndarray:
    mixed, _ = block.attention_output(CONFIG, None, weights, h)
    return np.asarray(block.after_mlp(CONFIG, None, weights, block.after_attention(CONFIG, None, weights, h, mixed)))


def stream(seed: int = 1) -> jnp.ndarray:
    rng = np.random.default_rng(seed)
    outliers = np.where(rng.random(CONFIG.hidden_size) < 0.05, 20.0, 1.0)
    return jnp.asarray(rng.normal(size=(3, 16, CONFIG.hidden_size)) * outliers, jnp.float32)


@pytest.mark.parametrize("group", block.GROUPS)
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_folding_changes_nothing(group: str, stored: str) -> None:
    """Also where the norm is rounded to 16 bits: the weight makes up for it. (A bias in bfloat16 cannot.)"""
    rng = np.random.default_rng(2)
    weights = layer(bias=stored == "float32")
    scale = jnp.asarray(rng.uniform(0.3, 3.0, weights[group].shape[1]), jnp.float32)
    folded, exact = fold(CONFIG, weights, group, shared(CONFIG, group, scale), stored)
    before, after = through(weights, stream()), through(folded, stream())
    assert np.abs(after - before).max() < 2e-5 * np.abs(before).max()
    assert np.abs(np.asarray(folded[group] / weights[group]) - np.asarray(exact)[None]).max() < 1e-5
    assert np.abs(np.asarray(exact) - 1).max() > 0.5


def test_the_block_is_the_models(tmp_path: Path) -> None:
    """One layer here against the decoder that serves."""
    made = tiny.make(tmp_path, num_hidden_layers=1)
    source = Source(made.path)
    ids = np.arange(40).reshape(2, 20) % 64
    table = made.tensors["model.embed_tokens.weight"].astype(np.float32)
    activations = Activations.embed(ids, table, "float32")
    Through(source.config, None, device_layer(source.layer(0), ""), "x").advance(activations)
    model, params = jqserve.load(made.path, dtype="float32")
    expected = model.decoder(params).hidden_states(model.embeddings(params, jnp.asarray(ids)))
    assert np.abs(activations.chunks[0] - np.asarray(expected)).max() < 1e-5
    source.close()


@pytest.mark.parametrize("group", ["qkv", "down"])
def test_a_searched_scale_beats_none(group: str) -> None:
    weights = layer(3)
    h = stream()
    x = (
        block.attention_input(CONFIG, None, weights, h)
        if group == "qkv"
        else block.down_input(CONFIG, None, weights, h)
    )
    flat = np.asarray(x).reshape(-1, x.shape[-1])
    mean, hessian = jnp.asarray(np.abs(flat).mean(0)), flat.T @ flat / len(flat)
    scale = awq.best_scale(CONFIG, None, GRID, weights, group, mean, hessian, [h])

    def error(s: jnp.ndarray) -> float:
        other = {**weights, group: awq.requantized(GRID, weights[group], s)}
        return float(np.square(through(other, h) - through(weights, h)).sum())

    assert error(scale) < 0.9 * error(jnp.ones_like(scale))


def test_clipping_loses_less_in_every_group() -> None:
    rng = np.random.default_rng(4)
    w = jnp.asarray(rng.standard_t(3, (16, 64)), jnp.float32)
    x = rng.normal(size=(512, 64)).astype(np.float32)
    hessian = jnp.asarray(x.T @ x / 512)

    def by_group(other: jnp.ndarray) -> np.ndarray:
        difference = np.asarray(w - awq._rounded(GRID, other)).reshape(16, 2, 32)
        blocks = np.stack([np.asarray(hessian)[i : i + 32, i : i + 32] for i in (0, 32)])
        return (np.einsum("ngi,gij->ngj", difference, blocks) * difference).sum(2)

    before, after = by_group(w), by_group(awq.clipped(GRID, w, hessian))
    assert (after <= before * (1 + 1e-5)).all() and after.sum() < 0.97 * before.sum()


def test_smoothquant_balances_the_two() -> None:
    """At alpha 1/2 the largest input and the largest weight of a channel become equal (equation 4 of the paper)."""
    rng = np.random.default_rng(5)
    w, largest = jnp.asarray(rng.normal(size=(8, 6)), jnp.float32), jnp.asarray([1.0, 50.0, 0.1, 3.0, 0.0, 7.0])
    scale = np.asarray(smooth_scale(w, largest, 0.5))
    smoothed = np.abs(np.asarray(w) * scale).max(0)
    active = np.asarray(largest) > 0
    assert np.allclose(smoothed[active], (np.asarray(largest) / scale)[active], rtol=1e-5)
    assert scale[4] == 1
