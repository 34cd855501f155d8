"""Decode attention on Hopper: decode_warp.py's program as a Mosaic GPU kernel.

mma.sync, ldmatrix and cp.async are sm_80 instructions; clusters and distributed shared memory make it sm_90.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels import dispatch, tuning
from pallas_kernels.paged_attention import decode_warp
from pallas_kernels.paged_attention.config import DecodeConfig, decode_heuristic, decode_search_space
from pallas_kernels.paged_attention.decode_warp import Problem
from pallas_kernels.paged_attention.prefill_problem import SMEM_BYTES
from pallas_kernels.paged_attention.simt import Mlir

_KINDS = {"bfloat16": "bf16", "float16": "f16", "float8_e4m3fn": "e4m3", "float8_e5m2": "e5m2"}


def problem(q, k_pages, page_table, config: DecodeConfig, **kwargs: Any) -> Problem:
    """The static description of a call, or NotImplementedError with what this kernel does not take."""
    _, heads, head_dim = q.shape
    _, kv_heads, page_size, _ = k_pages.shape
    if q.size == 0 or page_table.shape[1] == 0:
        raise NotImplementedError("takes no empty batch or page table")
    q_kind, kv_kind = _KINDS.get(str(q.dtype)), _KINDS.get(str(k_pages.dtype))
    if q_kind not in ("bf16", "f16") or kv_kind is None or (kv_kind in ("bf16", "f16") and kv_kind != q_kind):
        raise NotImplementedError(
            f"takes bf16 or f16 queries on pages of the same dtype or fp8, not {q.dtype} on {k_pages.dtype}"
        )
    if head_dim % 32 or head_dim > 256:
        raise NotImplementedError(f"takes head dims up to 256 that are multiples of 32, not {head_dim}")
    if page_size % decode_warp.TILE:
        raise NotImplementedError(f"takes page sizes that are multiples of 16, not {page_size}")
    group = heads // kv_heads
    parts = -(-group // 16)
    if group % parts:
        raise NotImplementedError(f"takes groups of up to 16 query heads or multiples of 16, not {group}")
    p = Problem(
        heads=group // parts, parts=parts, kv_heads=kv_heads, head_dim=head_dim, page_size=page_size,
        table_width=page_table.shape[1], kv_kind=kv_kind, q_kind=q_kind, warps=config.warps, stages=config.stages,
        split=config.split, pdl=config.pdl, **kwargs,
    )  # fmt: skip
    if p.smem_bytes > SMEM_BYTES:
        raise NotImplementedError(f"{config} needs {p.smem_bytes} bytes of shared memory of {SMEM_BYTES}")
    return p


@functools.lru_cache(maxsize=256)
def _kernel(p: Problem, rows: int, dtype: Any):
    items = rows * p.kv_heads * p.parts

    def paged_decode(q, k_pages, v_pages, page_table, kv_len, k_scale, v_scale, out, smem):
        if p.pdl:
            plgpu.griddepcontrol_wait()
            plgpu.griddepcontrol_launch_dependents()

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * 9)
        def program(ctx, q, k_pages, v_pages, page_table, kv_len, k_scale, v_scale, out, smem):
            del ctx
            buffers = dict(q=q, k_pages=k_pages, v_pages=v_pages, page_table=page_table, kv_len=kv_len)
            ops = Mlir(buffers | dict(k_scale=k_scale, v_scale=v_scale, out=out), smem)
            thread = ops.special("tid.x")
            warp, lane = ops.uniform(thread >> 5), thread & 31
            if p.split > 1:
                item, rank = ops.special("clusterid.x"), ops.special("cluster_ctarank")
            else:
                item, rank = ops.special("ctaid.x"), ops.const_i32(0)
            decode_warp.stream(ops, p, item, rank, warp, lane)
            ops.barrier()
            decode_warp.merge_warps(ops, p, item, thread)
            if p.split > 1:
                ops.cluster_barrier()
                decode_warp.merge_cluster(ops, p, item, rank, thread)
                ops.cluster_barrier()  # peers may still read this CTA's shared memory

        program(q, k_pages, v_pages, page_table, kv_len, k_scale, v_scale, out, smem)

    cluster: dict[str, Any] = dict(cluster=(p.split,), cluster_names=("split",)) if p.split > 1 else {}
    return plgpu.kernel(
        paged_decode,
        out_type=jax.ShapeDtypeStruct((rows, p.kv_heads * p.parts * p.heads, p.head_dim), dtype),
        scratch_types=[plgpu.SMEM((p.smem_bytes,), jnp.int8)],
        grid=(items,),
        grid_names=("item",),
        num_threads=p.warps // 4,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        **cluster,
    )


def decode_attention(
    q, k_pages, v_pages, page_table, kv_len, *, sm_scale, window=None, soft_cap=None, k_scale=None, v_scale=None,
    config: DecodeConfig | None = None,
):  # fmt: skip
    """See api.decode_attention."""
    rows, _, head_dim = q.shape
    kv_heads = k_pages.shape[1]

    def described(config: DecodeConfig) -> Problem:
        return problem(
            q, k_pages, page_table, config, sm_scale=float(sm_scale), window=window,
            soft_cap=None if soft_cap is None else float(soft_cap),
            k_scaled=k_scale is not None, v_scaled=v_scale is not None,
        )  # fmt: skip

    if config is None:
        tokens = page_table.shape[1] * k_pages.shape[2]
        seen, row_bytes = min(tokens, window or tokens), head_dim * k_pages.dtype.itemsize
        items, cores = rows * kv_heads, dispatch.current_device().core_count
        config = tuning.choose(
            "decode_attention",
            tuning.key(items=tuning.bucket(items), tokens=tuning.bucket(seen), row_bytes=row_bytes),
            heuristic=lambda: decode_heuristic(items, seen, row_bytes, cores),
            space=lambda: decode_search_space(row_bytes),
            check=described,
        )
    p = described(config)

    def per_head(scale: Any) -> jax.Array:
        return jnp.broadcast_to(jnp.asarray(1.0 if scale is None else scale, jnp.float32).reshape(-1), (kv_heads,))

    return _kernel(p, rows, q.dtype)(
        q,
        k_pages,
        v_pages,
        page_table.astype(jnp.int32),
        kv_len.astype(jnp.int32),
        per_head(k_scale),
        per_head(v_scale),
    )
