"""XLA implementation of rms_norm and silu_mul: runs anywhere, the oracle of the tests."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.ahead import Ahead


def rms_norm(
    x: jax.Array, weight: jax.Array, residual: jax.Array | None = None, *, eps: float, ahead: Ahead | None = None
) -> tuple[jax.Array, jax.Array]:
    """See `api.rms_norm`; `ahead` changes nothing."""
    total = x if residual is None else x + residual
    wide = total.astype(jnp.float32)
    unit = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return unit.astype(x.dtype) * weight.astype(x.dtype), total


def silu_mul(gate_up: jax.Array, *, ahead: Ahead | None = None) -> jax.Array:
    """See `api.silu_mul`; `ahead` changes nothing."""
    gate, up = jnp.split(gate_up, 2, axis=-1)
    return jax.nn.silu(gate.astype(jnp.float32)).astype(gate.dtype) * up
