"""Chunked prefill on Hopper: two warpgroups that attend (prefill_attend), one that loads (prefill_load).

The grid is as large as the GPU; each CTA walks over a list of items, a head of 128 queries of a tile each, and starts
to load the next while the result of the last is on its way out: an item of 4,096 keys takes 40 us, of which starting
and ending a CTA would take three.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxlib.mlir import ir

from pallas_kernels import dispatch, tuning
from pallas_kernels.paged_attention import prefill_load
from pallas_kernels.paged_attention.config import PrefillConfig, prefill_heuristic, prefill_search_space
from pallas_kernels.paged_attention.prefill_attend import Attend
from pallas_kernels.paged_attention.prefill_problem import CONSUMERS, ROWS, SMEM_BYTES, Problem, rings
from pallas_kernels.paged_attention.simt import Mlir, Reg, warpgroup_index

_FP8 = {"float8_e4m3fn": "e4m3", "float8_e5m2": "e5m2"}


def _program(ctx: Any, p: Problem, refs: dict[str, ir.Value]) -> None:
    buffers = ("page_table", "q_start", "q_len", "k_scale", "v_scale", *(("flags", "partial") if p.rest else ()))
    ops = Mlir({n: refs[n] for n in buffers}, refs["q_smem"])
    thread = ops.special("tid.x")
    barriers = rings(ops, p, refs["barriers"])

    def init() -> None:
        for name, (count, arrivals) in p.barriers().items():
            for i in range(count):
                pointer = Reg(barriers[name].at(ops.const_i32(i)).get_ptr())
                ops._ptx("mbarrier.init.shared.b64 [$0], $1;", pointer, ops.const_i32(arrivals), effects=True)

    ops.when(thread.equals(0), init)
    ops._ptx("fence.mbarrier_init.release.cluster;", effects=True)
    ops.barrier()
    warpgroup = warpgroup_index()
    ops.when(warpgroup.equals(CONSUMERS), lambda: prefill_load.load(ctx, ops, p, refs, barriers, thread))
    ops.when(warpgroup < CONSUMERS, lambda: Attend(ctx, ops, p, refs, barriers, thread, warpgroup).run())


@functools.lru_cache(maxsize=256)
def _kernel(p: Problem, q_dtype: Any, kv_dtype: Any):
    stages, block = p.config.stages, p.config.block_kv
    wgmma_dtype = jnp.float16 if p.fp8 else q_dtype
    scratch: dict[str, Any] = {
        "q_smem": plgpu.SMEM((CONSUMERS, *p.tiled(ROWS)), q_dtype),
        "k_smem": plgpu.SMEM((stages, *p.tiled(block)), wgmma_dtype),
        "v_smem": plgpu.SMEM((stages, *p.tiled(block)), wgmma_dtype),
        "barriers": plgpu.SMEM((8 * sum(count for count, _ in p.barriers().values()),), jnp.int8),
    }
    if p.own_output:
        scratch["out_smem"] = plgpu.SMEM((CONSUMERS, *p.tiled(ROWS)), q_dtype)
    if p.fp8:
        raw = plgpu.SMEM((p.raw_stages, block, p.head_dim), kv_dtype)
        scratch |= {"raw_k": raw, "raw_v": raw}
    inputs: tuple[str, ...] = ("q", "k_pages", "v_pages", "page_table", "q_start", "q_len", "k_scale", "v_scale")
    outputs = {"out": jax.ShapeDtypeStruct((p.tiles * p.queries, p.heads, p.head_dim), q_dtype)}
    if p.rest:
        inputs += ("flags",)
        outputs["partial"] = jax.ShapeDtypeStruct((p.blocks, CONSUMERS, p.partial_rows, 128, 4), jnp.float32)
    names = (*inputs, *outputs, *scratch)

    def paged_prefill(*refs):
        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * len(names))
        def program(ctx, *refs):
            _program(ctx, p, dict(zip(names, refs, strict=True)))

        program(*refs)

    return plgpu.kernel(
        paged_prefill,
        out_type=list(outputs.values()),
        scratch_types=list(scratch.values()),
        grid=(p.blocks,),
        grid_names=("cta",),
        num_threads=CONSUMERS + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane, approx_math=True),
    )


def prefill_attention(
    q, k_pages, v_pages, page_table, q_start, q_len, *, sm_scale, window=None, soft_cap=None, k_scale=None,
    v_scale=None, config: PrefillConfig | None = None,
):  # fmt: skip
    """See api.prefill_attention."""
    tiles, queries, heads, head_dim = q.shape
    pages, kv_heads, page_size, _ = k_pages.shape
    fp8 = _FP8.get(str(k_pages.dtype))
    if q.dtype not in (jnp.bfloat16, jnp.float16) or (fp8 is None and k_pages.dtype != q.dtype):
        raise NotImplementedError(
            f"takes bf16 or f16 queries on pages of the same dtype or fp8, not {q.dtype} on {k_pages.dtype}"
        )
    if head_dim % 32 or head_dim > 256:
        raise NotImplementedError(f"takes head dims up to 256 that are multiples of 32, not {head_dim}")
    if queries % (ROWS * CONSUMERS):
        raise NotImplementedError(f"takes tiles of a multiple of {ROWS * CONSUMERS} queries, not {queries}")
    if not sm_scale > 0:
        raise NotImplementedError(f"takes a positive sm_scale, not {sm_scale}")
    if q.size == 0 or page_table.shape[1] == 0:
        raise NotImplementedError("takes no empty batch or page table")
    items = tiles * queries // (ROWS * CONSUMERS) * heads
    cores = dispatch.current_device().core_count or 132

    def described(config: PrefillConfig) -> Problem:
        if page_size % 8 or config.block_kv % page_size:
            raise NotImplementedError(
                f"takes page sizes that are multiples of 8 and divide {config.block_kv}, not {page_size}"
            )
        if config.block_kv % 16 or config.block_kv * head_dim % 2048:
            raise NotImplementedError(
                f"takes blocks of a multiple of 16 keys and of 2,048 elements, not {config.block_kv} keys x {head_dim}"
            )
        p = Problem(
            tiles=tiles, queries=queries, heads=heads, kv_heads=kv_heads, head_dim=head_dim, pages=pages,
            page_size=page_size, table_width=page_table.shape[1], sm_scale=float(sm_scale), window=window,
            soft_cap=None if soft_cap is None else float(soft_cap), k_scaled=k_scale is not None,
            v_scaled=v_scale is not None, fp8=fp8, blocks=cores if config.split_last else min(items, cores),
            config=config,
        )  # fmt: skip
        if p.fixed_bytes > SMEM_BYTES:
            raise NotImplementedError(f"{config} needs {p.fixed_bytes} bytes of shared memory of {SMEM_BYTES}")
        return p

    config = config or tuning.choose(
        "prefill_attention",
        tuning.key(head_dim=head_dim, page_size=page_size, kv=k_pages.dtype, items=tuning.bucket(items)),
        heuristic=lambda: prefill_heuristic(head_dim, items, cores, fp8=fp8 is not None),
        space=lambda: prefill_search_space(head_dim, page_size),
        check=described,
    )
    p = described(config)

    def per_head(scale: Any) -> jax.Array:
        if scale is None:  # not read; ones would be a kernel of their own in front of each call
            return q_start.astype(jnp.int32)
        return jnp.broadcast_to(jnp.asarray(scale, jnp.float32).reshape(-1), (kv_heads,))

    rows = pages * kv_heads * page_size
    # Zero before and after: the kernel takes down each flag that it raises. Every call of a program shares this one.
    flags = [jnp.zeros((CONSUMERS * p.blocks,), jnp.int32)] if p.rest else []
    out = _kernel(p, q.dtype, k_pages.dtype)(
        q.reshape(tiles * queries, heads, head_dim), k_pages.reshape(rows, head_dim), v_pages.reshape(rows, head_dim),
        page_table.astype(jnp.int32), q_start.astype(jnp.int32), q_len.astype(jnp.int32),
        per_head(k_scale), per_head(v_scale), *flags,
    )[0]  # fmt: skip
    return out.reshape(q.shape)
