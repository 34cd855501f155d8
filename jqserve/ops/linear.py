"""y = x @ W.T + b for every kind of weight: the one place where a weight's scheme chooses a kernel."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jqserve.ops.activations import QuantizedRows
from jqserve.ops.device import current_device
from jqserve.ops.quantized import quantized_matmul, quantized_rows_matmul
from jqserve.quant import QuantizedTensor

Weight = jax.Array | QuantizedTensor

#: Of a dense matmul on a GPU. Of a single row XLA makes a reduction of its own, at a fifth of the memory's speed:
#: 1.9 ms for the head of an 8B model, against 0.37 of cuBLAS at 64 rows (H100).
LEAST_ROWS = 8


def linear(x: jax.Array | QuantizedRows, weight: Weight, bias: jax.Array | None = None) -> jax.Array:
    """x [..., K] -> [..., N], in the dtype of x.

    weight  [N, K] array, or a QuantizedTensor in canonical or kernel layout; its spec decides what runs:
            dense              lax.dot_general, accumulated in float32
            activation "none"  the w4a16 or w8a16 kernel: weights are dequantized on the way to the tensor cores
            other activations  x is quantized (unless it is a `QuantizedRows` already), then the scaled_matmul kernel
    bias    [N], or None

    Differentiable in x: a quantized weight's gradient is that of the dequantized weight, and the rounding of
    activations passes the gradient on unchanged. Raises UnsupportedError for a scheme without a kernel.
    """
    if isinstance(x, QuantizedRows):
        assert isinstance(weight, QuantizedTensor)
        return quantized_rows_matmul(x, weight, bias)
    if not isinstance(weight, QuantizedTensor):
        y = dense_matmul(x, weight)
        return y if bias is None else y + bias.astype(y.dtype)
    flat = x.reshape(-1, x.shape[-1])
    return quantized_matmul(flat, weight, bias).reshape(*x.shape[:-1], weight.shape[0])


def dense_matmul(x: jax.Array, weight: jax.Array, out_dtype: Any = None) -> jax.Array:
    """x [..., K] @ weight [N, K].T -> [..., N] in `out_dtype` (default: x's).

    The result dtype is asked of the matmul itself, so that no float32 copy is written and read again. float32 inputs
    ask for full precision: on a GPU the default would be TF32, whose 10-bit mantissa is no oracle.
    """
    rows = math.prod(x.shape[:-1])
    if 0 < rows < LEAST_ROWS and current_device().platform != "cpu":
        padded = jnp.pad(x.reshape(rows, -1), ((0, LEAST_ROWS - rows), (0, 0)))
        return dense_matmul(padded, weight, out_dtype)[:rows].reshape(*x.shape[:-1], -1)
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return lax.dot_general(
        x,
        weight.astype(x.dtype),
        (((x.ndim - 1,), (1,)), ((), ())),
        precision=precision,
        preferred_element_type=out_dtype or x.dtype,
    )
