"""Which kernel a Linear's matmul takes on a device, for plans: asked of `pallas_kernels.explain`, nothing runs."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jqserve.ops.device import Device
from jqserve.ops.generic import needs_generic
from jqserve.ops.relayout import relayout_leaf
from jqserve.quant import QuantizedTensor, QuantSpec
from pallas_kernels import explain, use_device

GENERIC = "generic (dequantized in the step, block by block)"


@functools.cache
def kernel(spec: QuantSpec | None, rows: int, dtype: str, scale_dtype: str, device: Device) -> str:
    """ "w4a16/mosaic_sm90", "scaled_matmul/xla", "dot_general", "generic (...)".

    spec    canonical; None: a dense weight
    rows    of x: the running requests of a decode step, the tokens of a prefill chunk
    dtype   of x; scale_dtype: of the weight's scales
    """
    if spec is None:
        return "dot_general (XLA)"
    if needs_generic(spec, device):
        return GENERIC
    k = spec.shape[1]
    x = jax.ShapeDtypeStruct((rows, k), dtype)
    with use_device(device):
        weight = jax.eval_shape(functools.partial(relayout_leaf, device=device), _abstract(spec, scale_dtype))
        if spec.activation.kind != "none":
            quantized = jax.ShapeDtypeStruct((rows, k), weight.qvalue.dtype)
            block = spec.activation.kind == "dynamic_block"
            width = -(-k // 128) if block else 1
            scale = jax.ShapeDtypeStruct((1 if spec.activation.kind == "static_tensor" else rows, width), jnp.float32)
            wide = jax.ShapeDtypeStruct(weight.scale.shape, jnp.float32)
            choice = explain(
                "scaled_matmul", quantized, weight.qvalue, scale, wide, None, device=device, out_dtype=dtype
            )
            return _named("scaled_matmul", choice.chosen)
        return _named(*_weight_only(spec, weight, x, device))


def _weight_only(spec: QuantSpec, weight: QuantizedTensor, x: Any, device: Device) -> tuple[str, str | None]:
    kwargs: dict[str, Any] = {"perm": None, "group_size": spec.group_size, "layout": weight.spec.layout}
    scale: Any = weight.scale
    zero = weight.zero_point
    if weight.spec.layout == "canonical" and scale.shape[0] not in (1, spec.shape[0]):
        scale = jax.ShapeDtypeStruct((spec.shape[0], scale.shape[1]), scale.dtype)
    if spec.qtype == "uint4":
        integer, offset = (zero, None) if spec.zero == "int" else (None, zero)
        call = explain("w4a16_matmul", x, weight.qvalue, scale, integer, device=device, offset=offset, **kwargs)
        return "w4a16", call.chosen
    return "w8a16", explain("w8a16_matmul", x, weight.qvalue, scale, zero, device=device, **kwargs).chosen


def _named(op: str, chosen: str | None) -> str:
    return f"{op}/{chosen}" if chosen else f"{op}: no implementation takes it"


def _abstract(spec: QuantSpec, scale_dtype: str) -> QuantizedTensor:
    n, k = spec.shape
    stored = {"uint4": jnp.uint8, "uint8": jnp.uint8, "int8": jnp.int8, "float8_e4m3fn": jnp.float8_e4m3fn}
    qvalue = jax.ShapeDtypeStruct((n, spec.row_bytes if spec.bits == 4 else k), stored[spec.qtype])
    scale: Any = jax.ShapeDtypeStruct(spec.grid, scale_dtype)
    zero: Any = None
    if spec.zero != "none":
        zero = jax.ShapeDtypeStruct(spec.grid, jnp.uint8 if spec.zero == "int" else scale_dtype)
    static: Any = jax.ShapeDtypeStruct((1, 1), jnp.float32) if spec.activation.kind == "static_tensor" else None
    return QuantizedTensor(qvalue, scale, zero, None, static, spec)  # type: ignore[arg-type]
