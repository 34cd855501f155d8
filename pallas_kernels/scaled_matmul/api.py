"""Public op: y = (xq * x_scale) @ (wq * w_scale)^T for int8 or fp8 operands."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.scaled_matmul import choice, mosaic_sm90, reference

BLOCK = 128  # DeepSeek's block size along N and K
QDTYPES = (jnp.int8, jnp.float8_e4m3fn)


def scaled_matmul(
    xq: jax.Array,
    wq: jax.Array,
    x_scale: jax.Array,
    w_scale: jax.Array,
    bias: jax.Array | None = None,
    *,
    out_dtype: jax.typing.DTypeLike = jnp.bfloat16,
    implementation: str | None = None,
) -> jax.Array:
    """Multiplies quantized activations by a quantized weight: y[m,n] = sum_k x[m,k] * W[n,k] (+ bias[n]).

    Args:
      xq: [M, K] int8 or float8_e4m3fn, as `quantize_rows` returns it. M may be 0.
      wq: [N, K], the same dtype; out features first, K contiguous (what Hugging Face stores and 8-bit wgmma needs).
      x_scale: float32; [M, 1] per token, [1, 1] per tensor, or [M, ceil(K/128)] per 1x128 block.
      w_scale: float32; [N, 1] per channel, [1, 1] per tensor, or [ceil(N/128), ceil(K/128)] per 128x128 block.
        A block scale on one side may meet a [*, 1] scale on the other.
      bias: [N], any float dtype, added in float32; or None.
      out_dtype: bfloat16, float16 or float32.
      implementation: name of one implementation (see `pallas_kernels.explain`), None chooses.

    Returns: [M, N] in `out_dtype`. int8 products are summed exactly in int32 (those of K >= 2^17 in parts), scales and
      bias are applied in float32 and rounded once. For the accuracy of fp8 sums on Hopper see `mosaic_sm90`.

    Raises ValueError for shapes or dtypes outside the above.
    """
    _check(xq, wq, x_scale, w_scale, bias, out_dtype)
    return dispatch.call("scaled_matmul", implementation, xq, wq, x_scale, w_scale, bias, out_dtype=out_dtype)


def _check(xq, wq, x_scale, w_scale, bias, out_dtype) -> None:
    if xq.ndim != 2 or wq.ndim != 2 or xq.shape[1] != wq.shape[1]:
        raise ValueError(f"scaled_matmul: want xq [M, K] and wq [N, K], got {xq.shape} and {wq.shape}")
    if xq.dtype != wq.dtype or xq.dtype not in QDTYPES:
        raise ValueError(f"scaled_matmul: xq and wq must both be int8 or float8_e4m3fn, got {xq.dtype} and {wq.dtype}")
    (m, k), n = xq.shape, wq.shape[0]
    kb, nb = -(-k // BLOCK), -(-n // BLOCK)
    if x_scale.shape not in ((m, 1), (1, 1), (m, kb)):
        raise ValueError(f"scaled_matmul: x_scale must be {(m, 1)}, (1, 1) or {(m, kb)}, got {x_scale.shape}")
    if w_scale.shape not in ((n, 1), (1, 1), (nb, kb)):
        raise ValueError(f"scaled_matmul: w_scale must be {(n, 1)}, (1, 1) or {(nb, kb)}, got {w_scale.shape}")
    if x_scale.dtype != jnp.float32 or w_scale.dtype != jnp.float32:
        raise ValueError(f"scaled_matmul: scales must be float32, got {x_scale.dtype} and {w_scale.dtype}")
    if bias is not None and (bias.shape != (n,) or not jnp.issubdtype(bias.dtype, jnp.floating)):
        raise ValueError(f"scaled_matmul: bias must be {(n,)} of a float dtype, got {bias.dtype} {bias.shape}")
    if jnp.dtype(out_dtype) not in (jnp.bfloat16, jnp.float16, jnp.float32):
        raise ValueError(f"scaled_matmul: out_dtype must be bfloat16, float16 or float32, got {out_dtype}")


_CODE = (mosaic_sm90.scaled_matmul, reference.scaled_matmul)
dispatch.register(choice.OP, [candidate.run_by(fn) for candidate, fn in zip(choice.CANDIDATES, _CODE, strict=True)])
