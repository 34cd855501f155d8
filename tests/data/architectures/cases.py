"""The tiny models of `logits.npz`: configs, and weights that a seed gives (so that they need not be stored).

Made by transformers; run `python tests/data/architectures/make.py` (needs torch) after a change here.
"""

from __future__ import annotations

import zlib

import numpy as np

COMMON = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "initializer_range": 0.3,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 48,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}

#: name -> (model_type, what differs from COMMON); the configs go through transformers' own config classes
MODELS: dict[str, tuple[str, dict]] = {
    "llama-llama3-rope": ("llama", {"rope_parameters": LLAMA3, "head_dim": 16}),
    "llama-linear-rope-bias-tied": (
        "llama",
        {
            "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0},
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
        },
    ),
    "llama-yarn": ("llama", {"rope_parameters": YARN, "head_dim": 16}),
    "llama-yarn-tuned": (
        "llama",
        {"rope_parameters": YARN | {"beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 1.3}, "head_dim": 16},
    ),
    "llama-dynamic-rope": (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
    ),
    "mistral-window": ("mistral", {"sliding_window": 7, "head_dim": 24}),
    "mistral-no-window": ("mistral", {"sliding_window": None}),
    "qwen2-window-of-some-layers": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1, "tie_word_embeddings": True},
    ),
    "qwen3-qk-norm": ("qwen3", {"head_dim": 24, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen3-bias-window": (
        "qwen3",
        {
            "head_dim": 16,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 5,
            "max_window_layers": 2,
        },
    ),
}

LENGTH = 80  # longer than every window and than both original context lengths


def tokens(name: str) -> np.ndarray:
    """int32 [LENGTH]"""
    return np.random.default_rng(zlib.crc32(name.encode())).integers(0, 61, LENGTH).astype(np.int32)


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """float32 values of a parameter by its Hugging Face name: norms around 1, biases around 0, matrices ~ 1/sqrt(K)."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    if "norm" in name:
        return rng.uniform(0.5, 1.5, shape).astype(np.float32)
    spread = 0.3 if len(shape) == 1 else 1.0 if "embed" in name else 1.5 * shape[1] ** -0.5
    return (rng.uniform(-1.7, 1.7, shape) * spread).astype(np.float32)
