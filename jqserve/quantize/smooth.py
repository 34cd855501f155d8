"""SmoothQuant (Xiao et al., arXiv:2211.10438): s = max|x|^alpha / max|W|^(1 - alpha) a channel."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def smooth_scale(weight: jax.Array, largest: jax.Array, alpha: float) -> jax.Array:
    """weight [N, K], largest [K] = max |x| over the calibration data -> s [K], 1 where a channel never was active."""
    of_weight = jnp.abs(weight.astype(jnp.float32)).max(axis=0)
    active = (largest > 0) & (of_weight > 0)
    scale = jnp.where(active, largest, 1.0) ** alpha / jnp.where(active, of_weight, 1.0) ** (1 - alpha)
    return jnp.where(active, jnp.maximum(scale, 1e-5), 1.0)
