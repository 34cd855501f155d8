"""The path for weights that no packed kernel takes: they stay packed in memory and are dequantized inside the step.

XLA makes one dense copy of the one weight at hand, in the dtype of x, and frees it after the product; it costs the
bandwidth of a dense matmul and more. Code-book types (nf4, fp4) and 8-bit values with float offsets (GGUF's Q5_1, Q5_K)
come here. The plan calls it "generic".
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from jqserve.quant import QuantizedTensor, QuantSpec, dequantize


def needs_generic(spec: QuantSpec) -> bool:
    """Whether no kernel multiplies by weights of this spec as they are."""
    if spec.activation.kind != "none":
        return False
    return spec.codebook or (spec.bits == 8 and spec.zero == "offset")


def generic_matmul(x: jax.Array, weight: QuantizedTensor) -> jax.Array:
    """x [M, K] float @ W.T -> [M, N] in x's dtype; W is rounded to it once, sums are in float32."""
    dense = dequantize(weight, x.dtype)
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return lax.dot_general(x, dense, (((1,), (1,)), ((), ())), precision=precision, preferred_element_type=x.dtype)
