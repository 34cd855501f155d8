"""Matmuls with a `QuantizedTensor`: the kernel by scheme, a gradient in x, and batching by flattening into rows."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from jqserve.ops.activations import QuantizedRows, quantize_input
from jqserve.ops.device import current_device
from jqserve.ops.generic import generic_matmul
from jqserve.ops.layouts import needs_generic
from jqserve.ops.relayout import grid_per_row, to_canonical
from jqserve.quant import QuantizedTensor, dequantize
from pallas_kernels.scaled_matmul.api import scaled_matmul
from pallas_kernels.w4a16.api import w4a16_matmul
from pallas_kernels.w8a16.api import w8a16_matmul


def quantized_matmul(x: jax.Array, weight: QuantizedTensor, bias: jax.Array | None) -> jax.Array:
    """x [M, K] float -> x @ W.T + bias [M, N] in x's dtype. Differentiable in x and bias; maps under vmap."""
    return _matmul(x, weight, bias)


def quantized_rows_matmul(x: QuantizedRows, weight: QuantizedTensor, bias: jax.Array | None) -> jax.Array:
    """The same for rows quantized already, in the stored order of the columns: [M, K] -> [M, N] in x.dtype."""
    return scaled_matmul(
        x.values,
        weight.qvalue,
        x.scale,
        weight.scale.astype(jnp.float32),
        None if bias is None else bias,
        out_dtype=x.dtype,
    )


def _run_kernel(x: jax.Array, weight: QuantizedTensor, bias: jax.Array | None) -> jax.Array:
    spec = weight.spec
    if spec.activation.kind != "none":
        if weight.perm is not None:
            x = jnp.take(x, weight.perm, axis=1, unique_indices=True, mode="clip")
        return quantized_rows_matmul(quantize_input(x, weight), weight, bias)
    if spec.layout == "canonical" and needs_generic(spec, current_device()):
        y = generic_matmul(x, weight)
        return y if bias is None else y + bias.astype(y.dtype)
    scale, zero = weight.scale, weight.zero_point
    if spec.layout == "canonical":
        scale, zero = grid_per_row(scale, spec), None if zero is None else grid_per_row(zero, spec)
    kwargs: dict[str, Any] = {"perm": weight.perm, "group_size": spec.group_size, "layout": spec.layout}
    if spec.qtype == "uint4":
        integer, offset = (zero, None) if spec.zero == "int" else (None, zero)
        y = w4a16_matmul(x, weight.qvalue, scale, integer, offset=offset, **kwargs)
    else:
        y = w8a16_matmul(x, weight.qvalue, scale, zero, **kwargs)
    return y if bias is None else y + bias.astype(y.dtype)


@custom_vmap
def _batchable(x: jax.Array, weight: QuantizedTensor, bias: jax.Array | None) -> jax.Array:
    return _run_kernel(x, weight, bias)


@_batchable.def_vmap
def _fold_batch_into_rows(
    size: int, batched: Any, x: jax.Array, weight: QuantizedTensor, bias: jax.Array | None
) -> tuple[jax.Array, bool]:
    """Kernels know rows, not batch axes: a mapped x becomes more rows of one call; mapped weights run one by one."""
    x_batched, *others = batched
    if not any(jax.tree.leaves(others)):
        flat = _batchable(x.reshape(-1, x.shape[-1]), weight, bias)
        return flat.reshape(*x.shape[:-1], flat.shape[-1]), True
    args = jax.tree.map(
        lambda a, mapped: a if mapped else jnp.broadcast_to(a, (size, *a.shape)),
        (x, weight, bias),
        (x_batched, *others),
    )
    return jax.lax.map(lambda one: _run_kernel(*one), args), True


@jax.custom_vjp
def _matmul(x: jax.Array, weight: QuantizedTensor, bias: jax.Array | None) -> jax.Array:
    return _batchable(x, weight, bias)


def _forward(x: jax.Array, weight: QuantizedTensor, bias: jax.Array | None) -> tuple[jax.Array, Any]:
    return _batchable(x, weight, bias), (weight, bias)


def _backward(saved: Any, dy: jax.Array) -> tuple[jax.Array, None, jax.Array | None]:
    """dx = dy @ W (the straight-through gradient where x was quantized); packed integers have no gradient."""
    weight, bias = saved
    dense = dequantize(to_canonical(weight), dy.dtype)
    precision = jax.lax.Precision.HIGHEST if dy.dtype == jnp.float32 else None
    dx = jnp.matmul(dy, dense, precision=precision)
    return dx, None, None if bias is None else dy.sum(axis=0).astype(bias.dtype)


_matmul.defvjp(_forward, _backward)
