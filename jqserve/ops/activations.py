"""Quantizing the input of a matmul as its weight's `ActivationSpec` asks, alone or fused with what comes before."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jqserve.quant import ActivationSpec, QuantizedTensor
from pallas_kernels.ahead import Ahead
from pallas_kernels.quantize.api import quantize_rows, rms_norm_quantize, silu_mul_quantize
from pallas_kernels.rows.api import rms_norm as rms_norm
from pallas_kernels.rows.api import silu_mul as silu_mul

_DTYPES: dict[str, Any] = {"int8": jnp.int8, "float8_e4m3fn": jnp.float8_e4m3fn}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedRows:
    """The input of a matmul, quantized already: x[m, k] = values[m, k] * scale.

    values   [M, K] int8 | float8_e4m3fn
    scale    float32 [M, 1] | [1, 1] | [M, ceil(K / block)]
    dtype    static: the dtype that the matmul's result should have (that of x before it was quantized)
    """

    values: jax.Array
    scale: jax.Array
    dtype: Any = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape


def fusible_activation(*weights: jax.Array | QuantizedTensor) -> ActivationSpec | None:
    """The activation scheme that one fused norm can produce for all of `weights`, or None when there is no such one.

    A static scale needs no pass over the row and a permutation moves columns first: both are left to the matmul.
    """
    schemes = set()
    for weight in weights:
        if not isinstance(weight, QuantizedTensor) or weight.perm is not None:
            return None
        schemes.add(weight.spec.activation)
    if len(schemes) != 1:
        return None
    (scheme,) = schemes
    return scheme if scheme.kind in ("dynamic_token", "dynamic_block") else None


def quantize_input(x: jax.Array, weight: QuantizedTensor) -> QuantizedRows:
    """x [M, K] float, in the stored order of the columns -> rows quantized by `weight`'s activation scheme."""
    scheme = weight.spec.activation
    assert scheme.qtype is not None
    static = None
    if scheme.kind == "static_tensor":
        assert weight.input_scale is not None
        static = weight.input_scale.astype(jnp.float32).reshape(1, 1)
    values, scale = quantize_rows(
        x,
        _DTYPES[scheme.qtype],
        block=scheme.block if scheme.kind == "dynamic_block" else None,
        divisor=scheme.divisor,
        static_scale=static,
    )
    return QuantizedRows(values, scale, x.dtype)


def norm_and_quantize(
    x: jax.Array,
    weight: jax.Array,
    residual: jax.Array | None,
    *,
    eps: float,
    scheme: ActivationSpec,
    ahead: Ahead | None = None,
) -> tuple[QuantizedRows, jax.Array]:
    """RMS norm of x + residual [M, D], quantized -> (rows, x + residual). `scheme` from `fusible_activation`."""
    assert scheme.qtype is not None
    values, scale, total = rms_norm_quantize(
        x,
        weight,
        residual,
        eps=eps,
        qdtype=_DTYPES[scheme.qtype],
        block=scheme.block,
        divisor=scheme.divisor,
        ahead=ahead,
    )
    return QuantizedRows(values, scale, x.dtype), total


def silu_mul_and_quantize(gate_up: jax.Array, *, scheme: ActivationSpec, ahead: Ahead | None = None) -> QuantizedRows:
    """silu(gate) * up of gate_up [M, 2F] -> rows [M, F], quantized. `scheme` from `fusible_activation`."""
    assert scheme.qtype is not None
    values, scale = silu_mul_quantize(
        gate_up, qdtype=_DTYPES[scheme.qtype], block=scheme.block, divisor=scheme.divisor, ahead=ahead
    )
    return QuantizedRows(values, scale, gate_up.dtype)
