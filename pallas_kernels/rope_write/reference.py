"""Rotation and page writes in plain XLA: runs anywhere, and is the oracle of the kernel's tests."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.paged_attention import reference


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """x [T, H, Dh], cos, sin float32 [T, Dh/2]: the half-split form, float32 inside."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, None, :], sin[:, None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def rope_write(qkv, cos, sin, slots, k_pages, v_pages, *, k_scale=None, v_scale=None, ahead=None):
    """See api.rope_write; `ahead` changes nothing."""
    kv_heads, head_dim = k_pages.shape[1], k_pages.shape[3]
    rows = qkv.reshape(qkv.shape[0], -1, head_dim)
    q, k, v = jnp.split(rows, (rows.shape[1] - 2 * kv_heads, rows.shape[1] - kv_heads), axis=1)
    pages = reference.write_kv(k_pages, v_pages, rotate(k, cos, sin), v, slots, k_scale=k_scale, v_scale=v_scale)
    return rotate(q, cos, sin), *pages
