"""sample on Hopper: program.py as a Mosaic GPU kernel, a cluster of eight blocks a row.

In XLA the thresholds of top-k and top-p alone are 16 passes over the row and about 100 kernels; and the noise of every
token is computed, some 120 instructions each, where here it is only that of the tokens that may be drawn.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.sample.exchange import Place
from pallas_kernels.sample.instructions import Instructions
from pallas_kernels.sample.problem import CLUSTER, THREADS, Problem, problem
from pallas_kernels.sample.program import sample_row

_INPUTS = ("logits", "temperature", "top_k", "top_p", "min_p", "seed", "position")
_OUTPUTS = ("tokens", "totals", "thresholds")


@functools.lru_cache(maxsize=64)
def _kernel(p: Problem, rows: int) -> Any:
    def sample(*refs: Any) -> None:
        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * len(refs))
        def program(ctx: Any, *buffers: Any) -> None:
            del ctx
            ops = Instructions(dict(zip(_INPUTS + _OUTPUTS, buffers)), buffers[-1])
            rank, thread = ops.special("cluster_ctarank"), ops.special("tid.x")
            row = ops.special("ctaid.x") // CLUSTER
            sample_row(Place(ops, p, row, rank, thread, thread & 31, ops.uniform(thread >> 5)))

        program(*refs)

    return plgpu.kernel(
        sample,
        out_type=[jax.ShapeDtypeStruct((rows,), dtype) for dtype in (jnp.int32, jnp.float32, jnp.float32)],
        scratch_types=[plgpu.SMEM((p.smem_bytes,), jnp.int8)],
        grid=(rows,),
        grid_names=("row",),
        cluster=(CLUSTER,),
        cluster_names=("block",),
        num_threads=THREADS // 128,
        thread_name="wg",
        kernel_name="sample_sm90",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    )


def sample(logits, temperature, top_k, top_p, min_p, seed, position):
    """See api.sample."""
    rows, vocabulary = logits.shape
    p = problem(rows, vocabulary)
    words = lax.bitcast_convert_type(seed, jnp.int32)
    return tuple(_kernel(p, rows)(logits, temperature, top_k, top_p, min_p, words, position))
