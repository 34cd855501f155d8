"""A tiny random Llama, and engines over it that are compiled once for all tests of a module."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from jqserve.models.config import ModelConfig, RopeConfig

VOCAB = 61


def tiny_model() -> ModelConfig:
    return ModelConfig(
        architecture="LlamaForCausalLM",
        model_type="llama",
        vocab_size=VOCAB,
        hidden_size=32,
        ffn_size=48,
        layers=2,
        heads=4,
        kv_heads=2,
        head_dim=8,
        norm_eps=1e-5,
        rope=RopeConfig(),
        max_position=256,
        tied_embeddings=True,
        dtype="float32",
        eos_token_ids=(2,),
    )


def tiny_params(model: ModelConfig, seed: int = 0) -> dict[str, Any]:
    """Large weights: margins between logits far above the rounding of float32."""
    import jax.numpy as jnp

    random = np.random.default_rng(seed)

    def weight(*shape: int, scale: float = 1.0) -> Any:
        return jnp.asarray(random.normal(size=shape) * scale / np.sqrt(shape[-1]), jnp.float32)

    d, f, heads, kv = model.hidden_size, model.ffn_size, model.heads * model.head_dim, model.kv_heads * model.head_dim
    ones = jnp.ones((d,), jnp.float32)
    layer = lambda: {  # noqa: E731
        "attn_norm": {"weight": ones},
        "attn": {"qkv": {"weight": weight(heads + 2 * kv, d, scale=2)}, "o": {"weight": weight(d, heads, scale=2)}},
        "mlp_norm": {"weight": ones},
        "mlp": {"gate_up": {"weight": weight(2 * f, d, scale=2)}, "down": {"weight": weight(d, f, scale=2)}},
    }
    return {
        "embed": {"weight": weight(model.vocab_size, d, scale=3)},
        "layers": {str(i): layer() for i in range(model.layers)},
        "final_norm": {"weight": ones},
    }


@pytest.fixture(scope="session")
def model() -> ModelConfig:
    return tiny_model()


@pytest.fixture(scope="session")
def params(model: ModelConfig) -> dict[str, Any]:
    return tiny_params(model)
