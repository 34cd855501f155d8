"""Attention as the models ask for it: over pages (serving), or over whole sequences (the library)."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jqserve.ops.ahead import Ahead
from pallas_kernels.paged_attention.api import decode_attention, prefill_attention, write_kv
from pallas_kernels.rope_write.api import rope_write

_QUERY_BLOCK = 1024  # rows of scores held at once in `full_attention`: float32 [H, 1024, S]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionMetadata:
    """Where the T = Bd + Nt * Tq rows of a step stand: first Bd decode rows, then Nt prefill tiles of Tq rows each.

    All int32 and on the device; Bd or Nt may be 0, and Tq follows from the shapes. Pages are numbered over the pool.

    kv_slots      [T]         page * Ps + offset where this row's key and value go; padding rows: a slot of page 0
    decode_table  [Bd, Pmax]  the pages of each decode row's sequence, in order
    decode_len    [Bd]        keys that the row sees, its own included; 0 = padding
    tile_table    [Nt, Pmax]  the pages of each tile's sequence
    tile_start    [Nt]        position in its sequence of the tile's first row
    tile_len      [Nt]        rows of the tile that are real; 0 = padding
    """

    kv_slots: jax.Array
    decode_table: jax.Array
    decode_len: jax.Array
    tile_table: jax.Array
    tile_start: jax.Array
    tile_len: jax.Array


def paged_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    pages: tuple[jax.Array, jax.Array],
    meta: AttentionMetadata,
    *,
    sm_scale: float,
    window: int | None,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Writes k, v [T, Hkv, Dh] into (k_pages, v_pages) [P, Hkv, Ps, Dh], then attends q [T, H, Dh] over them.

    k_scale, v_scale: float32 [], of fp8 pages: they hold x / scale.
    Returns ([T, H, Dh], new pages). Padding rows come out as zeros. `window` w: position p sees keys in (p - w, p].
    """
    scales: dict[str, Any] = {"k_scale": k_scale, "v_scale": v_scale}
    pages = write_kv(*pages, k, v, meta.kv_slots, **scales)
    return attend_pages(q, pages, meta, sm_scale=sm_scale, window=window, **scales), pages


def paged_attention_of_projection(
    qkv: jax.Array,
    rope: tuple[jax.Array, jax.Array],
    ahead: Ahead | None = None,
    *,
    pages: tuple[jax.Array, jax.Array],
    meta: AttentionMetadata,
    sm_scale: float,
    window: int | None,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """`paged_attention` of a fused projection qkv [T, (H + 2 Hkv) * Dh], queries and keys not turned yet.

    rope: cos, sin float32 [T, Dh/2]. Turning them and writing the pages is one kernel where a device has it.
    """
    scales: dict[str, Any] = {"k_scale": k_scale, "v_scale": v_scale}
    q, *written = rope_write(qkv, *rope, meta.kv_slots, *pages, **scales, ahead=ahead)
    pages = (written[0], written[1])
    return attend_pages(q, pages, meta, sm_scale=sm_scale, window=window, **scales), pages


def attend_pages(
    q: jax.Array,
    pages: tuple[jax.Array, jax.Array],
    meta: AttentionMetadata,
    *,
    sm_scale: float,
    window: int | None,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
) -> jax.Array:
    """q [T, H, Dh] over pages that hold this step's keys and values already -> [T, H, Dh]."""
    k_pages, v_pages = pages
    decodes, tiles = meta.decode_len.shape[0], meta.tile_len.shape[0]
    outputs = []
    if decodes:
        outputs.append(
            decode_attention(
                q[:decodes],
                k_pages,
                v_pages,
                meta.decode_table,
                meta.decode_len,
                sm_scale=sm_scale,
                window=window,
                k_scale=k_scale,
                v_scale=v_scale,
            )
        )
    if tiles:
        queries = q[decodes:].reshape(tiles, -1, *q.shape[1:])
        out = prefill_attention(
            queries,
            k_pages,
            v_pages,
            meta.tile_table,
            meta.tile_start,
            meta.tile_len,
            sm_scale=sm_scale,
            window=window,
            k_scale=k_scale,
            v_scale=v_scale,
        )
        outputs.append(out.reshape(-1, *q.shape[1:]))
    return outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs)


def through_fp8(x: jax.Array, scale: jax.Array) -> jax.Array:
    """What float8_e4m3fn pages give back of x: scale * round(clamp(x / scale)), in x's dtype."""
    stored = jnp.clip(x.astype(jnp.float32) / scale, -448.0, 448.0).astype(jnp.float8_e4m3fn)
    return (stored.astype(jnp.float32) * scale).astype(x.dtype)


def full_attention(q: jax.Array, k: jax.Array, v: jax.Array, *, sm_scale: float, window: int | None) -> jax.Array:
    """Causal attention of whole sequences: q [..., S, H, Dh], k and v [..., S, Hkv, Dh] -> [..., S, H, Dh].

    Plain differentiable XLA; scores and softmax in float32. Queries go block by block over the keys that they can
    see, so that memory grows with S and not with S * S.
    """
    length = q.shape[-3]
    blocks = []
    for start in range(0, length, _QUERY_BLOCK):
        stop = min(start + _QUERY_BLOCK, length)
        first = 0 if window is None else max(0, start - window + 1)
        blocks.append(
            _attend(
                q[..., start:stop, :, :],
                k[..., first:stop, :, :],
                v[..., first:stop, :, :],
                offset=start - first,
                sm_scale=sm_scale,
                window=window,
            )
        )
    return blocks[0] if len(blocks) == 1 else jnp.concatenate(blocks, axis=-3)


def _attend(q, k, v, *, offset: int, sm_scale: float, window: int | None) -> jax.Array:
    """One block of queries, whose first stands `offset` keys after the first key."""
    *lead, rows, heads, head_dim = q.shape
    kv_heads = k.shape[-2]
    grouped = q.reshape(*lead, rows, kv_heads, heads // kv_heads, head_dim)
    precision = lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    scores = jnp.einsum("...qhgd,...khd->...hgqk", grouped, k, preferred_element_type=jnp.float32, precision=precision)
    behind = (jnp.arange(rows) + offset)[:, None] - jnp.arange(k.shape[-3])[None, :]
    seen = behind >= 0 if window is None else (behind >= 0) & (behind < window)
    weights = jax.nn.softmax(jnp.where(seen, scores * sm_scale, -jnp.inf), axis=-1)
    out = jnp.einsum("...hgqk,...khd->...qhgd", weights.astype(v.dtype), v, precision=precision)
    return out.reshape(q.shape)
