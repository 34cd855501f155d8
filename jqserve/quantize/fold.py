"""Moving a scale per channel from the input of a Linear into whatever produces that input: nothing is added to the
model, and in exact arithmetic its function stays the same.

    input of          is produced by
    q, k, v           attn_norm          divided by s
    o                 v                  rows divided by s; heads that share keys and values share s
    gate, up          mlp_norm           divided by s
    down              up                 rows divided by s
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jqserve.models.config import ModelConfig
from jqserve.quantize.block import Layer
from jqserve.quantize.on_grid import rounded

NORMS = {"qkv": "attn_norm", "gate_up": "mlp_norm"}


def shared(config: ModelConfig, group: str, statistic: jax.Array) -> jax.Array:
    """A statistic [K] of the input of `group` made equal (by the mean) where one scale has to serve several channels:
    query heads over one key-value head."""
    if group != "o" or config.heads == config.kv_heads:
        return statistic
    by_head = statistic.reshape(config.kv_heads, config.heads // config.kv_heads, config.head_dim)
    mean = by_head.mean(axis=1, keepdims=True)
    return jnp.broadcast_to(mean, by_head.shape).reshape(-1)


def fold(config: ModelConfig, layer: Layer, group: str, scale: jax.Array, stored: str) -> tuple[Layer, jax.Array]:
    """The layer with W[:, k] * s[k] in `group` and its producer divided by s, and the s that holds exactly.

    A norm's weight is rounded to `stored`, the dtype it is written in; s is then taken as what the rounding left of
    it, so that W makes up for it to the last bit. Arrays stay float32.
    """
    if group in NORMS:
        weight = layer[NORMS[group]].astype(jnp.float32)
        kept = rounded(weight / scale, stored)
        usable = (kept != 0) & jnp.isfinite(kept)
        kept = jnp.where(usable, kept, weight)
        scale = jnp.where(usable, weight / jnp.where(usable, kept, 1.0), 1.0)
        return {**layer, NORMS[group]: kept, group: layer[group] * scale[None, :]}, scale
    if group == "o":
        first = (config.heads + config.kv_heads) * config.head_dim
        by_head = scale.reshape(config.kv_heads, -1, config.head_dim)[:, 0].reshape(-1)
        changed = _divided(layer, "qkv", first, by_head, stored)
    else:
        changed = _divided(layer, "gate_up", config.ffn_size, scale, stored)
    return {**layer, **changed, group: layer[group] * scale[None, :]}, scale


def _divided(layer: Layer, name: str, first: int, scale: jax.Array, stored: str) -> Layer:
    """Rows from `first` on of a weight, and of its bias, divided by `scale`."""
    changed = {name: layer[name].at[first:].divide(scale[:, None])}
    bias = f"{name}_bias"
    if bias in layer:
        changed[bias] = rounded(layer[bias].astype(jnp.float32).at[first:].divide(scale), stored)
    return changed
