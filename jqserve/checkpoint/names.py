"""Which modules a model has: Hugging Face names, canonical paths, and the sizes that the config gives them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from jqserve.models.config import ModelConfig


def module_and_suffix(tensor: str) -> tuple[str, str]:
    """ "a.q_proj.weight" -> ("a.q_proj", "weight"); bitsandbytes' "a.q_proj.weight.absmax" -> (.., "weight.absmax")."""
    module, _, suffix = tensor.partition(".weight.")
    if suffix:
        return module, f"weight.{suffix}"
    module, _, suffix = tensor.rpartition(".")
    return module, suffix


@dataclasses.dataclass(frozen=True)
class LinearSlot:
    """One Hugging Face Linear: `name` without suffix, out features n, in features k."""

    name: str
    n: int
    k: int
    bias: bool


@dataclasses.dataclass(frozen=True)
class LinearGroup:
    """Linears of one input that become one (`path`) where their schemes allow, else `path`'s siblings `parts`."""

    parent: str  # canonical path, "layers.0.attn"
    key: str  # "qkv", or "o" for a single one
    parts: tuple[tuple[str, LinearSlot], ...]  # key when kept apart, slot

    @property
    def path(self) -> str:
        return f"{self.parent}.{self.key}" if self.parent else self.key


@dataclasses.dataclass(frozen=True)
class Vector:
    """A norm's weight, or the embedding table: a tensor that is never quantized."""

    path: str
    name: str  # the tensor's full name
    shape: tuple[int, ...]


def modules(config: ModelConfig) -> Iterator[Vector | LinearGroup]:
    """Every module, in the order in which it is loaded: embedding, layers, final norm, head."""
    c, d = config, config.hidden_size
    yield Vector("embed.weight", "model.embed_tokens.weight", (c.vocab_size, d))
    for i in range(c.layers):
        hf, ours = f"model.layers.{i}", f"layers.{i}"
        attn, mlp = f"{hf}.self_attn", f"{hf}.mlp"
        yield Vector(f"{ours}.attn_norm.weight", f"{hf}.input_layernorm.weight", (d,))
        q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
        yield LinearGroup(
            f"{ours}.attn",
            "qkv",
            (
                ("q", LinearSlot(f"{attn}.q_proj", q, d, c.qkv_bias)),
                ("k", LinearSlot(f"{attn}.k_proj", kv, d, c.qkv_bias)),
                ("v", LinearSlot(f"{attn}.v_proj", kv, d, c.qkv_bias)),
            ),
        )
        if c.qk_norm:
            yield Vector(f"{ours}.attn.q_norm.weight", f"{attn}.q_norm.weight", (c.head_dim,))
            yield Vector(f"{ours}.attn.k_norm.weight", f"{attn}.k_norm.weight", (c.head_dim,))
        yield LinearGroup(f"{ours}.attn", "o", (("o", LinearSlot(f"{attn}.o_proj", d, q, c.o_bias)),))
        yield Vector(f"{ours}.mlp_norm.weight", f"{hf}.post_attention_layernorm.weight", (d,))
        yield LinearGroup(
            f"{ours}.mlp",
            "gate_up",
            (
                ("gate", LinearSlot(f"{mlp}.gate_proj", c.ffn_size, d, c.mlp_bias)),
                ("up", LinearSlot(f"{mlp}.up_proj", c.ffn_size, d, c.mlp_bias)),
            ),
        )
        yield LinearGroup(f"{ours}.mlp", "down", (("down", LinearSlot(f"{mlp}.down_proj", d, c.ffn_size, c.mlp_bias)),))
    yield Vector("final_norm.weight", "model.norm.weight", (d,))
    if not c.tied_embeddings:
        yield LinearGroup("", "lm_head", (("lm_head", LinearSlot("lm_head", c.vocab_size, d, False)),))
