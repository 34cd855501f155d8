"""The path for weights that no packed kernel takes: they stay packed in memory and are dequantized inside the step.

A block of rows of W at a time is dequantized in the dtype of x and multiplied, in a loop of XLA's; the whole matrix
never exists. A block is small enough to stay in a GPU's second-level cache (H100: 50 MB), so that memory is asked for
the packed bytes, and large enough for a full wave of the matmul's tiles. The plan calls this "generic".

Code-book types (nf4, fp4) and 8-bit values with float offsets (GGUF's Q5_1, Q5_K) come here on any device; on a GPU
also groups that its kernels do not take, and every weight-only scheme where there are no kernels (not Hopper). On a CPU
those run in the kernels' XLA references, which are what the tests compare with.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jqserve.ops.relayout import grid_per_row
from jqserve.quant import QuantizedTensor, dequantize

#: Bytes of one dequantized block, at most; 2,048 rows of 4,096 in bfloat16.
BLOCK_BYTES = 16 << 20
#: Rows of a block are a multiple of this: tiles of a GPU's matmul are 64 to 256 wide.
ALIGNED = 128


def generic_matmul(x: jax.Array, weight: QuantizedTensor, block_bytes: int = BLOCK_BYTES) -> jax.Array:
    """x [M, K] float @ W.T -> [M, N] in x's dtype; W, canonical, is rounded to it once, sums are in float32."""
    (m, _), (n, k) = x.shape, weight.shape
    if weight.perm is not None:
        x = jnp.take(x, weight.perm, axis=1, unique_indices=True, mode="clip")
    rows = min(n, max(1, block_bytes // (k * x.dtype.itemsize * ALIGNED)) * ALIGNED)
    scale = grid_per_row(weight.scale, weight.spec)
    zero = None if weight.zero_point is None else grid_per_row(weight.zero_point, weight.spec)
    group = (1 if scale.shape[0] == n else rows, weight.spec.group_size)
    spec = weight.spec.replace(shape=(rows, k), group_shape=group)

    def cut(a: Any, start: jax.Array | int) -> Any:
        return a if a is None or a.shape[0] != n else lax.dynamic_slice_in_dim(a, start, rows)

    def columns(start: jax.Array | int) -> jax.Array:
        """y[:, start : start + rows]"""
        block = QuantizedTensor(cut(weight.qvalue, start), cut(scale, start), cut(zero, start), None, None, spec)
        precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
        contract = (((1,), (1,)), ((), ()))
        return lax.dot_general(
            x, dequantize(block, x.dtype), contract, precision=precision, preferred_element_type=x.dtype
        )

    if rows == n:
        return columns(0)

    def step(i: jax.Array, y: jax.Array) -> jax.Array:
        start = jnp.minimum(i * rows, n - rows)  # the last block may overlap the one before, which changes nothing
        return lax.dynamic_update_slice_in_dim(y, columns(start), start, axis=1)

    return lax.fori_loop(0, -(-n // rows), step, jnp.zeros((m, n), x.dtype))
