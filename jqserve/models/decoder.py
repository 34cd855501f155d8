"""The decoder of the dense family (Llama, Mistral, Qwen2, Qwen3): one stack of layers, over pages or over whole
sequences.

Layers are unrolled, each called through an inner jit: identical layers are traced and lowered once (a 32-layer model
traces one layer, or two when windows alternate) and XLA inlines them.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jqserve.models.attention import Attend, Attention, Rope
from jqserve.models.config import ModelConfig
from jqserve.models.linear import Linear
from jqserve.models.mlp import MLP
from jqserve.models.norm import RMSNorm
from jqserve.models.rope import rope_table
from jqserve.ops.ahead import read_ahead
from jqserve.ops.attention import (
    AttentionMetadata,
    full_attention,
    paged_attention,
    paged_attention_of_projection,
    through_fp8,
)
from jqserve.ops.device import Device, current_device
from jqserve.ops.linear import dense_matmul
from jqserve.quant import QuantizedTensor

Pages = tuple[jax.Array, jax.Array]  # k_pages, v_pages [P, Hkv, Ps, Dh] of one layer
Stream = tuple[jax.Array, jax.Array]  # the residual stream [T, D] as the two terms whose sum it is


class Layer(nnx.Module):
    """One block. The residual stream is carried as two terms whose sum it is, so that each norm adds what came last.

    `tree`: {"attn_norm", "attn", "mlp_norm", "mlp"}, as MAINLINE's parameter tree has them. `window`: sliding window
    in tokens, or None.
    """

    def __init__(self, config: ModelConfig, tree: Mapping[str, Any], window: int | None) -> None:
        self.attn_norm = RMSNorm(tree["attn_norm"]["weight"], config.norm_eps)
        self.attn = Attention(config, tree["attn"])
        self.mlp_norm = RMSNorm(tree["mlp_norm"]["weight"], config.norm_eps)
        self.mlp = MLP(tree["mlp"])
        self.window = window
        self.sm_scale = config.head_dim**-0.5

    def __call__(
        self, x: jax.Array, residual: jax.Array, rope: Rope, attend: Attend, *, fuse: bool
    ) -> tuple[jax.Array, jax.Array, Any]:
        """x, residual [..., D] -> (the MLP's output, the residual stream without it, what `attend` kept)."""
        ahead = read_ahead("attn_norm", self.attn.projections[0].matrix)
        scheme = self.attn.input_scheme if fuse else None
        normed, residual = self.attn_norm.add(x, residual, scheme, fuse=fuse, ahead=ahead)
        mixed, kept = self.attn(normed, rope, attend)
        ahead = read_ahead("mlp_norm", self.mlp.projections[0].matrix)
        scheme = self.mlp.input_scheme if fuse else None
        normed, residual = self.mlp_norm.add(mixed, residual, scheme, fuse=fuse, ahead=ahead)
        return self.mlp(normed, fuse=fuse), residual, kept


class Decoder(nnx.Module):
    """Token ids to logits. Build one with `jqserve.models.build.build`, which checks the tree first."""

    def __init__(self, config: ModelConfig, params: Mapping[str, Any]) -> None:
        windows = config.sliding_windows or (None,) * config.layers
        self.config = config
        self.embed = nnx.Param(params["embed"]["weight"])
        self.layers = nnx.List([Layer(config, params["layers"][str(i)], windows[i]) for i in range(config.layers)])
        self.final_norm = RMSNorm(params["final_norm"]["weight"], config.norm_eps)
        self.lm_head = Linear(params["lm_head"]) if "lm_head" in params else None

    def __call__(
        self, tokens: jax.Array, positions: jax.Array, kv: tuple[Pages, ...], meta: AttentionMetadata
    ) -> tuple[jax.Array, tuple[Pages, ...]]:
        """One step over pages: tokens, positions int32 [T], kv one (k_pages, v_pages) per layer.

        Returns (hidden [T, D] before the final norm, new kv). Donate kv in the jit around this call: pages are then
        written in place. Rows are laid out as `AttentionMetadata` says; padding rows give numbers that mean nothing.
        """
        (x, residual), kv = self.through(range(self.config.layers), self.entering(tokens), positions, kv, meta)
        return x + residual, kv

    def entering(self, tokens: jax.Array) -> Stream:
        """What the first layer takes: tokens int32 [T] -> the residual stream as two terms [T, D]."""
        residual = self.embeddings(tokens)
        return jnp.zeros_like(residual), residual  # so that the first layer is like the others, not compiled apart

    def through(
        self, layers: range, stream: Stream, positions: jax.Array, kv: tuple[Pages, ...], meta: AttentionMetadata
    ) -> tuple[Stream, tuple[Pages, ...]]:
        """Some of the layers, with their pages: a step may be cut into programs between layers."""
        rope = rope_table(positions, self.config.rope, self.config.head_dim)
        x, residual = stream
        new_kv = []
        for layer, pages in zip(layers, kv, strict=True):
            x, residual, pages = _paged_layer(*_static(self.layers[layer]), x, residual, rope, pages, meta)
            new_kv.append(pages)
        return (x, residual), tuple(new_kv)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """hidden [..., D] from `__call__` or `hidden_states` -> float32 [..., V]; takes the final norm first."""
        normed = self.final_norm(hidden)
        if self.lm_head is None:
            return dense_matmul(normed, self.embed.get_value(), jnp.float32)
        if isinstance(self.lm_head.matrix, QuantizedTensor) or self.lm_head.bias is not None:
            return self.lm_head(normed).astype(jnp.float32)
        return dense_matmul(normed, self.lm_head.matrix, jnp.float32)

    def embeddings(self, tokens: jax.Array) -> jax.Array:
        """int32 [...] -> [..., D]; ids outside the vocabulary are clipped into it (callers validate ids)."""
        return jnp.take(self.embed.get_value(), tokens, axis=0, mode="clip")

    def hidden_states(self, embeddings: jax.Array) -> jax.Array:
        """Causal attention over whole sequences, no pages: embeddings [..., S, D] -> hidden [..., S, D].

        Positions are 0..S-1. Differentiable, and maps under vmap; the input is not padded-aware: causality makes
        padding at the end harmless.
        """
        rope = rope_table(jnp.arange(embeddings.shape[-2]), self.config.rope, self.config.head_dim)
        residual = embeddings.astype(self.embed.get_value().dtype)
        x = jnp.zeros_like(residual)
        for layer in self.layers:
            x, residual = _full_layer(*_static(layer), x, residual, rope)
        return x + residual

    def full(self, tokens: jax.Array) -> jax.Array:
        """tokens int32 [S] or [B, S] -> logits float32 [S, V] or [B, S, V]."""
        return self.logits(self.hidden_states(self.embeddings(tokens)))


def _static(layer: Layer) -> tuple[Device, Any, Any]:
    """What an inner jit needs: the device traced for and the layer's structure (both hashable), the layer's arrays."""
    structure, arrays = nnx.split(layer)
    return current_device(), structure, arrays


@functools.partial(jax.jit, static_argnums=(0, 1))
def _paged_layer(
    device: Device,
    structure: Any,
    arrays: Any,
    x: jax.Array,
    residual: jax.Array,
    rope: Rope,
    pages: Pages,
    meta: AttentionMetadata,
) -> tuple[jax.Array, jax.Array, Pages]:
    layer: Layer = nnx.merge(structure, arrays)
    given: dict[str, Any] = dict(pages=pages, meta=meta, sm_scale=layer.sm_scale, window=layer.window)
    if pages[0].dtype.itemsize == 1:  # wider pages hold keys and values as they are
        given |= layer.attn.kv_scales
    attend = Attend(
        functools.partial(paged_attention, **given), functools.partial(paged_attention_of_projection, **given)
    )
    return layer(x, residual, rope, attend, fuse=True)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _full_layer(
    device: Device, structure: Any, arrays: Any, x: jax.Array, residual: jax.Array, rope: Rope
) -> tuple[jax.Array, jax.Array]:
    layer: Layer = nnx.merge(structure, arrays)

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, None]:
        if scales := layer.attn.kv_scales:  # what an fp8 cache would have made of them
            k, v = through_fp8(k, scales["k_scale"]), through_fp8(v, scales["v_scale"])
        return full_attention(q, k, v, sm_scale=layer.sm_scale, window=layer.window), None

    x, residual, _ = layer(x, residual, rope, Attend(attend), fuse=False)
    return x, residual
