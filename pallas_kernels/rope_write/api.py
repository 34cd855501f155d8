"""Public op: rope_write."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.ahead import Ahead
from pallas_kernels.paged_attention.api import FLOATS, check_scale
from pallas_kernels.rope_write import mosaic_sm90, reference


def rope_write(
    qkv: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    slots: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    *,
    k_scale: jax.Array | float | None = None,
    v_scale: jax.Array | float | None = None,
    ahead: Ahead | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Turns queries and keys by their position's angles and writes keys and values into their pages.

    Args:
      qkv: [T, (H + 2 Hkv) * Dh] bfloat16, float16 or float32, the fused projection's output: query heads, then key
        heads, then value heads.
      cos, sin: float32 [T, Dh/2]; element i and i + Dh/2 of a head are turned together (Hugging Face's Llama form).
      slots: [T] int32, page * Ps + offset; one of page 0 (padding) or past the pool is dropped.
      k_pages, v_pages: [P, Hkv, Ps, Dh], as in `write_kv`; donate them in the jit around this call to have them written
        in place.
      k_scale, v_scale: as in `write_kv`.
      ahead: weights of a later kernel to bring into L2 meanwhile (`pallas_kernels.ahead`); changes no result.
      implementation: name of one implementation, None chooses.

    Returns (q [T, H, Dh] in qkv's dtype, k_pages, v_pages). Raises ValueError for shapes or dtypes that do not fit.
    """
    if k_pages.ndim != 4 or k_pages.shape != v_pages.shape or k_pages.dtype != v_pages.dtype:
        raise ValueError(
            f"rope_write: k_pages and v_pages must both be [P, Hkv, Ps, Dh], got {k_pages.shape}, {v_pages.shape}"
        )
    _, kv_heads, _, head_dim = k_pages.shape
    if qkv.ndim != 2 or qkv.shape[1] % head_dim or qkv.shape[1] // head_dim <= 2 * kv_heads:
        raise ValueError(f"rope_write: qkv must be [T, (H + 2 * {kv_heads}) * {head_dim}] with H > 0, got {qkv.shape}")
    angles = (qkv.shape[0], head_dim // 2)
    if head_dim % 2 or cos.shape != angles or sin.shape != angles or cos.dtype != jnp.float32 or sin.dtype != cos.dtype:
        raise ValueError(f"rope_write: cos and sin must be float32 {angles}, got {cos.dtype}{cos.shape}, {sin.shape}")
    if slots.shape != qkv.shape[:1] or not jnp.issubdtype(slots.dtype, jnp.integer):
        raise ValueError(f"rope_write: slots must be integers [{qkv.shape[0]}], got {slots.dtype}{slots.shape}")
    if qkv.dtype not in FLOATS:
        raise ValueError(f"rope_write: qkv must be bfloat16, float16 or float32, got {qkv.dtype}")
    check_scale("rope_write", "k_scale", k_scale, kv_heads)
    check_scale("rope_write", "v_scale", v_scale, kv_heads)
    return dispatch.call(
        "rope_write",
        implementation,
        qkv,
        cos,
        sin,
        slots,
        k_pages,
        v_pages,
        k_scale=k_scale,
        v_scale=v_scale,
        ahead=ahead,
    )


dispatch.register(
    "rope_write",
    [
        dispatch.Implementation("mosaic_sm90", mosaic_sm90.rope_write, dispatch.hopper_only),
        dispatch.Implementation("xla", reference.rope_write),
    ],
)
