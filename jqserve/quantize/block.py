"""One decoder layer as plain functions, cut where a Linear's input can be looked at.

A layer is a dict of arrays: attn_norm, mlp_norm [D]; qkv, o, gate_up, down [N, K] with qkv_bias, ... [N] where there
are any; q_norm, k_norm [Dh] (qwen3). The arithmetic is that of jqserve.models; tests compare the two.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jqserve.models.config import ModelConfig
from jqserve.models.rope import rope_table, rotate
from jqserve.ops.attention import full_attention
from jqserve.ops.device import current_device
from jqserve.ops.linear import linear
from jqserve.quantize.compiled import compiled

Layer = dict[str, jax.Array]
GROUPS = ("qkv", "o", "gate_up", "down")
#: Bytes of attention scores from which on samples are computed one after the other.
MOST_SCORES = 1 << 30


def norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """RMS norm over the last axis, float32 inside, rounded before the weight multiplies it (as Hugging Face does)."""
    wide = x.astype(jnp.float32)
    unit = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return unit.astype(x.dtype) * weight.astype(x.dtype)


def project(layer: Layer, group: str, x: jax.Array) -> jax.Array:
    """The Linear(s) of one group: x [..., K] -> [..., N]"""
    return linear(x, layer[group].astype(x.dtype), layer.get(f"{group}_bias"))


def attend(config: ModelConfig, window: int | None, layer: Layer, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x [B, S, D], normed -> (the input of o [B, S, H Dh], absmax of keys after rope and of values, float32 [2])."""
    widths = config.heads * config.head_dim, (config.heads + config.kv_heads) * config.head_dim
    q, k, v = (
        part.reshape(*part.shape[:-1], -1, config.head_dim)
        for part in jnp.split(project(layer, "qkv", x), widths, axis=-1)
    )
    if "q_norm" in layer:
        q, k = norm(q, layer["q_norm"], config.norm_eps), norm(k, layer["k_norm"], config.norm_eps)
    rope = rope_table(jnp.arange(x.shape[-2]), config.rope, config.head_dim)
    q, k = rotate(q, *rope), rotate(k, *rope)
    out = _attention(config, window, q, k, v)
    largest = jnp.stack([jnp.abs(k).max(), jnp.abs(v).max()]).astype(jnp.float32)
    return out, largest


def _attention(config: ModelConfig, window: int | None, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """[B, S, H Dh]. cuDNN's kernel where it can (an 8B layer's 512 x 2,048 tokens: XLA's scores alone are 0.5 TB)."""
    if current_device().platform == "cuda" and q.dtype in (jnp.bfloat16, jnp.float16) and config.head_dim in (64, 128):
        seen = None if window is None else (window - 1, 0)
        out = jax.nn.dot_product_attention(
            q, k, v, scale=config.head_dim**-0.5, is_causal=True, local_window_size=seen, implementation="cudnn"
        )
        return out.reshape(*out.shape[:-2], -1)
    one = functools.partial(full_attention, sm_scale=config.head_dim**-0.5, window=window)
    scores = 4 * q.shape[0] * config.heads * q.shape[1] ** 2  # bytes, if all samples are computed at once
    out = one(q, k, v) if scores < MOST_SCORES else lax.map(lambda sample: one(*sample), (q, k, v))
    return out.reshape(*out.shape[:-2], -1)


def gated(layer: Layer, x: jax.Array) -> jax.Array:
    """x [..., D], normed -> the input of down [..., F]"""
    gate, up = jnp.split(project(layer, "gate_up", x), 2, axis=-1)
    return jax.nn.silu(gate.astype(jnp.float32)).astype(gate.dtype) * up


@functools.partial(compiled, static_argnums=(0, 1))
def attention_input(config: ModelConfig, window: int | None, layer: Layer, h: Any) -> jax.Array:
    """h [B, S, D], the residual stream -> the input of q, k and v"""
    return norm(h, layer["attn_norm"], config.norm_eps)


@functools.partial(compiled, static_argnums=(0, 1))
def attention_output(config: ModelConfig, window: int | None, layer: Layer, h: Any) -> tuple[jax.Array, jax.Array]:
    """h -> what `attend` gives"""
    return attend(config, window, layer, norm(h, layer["attn_norm"], config.norm_eps))


@functools.partial(compiled, static_argnums=(0, 1))
def after_attention(config: ModelConfig, window: int | None, layer: Layer, h: Any, mixed: Any) -> jax.Array:
    """h and the input of o -> the residual stream after attention"""
    return h + project(layer, "o", mixed)


@functools.partial(compiled, static_argnums=(0, 1))
def mlp_input(config: ModelConfig, window: int | None, layer: Layer, h: Any) -> jax.Array:
    """The residual stream after attention -> the input of gate and up"""
    return norm(h, layer["mlp_norm"], config.norm_eps)


@functools.partial(compiled, static_argnums=(0, 1))
def down_input(config: ModelConfig, window: int | None, layer: Layer, h: Any) -> jax.Array:
    """The residual stream after attention -> the input of down"""
    return gated(layer, norm(h, layer["mlp_norm"], config.norm_eps))


@functools.partial(compiled, static_argnums=(0, 1))
def after_mlp(config: ModelConfig, window: int | None, layer: Layer, h: Any) -> jax.Array:
    """The residual stream after attention -> after the layer"""
    return h + project(layer, "down", gated(layer, norm(h, layer["mlp_norm"], config.norm_eps)))
