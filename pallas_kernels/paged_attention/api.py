"""Attention over keys and values that live in pages: write, decode, chunked prefill.

Shape letters: P pages, Ps page size (tokens), Hkv key/value heads, H query heads (a multiple of Hkv; query head h
reads key/value head h // (H / Hkv)), Dh head dim, B batch slots, Nt tiles, Tq queries of a tile, Pmax pages of a row.

Pages of one layer: k_pages, v_pages [P, Hkv, Ps, Dh], bf16/f16/f32, or float8_e4m3fn/e5m2 with scales (true key =
k_scale * stored). Page 0 is the trash page: padding tokens are written there and nobody reads it. Position j of a row
is token j % Ps of page page_table[row, j // Ps]; entries past the row's length may hold anything.
A scale is a float or a float32 array [], [1] or [Hkv].
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.paged_attention import mosaic_decode_sm90, mosaic_prefill_sm90, reference

Scale = jax.Array | float | None
FLOATS = (jnp.bfloat16, jnp.float16, jnp.float32)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _check_pages(op: str, k_pages: jax.Array, v_pages: jax.Array) -> None:
    _require(
        k_pages.ndim == 4 and k_pages.shape == v_pages.shape and k_pages.dtype == v_pages.dtype,
        f"{op}: k_pages and v_pages must both be [P, Hkv, Ps, Dh] of one dtype, found "
        f"{k_pages.shape} {k_pages.dtype} and {v_pages.shape} {v_pages.dtype}",
    )
    _require(jnp.issubdtype(k_pages.dtype, jnp.floating), f"{op}: pages must be floating point, found {k_pages.dtype}")


def check_scale(op: str, name: str, scale: Scale, kv_heads: int) -> None:
    shape = jnp.shape(scale) if scale is not None else ()
    _require(shape in ((), (1,), (kv_heads,)), f"{op}: {name} must be a scalar, [1] or [{kv_heads}], found {shape}")


def _check_vector(op: str, name: str, x: jax.Array, shape: tuple[int, ...]) -> None:
    _require(
        x.shape == shape and jnp.issubdtype(x.dtype, jnp.integer),
        f"{op}: {name} must be an integer array {list(shape)}, found {x.shape} {x.dtype}",
    )


def _check_read(op, q, k_pages, v_pages, page_table, window, soft_cap, k_scale, v_scale) -> None:
    _check_pages(op, k_pages, v_pages)
    _, kv_heads, _, head_dim = k_pages.shape
    heads = q.shape[-2]
    _require(q.dtype in FLOATS, f"{op}: q must be bfloat16, float16 or float32, found {q.dtype}")
    _require(q.shape[-1] == head_dim, f"{op}: q has head dim {q.shape[-1]}, the pages have {head_dim}")
    _require(
        kv_heads > 0 and heads % kv_heads == 0,
        f"{op}: {heads} query heads are no multiple of {kv_heads} key/value heads",
    )
    _require(
        page_table.ndim == 2 and page_table.shape[0] == q.shape[0] and jnp.issubdtype(page_table.dtype, jnp.integer),
        f"{op}: page_table must be an integer array [{q.shape[0]}, Pmax], found {page_table.shape} {page_table.dtype}",
    )
    _require(window is None or window >= 1, f"{op}: window must be None or >= 1, found {window}")
    _require(soft_cap is None or soft_cap > 0, f"{op}: soft_cap must be None or > 0, found {soft_cap}")
    check_scale(op, "k_scale", k_scale, kv_heads)
    check_scale(op, "v_scale", v_scale, kv_heads)


def write_kv(
    k_pages: jax.Array,
    v_pages: jax.Array,
    k: jax.Array,
    v: jax.Array,
    slots: jax.Array,
    *,
    k_scale: Scale = None,
    v_scale: Scale = None,
) -> tuple[jax.Array, jax.Array]:
    """Writes the keys and values of T tokens into their pages; in place where the caller donates the pages.

    Args:
      k_pages, v_pages: [P, Hkv, Ps, Dh].
      k, v: [T, Hkv, Dh], any float dtype; stored as x / scale (scale None = 1), clamped to the range of fp8 pages.
      slots: [T] int32, page * Ps + offset. Padding tokens name a slot of page 0, whose contents are undefined
        afterwards. Two tokens must not share a slot outside page 0. A slot past the pool is dropped.

    Returns the new (k_pages, v_pages). Raises ValueError on shapes or dtypes that do not fit.
    """
    op = "write_kv"
    _check_pages(op, k_pages, v_pages)
    _, kv_heads, _, head_dim = k_pages.shape
    _require(
        k.ndim == 3 and k.shape[1:] == (kv_heads, head_dim) and v.shape == k.shape,
        f"{op}: k and v must be [T, {kv_heads}, {head_dim}], found {k.shape} and {v.shape}",
    )
    for name, x in (("k", k), ("v", v)):
        _require(jnp.issubdtype(x.dtype, jnp.floating), f"{op}: {name} must be floating point, found {x.dtype}")
    _check_vector(op, "slots", slots, (k.shape[0],))
    check_scale(op, "k_scale", k_scale, kv_heads)
    check_scale(op, "v_scale", v_scale, kv_heads)
    return dispatch.call(op, None, k_pages, v_pages, k, v, slots, k_scale=k_scale, v_scale=v_scale)


def decode_attention(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    page_table: jax.Array,
    kv_len: jax.Array,
    *,
    sm_scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    k_scale: Scale = None,
    v_scale: Scale = None,
    implementation: str | None = None,
) -> jax.Array:
    """Attention of one query per batch slot over its pages.

    Args:
      q: [B, H, Dh] bf16/f16/f32; row b stands at position kv_len[b] - 1, whose key and value are in the pages already.
      k_pages, v_pages: [P, Hkv, Ps, Dh].
      page_table: [B, Pmax] int32. kv_len: [B] int32, at most Pmax * Ps; 0 = padding row, gives zeros.
      k_scale, v_scale: what `write_kv` divided by: a float or a float32 scalar array; None = 1.
      sm_scale: multiplies <q, k>, usually Dh ** -0.5. window w: only the last w keys are seen.
      soft_cap c: scores become c * tanh(score / c) before the softmax.
      implementation: name of one implementation (see `pallas_kernels.dispatch`); None = the first that fits.

    Returns [B, H, Dh] in q.dtype. Raises ValueError on shapes or dtypes that do not fit.
    """
    op = "decode_attention"
    _require(q.ndim == 3, f"{op}: q must be [B, H, Dh], found {q.shape}")
    _check_read(op, q, k_pages, v_pages, page_table, window, soft_cap, k_scale, v_scale)
    _check_vector(op, "kv_len", kv_len, (q.shape[0],))
    return dispatch.call(
        op, implementation, q, k_pages, v_pages, page_table, kv_len,
        sm_scale=sm_scale, window=window, soft_cap=soft_cap, k_scale=k_scale, v_scale=v_scale,
    )  # fmt: skip


def prefill_attention(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    page_table: jax.Array,
    q_start: jax.Array,
    q_len: jax.Array,
    *,
    sm_scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    k_scale: Scale = None,
    v_scale: Scale = None,
    implementation: str | None = None,
) -> jax.Array:
    """Causal attention of tiles of consecutive queries over their sequence's pages (chunked prefill).

    Args:
      q: [Nt, Tq, H, Dh]; query i of tile t stands at position q_start[t] + i of its sequence and sees the keys at
        positions <= that (with a window w: in (position - w, position]). The keys and values of the chunk are in the
        pages already. Several tiles may belong to one sequence.
      page_table: [Nt, Pmax] int32. q_start, q_len: [Nt] int32; rows i >= q_len[t] give zeros, q_len 0 = padding tile.
      The rest: as in `decode_attention`.

    Returns [Nt, Tq, H, Dh] in q.dtype. Raises ValueError on shapes or dtypes that do not fit.
    """
    op = "prefill_attention"
    _require(q.ndim == 4, f"{op}: q must be [Nt, Tq, H, Dh], found {q.shape}")
    _check_read(op, q, k_pages, v_pages, page_table, window, soft_cap, k_scale, v_scale)
    _check_vector(op, "q_start", q_start, (q.shape[0],))
    _check_vector(op, "q_len", q_len, (q.shape[0],))
    return dispatch.call(
        op, implementation, q, k_pages, v_pages, page_table, q_start, q_len,
        sm_scale=sm_scale, window=window, soft_cap=soft_cap, k_scale=k_scale, v_scale=v_scale,
    )  # fmt: skip


dispatch.register("write_kv", [dispatch.Implementation("xla", reference.write_kv)])
dispatch.register(
    "decode_attention",
    [
        dispatch.Implementation("mosaic_sm90", mosaic_decode_sm90.decode_attention, dispatch.hopper_only),
        dispatch.Implementation("xla", reference.decode_attention),
    ],
)
dispatch.register(
    "prefill_attention",
    [
        dispatch.Implementation("mosaic_sm90", mosaic_prefill_sm90.prefill_attention, dispatch.hopper_only),
        dispatch.Implementation("xla", reference.prefill_attention),
    ],
)
