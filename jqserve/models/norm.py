"""RMS norm with the residual add before it, plain or fused with the quantization of what follows."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jqserve.ops.activations import QuantizedRows, norm_and_quantize, rms_norm
from jqserve.ops.ahead import Ahead
from jqserve.quant import ActivationSpec


class RMSNorm(nnx.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight, over the last axis; float32 inside, x's dtype out.

    weight  [D], the parameter; eps in the units of x squared.
    """

    def __init__(self, weight: jax.Array, eps: float) -> None:
        self.weight = nnx.Param(weight)
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., D] -> [..., D]. Rounded to x's dtype before the weight multiplies it, as Hugging Face does."""
        wide = x.astype(jnp.float32)
        unit = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return unit.astype(x.dtype) * self.weight.get_value().astype(x.dtype)

    def add(
        self,
        x: jax.Array,
        residual: jax.Array | None,
        scheme: ActivationSpec | None = None,
        *,
        fuse: bool = False,
        ahead: Ahead | None = None,
    ) -> tuple[jax.Array | QuantizedRows, jax.Array]:
        """(norm of x + residual, x + residual). With a `scheme` (x [T, D] then) the norm comes out quantized by it.

        `fuse`: one kernel where there is one (x [T, D]; no gradient), which may read `ahead`.
        """
        if scheme is not None:
            return norm_and_quantize(x, self.weight.get_value(), residual, eps=self.eps, scheme=scheme, ahead=ahead)
        if fuse:
            return rms_norm(x, self.weight.get_value(), residual, eps=self.eps, ahead=ahead)
        total = x if residual is None else x + residual
        return self(total), total
