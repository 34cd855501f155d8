"""Attention over paged keys and values in plain XLA: runs anywhere, and is the oracle of the kernels' tests.

    s[i, j] = softcap(sm_scale * k_scale * <q_i, k_j>)      softcap(s) = c * tanh(s / c)
    o[i]    = v_scale * sum_j softmax_j(s[i, :])[j] * v_j   over j in (p_i - window, p_i],  p_i = q_start + i

All arithmetic is float32 (precision HIGHEST: no TF32 on a GPU). Scores and values outside a row's range are replaced,
not multiplied by zero, so NaN in a page that nobody wrote, or that was recycled behind the window, never spreads.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# Gathered keys + values + scores of one step of the outer map, in bytes. It bounds the memory of large batches
# (256 rows x 8,192 tokens x 8 heads x 128 would otherwise gather 17 GB) and still fills a GPU.
_CHUNK_BYTES = 256 * 2**20


def _head_scale(scale: jax.Array | float) -> jax.Array:
    """() or [1] or [Hkv] -> [1|Hkv, 1, 1], to multiply [Hkv, rows, columns]."""
    return jnp.asarray(scale, jnp.float32).reshape(-1, 1, 1)


def _attend_tile(q, k_pages, v_pages, pages, q_start, q_len, *, sm_scale, window, soft_cap, k_scale, v_scale):
    """One tile: q [Tq, H, Dh], pages [Pmax], scalars q_start, q_len -> [Tq, H, Dh] float32."""
    tq, heads, head_dim = q.shape
    _, kv_heads, page_size, _ = k_pages.shape
    group, tokens = heads // kv_heads, pages.shape[0] * page_size

    def gather(pool: jax.Array) -> jax.Array:  # -> [Hkv, S, Dh] float32
        rows = jnp.take(pool, pages, axis=0, mode="clip")
        return rows.transpose(1, 0, 2, 3).reshape(kv_heads, tokens, head_dim).astype(jnp.float32)

    query_at = q_start + lax.iota(jnp.int32, tq)
    key_at = lax.iota(jnp.int32, tokens)
    seen = key_at[None] <= query_at[:, None]  # [Tq, S]
    written = key_at < q_start + q_len  # [S]: every key that some live row of the tile may see
    if window is not None:
        seen &= key_at[None] > query_at[:, None] - window
        written &= key_at > q_start - window
    live = lax.iota(jnp.int32, tq) < q_len
    seen &= live[:, None] & written[None]

    rows = q.astype(jnp.float32).reshape(tq, kv_heads, group, head_dim).transpose(1, 0, 2, 3)
    rows = rows.reshape(kv_heads, tq * group, head_dim)
    scores = jnp.einsum("hrd,hsd->hrs", rows, gather(k_pages), precision=lax.Precision.HIGHEST) * sm_scale
    if k_scale is not None:
        scores *= _head_scale(k_scale)
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    seen = jnp.repeat(seen, group, axis=0)[None]  # [1, Tq * group, S]
    scores = jnp.where(seen, scores, -jnp.inf)
    peak = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.where(seen, jnp.exp(scores - jnp.where(peak == -jnp.inf, 0.0, peak)), 0.0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    values = jnp.where(written[None, :, None], gather(v_pages), 0.0)
    out = jnp.einsum("hrs,hsd->hrd", weights, values, precision=lax.Precision.HIGHEST)
    out /= jnp.where(total == 0.0, 1.0, total)  # rows that see nothing (padding) become zeros; NaN stays NaN
    if v_scale is not None:
        out *= _head_scale(v_scale)
    out = out.reshape(kv_heads, tq, group, head_dim).transpose(1, 0, 2, 3).reshape(tq, heads, head_dim)
    return jnp.where(live[:, None, None], out, 0.0)


def prefill_attention(
    q, k_pages, v_pages, page_table, q_start, q_len, *, sm_scale, window=None, soft_cap=None, k_scale=None, v_scale=None
):
    """See api.prefill_attention. Maps over tiles, as many at a time as `_CHUNK_BYTES` holds."""
    tiles, tq, heads, head_dim = q.shape
    _, kv_heads, page_size, _ = k_pages.shape
    tokens = page_table.shape[1] * page_size
    if q.size == 0 or tokens == 0:
        return jnp.zeros_like(q)
    tile_bytes = 4 * tokens * (2 * kv_heads * head_dim + 2 * tq * heads)

    def one(args):
        rows, pages, start, length = args
        out = _attend_tile(
            rows, k_pages, v_pages, pages, start, length,
            sm_scale=sm_scale, window=window, soft_cap=soft_cap, k_scale=k_scale, v_scale=v_scale,
        )  # fmt: skip
        return out.astype(q.dtype)

    at_once = int(np.clip(_CHUNK_BYTES // tile_bytes, 1, tiles))
    inputs = (q, page_table, q_start.astype(jnp.int32), q_len.astype(jnp.int32))
    return jax.vmap(lambda *a: one(a))(*inputs) if at_once == tiles else lax.map(one, inputs, batch_size=at_once)


def decode_attention(q, k_pages, v_pages, page_table, kv_len, **kwargs):
    """See api.decode_attention: a tile of one query at position kv_len - 1."""
    live = (kv_len > 0).astype(jnp.int32)
    return prefill_attention(q[:, None], k_pages, v_pages, page_table, kv_len - 1, live, **kwargs)[:, 0]


def to_page_dtype(x: jax.Array, dtype: jnp.dtype, scale: jax.Array | float | None) -> jax.Array:
    """[T, Hkv, Dh] -> the pages' dtype. fp8 pages hold clamp(x / scale) (a cast alone turns overflow into NaN)."""
    if scale is not None:
        x = x.astype(jnp.float32) / jnp.asarray(scale, jnp.float32).reshape(1, -1, 1)
    if jnp.finfo(dtype).bits == 8:
        bound = float(jnp.finfo(dtype).max)
        x = jnp.clip(x.astype(jnp.float32), -bound, bound)  # NaN stays NaN
    return x.astype(dtype)


def write_kv(k_pages, v_pages, k, v, slots, *, k_scale=None, v_scale=None):
    """See api.write_kv.

    The pool is seen as rows of Dh, one index per (token, head). Scattering into [P, :, Ps] with two index dimensions
    instead makes XLA transpose the whole pool, twice, around the scatter. Padding (page 0) is sent past the pool, each
    row to a place of its own: XLA's scatter to places that may repeat is a compare-and-swap loop for 16-bit elements,
    and 1,000 padding rows at one slot of page 0 took 3.7 ms of a layer on an H200.
    """
    pages, kv_heads, page_size, head_dim = k_pages.shape
    page, offset = slots // page_size, slots % page_size
    rows = (page[:, None] * kv_heads + lax.iota(jnp.int32, kv_heads)[None]) * page_size + offset[:, None]
    past = pages * kv_heads * page_size + lax.iota(jnp.int32, rows.size).reshape(rows.shape)
    rows = jnp.where(((page > 0) & (page < pages))[:, None], rows, past)

    def put(pool: jax.Array, x: jax.Array, scale: jax.Array | float | None) -> jax.Array:
        flat = pool.reshape(pages * kv_heads * page_size, head_dim)
        update = to_page_dtype(x, pool.dtype, scale).reshape(-1, head_dim)
        return flat.at[rows.reshape(-1)].set(update, mode="drop", unique_indices=True).reshape(pool.shape)

    return put(k_pages, k, k_scale), put(v_pages, v, v_scale)
