"""Error by layer: of the residual stream, and of each Linear's weight."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jqserve.library import Model, Params, dequantize
from jqserve.models.build import build
from jqserve.models.config import ModelConfig

#: What each group is made of, where its parts were fused, and its parent in the tree.
GROUPS = (
    ("attn", "qkv", ("q", "k", "v")),
    ("attn", "o", ("o",)),
    ("mlp", "gate_up", ("gate", "up")),
    ("mlp", "down", ("down",)),
)


@dataclasses.dataclass(frozen=True)
class LayerError:
    """Signal to error in dB, 10 log10(|base|^2 / |difference|^2), held to +-999; higher is better.

    own          what the quantized layer adds to the residual stream, given the base's input
    accumulated  the residual stream after the layer, all quantized layers before it included
    weights      of each Linear: {"q": ..., "k": ..., ...}
    """

    index: int
    own: float
    accumulated: float
    weights: dict[str, float]


def layer_errors(model: Model, params: Params, base: tuple[Model, Params], windows: np.ndarray) -> list[LayerError]:
    """windows int32 [n, length]: a few are enough."""
    other, base_params = base
    ids = jnp.asarray(windows)
    clean, noisy = other.embeddings(base_params, ids), model.embeddings(params, ids)
    found = []
    for index in range(model.config.layers):
        ours = _single(model.config, index), _only(params, index)
        theirs = _single(other.config, index), _only(base_params, index)
        after, mine, noisy = _step(*theirs, clean), _step(*ours, clean), _step(*ours, noisy)
        own = decibels(after - clean, mine - after)
        weights = weight_errors(model.config, params["layers"][str(index)], base_params["layers"][str(index)])
        found.append(LayerError(index, own, decibels(after, noisy - after), weights))
        clean = after
    return found


def decibels(signal: Any, noise: Any) -> float:
    top, bottom = (float(jnp.sum(jnp.square(jnp.asarray(a, jnp.float32)))) for a in (signal, noise))
    if bottom <= 0 or top <= 0:
        return 999.0
    return round(max(-999.0, min(999.0, 10 * math.log10(top / bottom))), 3)


def _single(config: ModelConfig, index: int) -> ModelConfig:
    windows = config.sliding_windows[index : index + 1]
    return dataclasses.replace(config, layers=1, sliding_windows=windows)


def _only(params: Params, index: int) -> dict[str, Any]:
    kept = {key: params[key] for key in ("embed", "final_norm")}
    return {**kept, "layers": {"0": params["layers"][str(index)]}}


@functools.partial(jax.jit, static_argnums=0)
def _step(config: ModelConfig, params: Params, hidden: jax.Array) -> jax.Array:
    return build(config, params).hidden_states(hidden)


def weight_errors(config: ModelConfig, layer: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, float]:
    """Of each Linear, after scales that AWQ or SmoothQuant moved between neighbours are taken back: those of a norm
    exactly, from the norms; those of v's and up's rows as what fits best, where they are more than rounding."""
    ours, theirs = _parts(layer), _parts(base)
    for norm, names in (("attn_norm", ("q", "k", "v")), ("mlp_norm", ("gate", "up"))):
        mine, other = (jnp.asarray(tree[norm]["weight"], jnp.float32) for tree in (layer, base))
        ratio = jnp.where((other != 0) & (mine != 0), mine / jnp.where(other != 0, other, 1.0), 1.0)
        for name in names:
            ours[name] = ours[name] * ratio[None, :]
    for before, after in (("v", "o"), ("up", "down")):
        ratio = _row_scale(ours[before], theirs[before])
        if float(jnp.abs(ratio - 1).max()) > 0.05:
            ours[before] = ours[before] / ratio[:, None]
            if after == "o":
                by_head = ratio.reshape(config.kv_heads, 1, config.head_dim)
                ratio = jnp.broadcast_to(by_head, (config.kv_heads, config.heads // config.kv_heads, config.head_dim))
            ours[after] = ours[after] * ratio.reshape(1, -1)
    return {name: decibels(theirs[name], ours[name] - theirs[name]) for name in ours}


def _row_scale(ours: jax.Array, theirs: jax.Array) -> jax.Array:
    """[N]: the factor of each row that fits best; 1 for a row of zeros."""
    power = (theirs * theirs).sum(axis=1)
    ratio = (ours * theirs).sum(axis=1) / jnp.where(power > 0, power, 1.0)
    return jnp.where((power > 0) & (ratio > 0), ratio, 1.0)


def _parts(layer: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Every Linear by its short name, float32 [N, K]."""
    found: dict[str, jax.Array] = {}
    for parent, fused, names in GROUPS:
        tree = layer[parent]
        if fused not in tree:
            found.update({name: dequantize(tree[name]["weight"]) for name in names})
            continue
        whole = dequantize(tree[fused]["weight"])
        found.update(zip(names, _split(layer, fused, whole)))
    return found


def _split(layer: Mapping[str, Any], fused: str, whole: jax.Array) -> list[jax.Array]:
    if fused == "gate_up":
        return list(jnp.split(whole, 2))
    if fused == "qkv":
        queries = layer["attn"]["o"]["weight"].shape[1]
        rest = (whole.shape[0] - queries) // 2
        return list(jnp.split(whole, (queries, queries + rest)))
    return [whole]
