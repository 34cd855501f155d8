"""Rotary position embedding, in the half-split form of Hugging Face's Llama family.

The frequency formulas are those of transformers 5 (`modeling_rope_utils.py`): default, linear (positions divided),
llama3 (low frequencies divided, a smooth band between), yarn (arXiv:2309.00071), dynamic (NTK).
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from jqserve.errors import UnsupportedError
from jqserve.models.config import RopeConfig

KINDS = ("default", "linear", "llama3", "yarn", "dynamic")


def inverse_frequencies(config: RopeConfig, head_dim: int) -> tuple[np.ndarray, float]:
    """float32 [Dh/2] radians per position, and the factor that multiplies cos and sin.

    `dynamic` changes its base only for sequences past max_position, which are not served: up to there it is `default`.
    Raises UnsupportedError for another kind.
    """
    exponent = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
    frequency = config.theta**-exponent
    match config.kind:
        case "default" | "dynamic":
            scale = 1.0
        case "linear":
            frequency, scale = frequency / config.factor, 1.0
        case "llama3":
            frequency, scale = _llama3(frequency, config), 1.0
        case "yarn":
            frequency, scale = _yarn(frequency, config, head_dim)
        case kind:
            raise UnsupportedError(f"rope_type {kind!r} is not supported; supported: {', '.join(KINDS)}")
    return frequency.astype(np.float32), scale


def _llama3(frequency: np.ndarray, config: RopeConfig) -> np.ndarray:
    """Wavelengths above original / low_freq_factor are stretched, those below original / high_freq_factor kept."""
    turns = config.original_max_position * frequency / (2 * math.pi)
    span = config.high_freq_factor - config.low_freq_factor
    keep = np.clip((turns - config.low_freq_factor) / span, 0.0, 1.0)
    return frequency * (keep + (1 - keep) / config.factor)


def _yarn(frequency: np.ndarray, config: RopeConfig, head_dim: int) -> tuple[np.ndarray, float]:
    extra = dict(config.extra)
    original = config.original_max_position

    def dimension(turns: float) -> float:
        """The (fractional) index of the frequency that makes `turns` turns over the original context."""
        return head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(config.theta))

    low, high = dimension(extra.get("beta_fast", 32.0)), dimension(extra.get("beta_slow", 1.0))
    if extra.get("truncate", 1.0):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # as transformers does: no division by zero
    stretch = np.clip((np.arange(head_dim // 2) - low) / (high - low), 0.0, 1.0)
    scaled = frequency * ((1 - stretch) + stretch / config.factor)

    def magnitude(mscale: float) -> float:
        return 1.0 if config.factor <= 1 else 0.1 * mscale * math.log(config.factor) + 1.0

    attention_factor = extra.get("attention_factor")
    if attention_factor is None:
        mscale, mscale_all = extra.get("mscale"), extra.get("mscale_all_dim")
        attention_factor = magnitude(mscale) / magnitude(mscale_all) if mscale and mscale_all else magnitude(1.0)
    return scaled, float(attention_factor)


def rope_table(positions: jax.Array, config: RopeConfig, head_dim: int) -> tuple[jax.Array, jax.Array]:
    """positions int32 [...] -> cos, sin float32 [..., Dh/2]; once a step, shared by all layers."""
    frequency, scale = inverse_frequencies(config, head_dim)
    angle = positions.astype(jnp.float32)[..., None] * frequency
    return jnp.cos(angle) * scale, jnp.sin(angle) * scale


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """x [..., H, Dh] turned by the angles of cos, sin [..., Dh/2]; float32 inside, x's dtype out."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[..., None, :], sin[..., None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
