"""XLA implementation of scaled_matmul: runs anywhere; on the CPU it is the oracle of the tests."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.dispatch import current_device

_BLOCK = 128
_EXACT_K = 2**17 - 128  # as many products of two int8 as int32 surely holds
_NT = (((1,), (1,)), ((), ()))  # contract the last axis of both operands


def expand_w_scale(w_scale: jax.Array, n: int) -> jax.Array:
    """[1, G], [N, G] or [ceil(N/128), G] -> [1, G] or [N, G]."""
    if w_scale.shape[0] in (1, n):
        return w_scale
    return jnp.repeat(w_scale, _BLOCK, axis=0)[:n]


def scaled_matmul(
    xq: jax.Array,
    wq: jax.Array,
    x_scale: jax.Array,
    w_scale: jax.Array,
    bias: jax.Array | None = None,
    *,
    out_dtype: jax.typing.DTypeLike = jnp.bfloat16,
) -> jax.Array:
    """See `api.scaled_matmul`. Row, channel and tensor scales multiply the float32 (int32) product."""
    w_scale = expand_w_scale(w_scale, wq.shape[0])
    if x_scale.shape[1] == 1 and w_scale.shape[1] == 1:
        out = _dot(xq, wq) * x_scale * w_scale.T
    else:
        out = _block_dot(xq, wq, x_scale, w_scale)
    if bias is not None:
        out = out + bias.astype(jnp.float32)
    return out.astype(out_dtype)


def _dot(xq: jax.Array, wq: jax.Array) -> jax.Array:
    """float32 [M, N]: native int8 / fp8 on a GPU (cuBLASLt, Triton); the CPU has no fp8 dot, so float32 there."""
    if xq.dtype == jnp.int8:
        if xq.shape[1] > _EXACT_K:
            parts = range(0, xq.shape[1], _EXACT_K)
            return sum((_dot(xq[:, i : i + _EXACT_K], wq[:, i : i + _EXACT_K]) for i in parts), jnp.float32(0))
        return lax.dot_general(xq, wq, _NT, preferred_element_type=jnp.int32).astype(jnp.float32)
    capability = current_device().compute_capability
    if capability is None or capability < (8, 9):
        # fp8 came with compute capability 8.9; products of two fp8 numbers are exact in float32.
        xq, wq = xq.astype(jnp.float32), wq.astype(jnp.float32)
        return lax.dot_general(xq, wq, _NT, precision=lax.Precision.HIGHEST)
    return lax.dot_general(xq, wq, _NT, preferred_element_type=jnp.float32)


def _block_dot(xq: jax.Array, wq: jax.Array, x_scale: jax.Array, w_scale: jax.Array) -> jax.Array:
    """Dequantizes both operands: float32 on the CPU (the oracle), bf16 on a GPU.

    On a GPU one bf16 GEMM (its operands rounded to 2^-9) beats 32 accumulating fp8 GEMMs of K = 128, which would
    read and write the float32 result 32 times.
    """
    on_gpu = current_device().platform == "cuda"
    dtype = jnp.bfloat16 if on_gpu else jnp.float32
    k = xq.shape[1]

    def dequantize(q, scale):
        scale = scale if scale.shape[1] == 1 else jnp.repeat(scale, _BLOCK, axis=1)[:, :k]
        return (q.astype(jnp.float32) * scale).astype(dtype)

    return lax.dot_general(
        dequantize(xq, x_scale),
        dequantize(wq, w_scale),
        _NT,
        preferred_element_type=jnp.float32,
        precision=None if on_gpu else lax.Precision.HIGHEST,
    )
