"""`ModelConfig`: the facts of a dense decoder, read from either dialect of Hugging Face's config.json."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding: `kind` default | linear | llama3 | dynamic | yarn as transformers' rope_type names them."""

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 0
    extra: tuple[tuple[str, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shapes in features: D hidden_size, H heads, Hkv kv_heads, Dh head_dim, F ffn_size, V vocab_size, L layers."""

    architecture: str  # "LlamaForCausalLM", ...
    model_type: str
    vocab_size: int
    hidden_size: int
    ffn_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    norm_eps: float
    rope: RopeConfig
    max_position: int
    tied_embeddings: bool
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_windows: tuple[int | None, ...] = ()  # one a layer; None = full attention
    activation: Literal["silu"] = "silu"
    dtype: str = "bfloat16"
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(data: dict[str, Any]) -> ModelConfig:
        """The inverse of `to_json`, also after a round trip through JSON, which knows no tuples."""
        rope = data["rope"]
        rope = RopeConfig(**{**rope, "extra": tuple((str(k), float(v)) for k, v in rope["extra"])})
        tuples = {key: tuple(data[key]) for key in ("sliding_windows", "eos_token_ids")}
        return ModelConfig(**{**data, **tuples, "rope": rope})
