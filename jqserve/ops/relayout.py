"""Canonical weights to the layout that this device's kernels want, and back, one weight at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jqserve.ops.device import Device, current_device
from jqserve.ops.layouts import preferred_layout, rows_as_they_are
from jqserve.quant import QuantizedTensor, QuantSpec
from pallas_kernels.w4a16 import layout as w4a16_layout
from pallas_kernels.w8a16 import layout as w8a16_layout


def place(weight: Any, device: Device | None = None) -> Any:
    """One weight as it came from a checkpoint (numpy or JAX arrays) -> on JAX's default device, in its kernel layout.

    What `checkpoint.convert.load(device_put=...)` wants: weights stream through, so at the peak the device holds the
    model and the canonical form of the weight at hand.
    """
    return relayout_leaf(jax.device_put(weight), device)


def relayout_leaf(weight: Any, device: Device | None = None) -> Any:
    """A canonical QuantizedTensor -> the same values in the layout that `device` (default: this one) prefers;
    anything else unchanged.

    Runs jitted where the arrays are; drop the reference to the canonical weight to free it. Nothing is donated, for
    the packed arrays change shape and XLA could not reuse them. Scales of weights with quantized activations become
    float32 here, once, because `scaled_matmul` wants them so.
    """
    if not isinstance(weight, QuantizedTensor) or weight.spec.layout != "canonical":
        return weight
    layout = preferred_layout(weight.spec, device or current_device())
    wide = weight.spec.activation.kind != "none" and weight.scale.dtype != "float32"
    return _to_layout(weight, layout) if layout != "canonical" or wide else weight


def to_canonical(weight: QuantizedTensor) -> QuantizedTensor:
    """The inverse of `relayout_leaf`: the same packed values, bit for bit (scales may have become float32)."""
    layout = weight.spec.layout
    if layout == "canonical":
        return weight
    back = _apply(weight, w4a16_layout.from_layout, w8a16_layout.from_layout, layout, becomes="canonical")
    rows = back.spec.group_shape[0]
    every = lambda grid: grid if grid is None or len(grid) == 1 else grid[::rows]  # noqa: E731 - undoes grid_per_row
    return back.replace(scale=every(back.scale), zero_point=every(back.zero_point))


def grid_per_row(grid: jax.Array, spec: QuantSpec) -> jax.Array:
    """Weight-only kernels take scales and zeros per output feature ([N, G]) or one for all ([1, 1])."""
    if rows_as_they_are(spec):
        return grid
    return jnp.repeat(grid, spec.group_shape[0], axis=0)[: spec.shape[0]]


@functools.partial(jax.jit, static_argnums=1)
def _to_layout(weight: QuantizedTensor, layout: str) -> QuantizedTensor:
    if weight.spec.activation.kind != "none":
        weight = weight.replace(scale=weight.scale.astype("float32"))
    if layout == "canonical":
        return weight
    weight = weight.replace(
        scale=grid_per_row(weight.scale, weight.spec),
        zero_point=None if weight.zero_point is None else grid_per_row(weight.zero_point, weight.spec),
    )
    return _apply(weight, w4a16_layout.to_layout, w8a16_layout.to_layout, layout, becomes=layout)


def _apply(
    weight: QuantizedTensor, four_bit: Callable[..., Any], eight_bit: Callable[..., Any], layout: str, becomes: str
) -> QuantizedTensor:
    """Calls the layout function of the weight's kernel; the 4-bit one has a slot more, for a float zero (offset)."""
    spec, zero = weight.spec, weight.zero_point
    if spec.qtype == "uint4":
        integer, offset = (zero, None) if spec.zero == "int" else (None, zero)
        qvalue, scale, integer, offset = four_bit(weight.qvalue, weight.scale, integer, offset, layout, spec.group_size)
        zero = integer if spec.zero == "int" else offset
    else:
        qvalue, scale, zero = eight_bit(weight.qvalue, weight.scale, zero, layout, spec.group_size)
    return weight.replace(qvalue=qvalue, scale=scale, zero_point=zero, spec=spec.replace(layout=becomes))
