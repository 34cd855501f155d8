"""What a quantized tensor is: its specification, its arrays, and how values are packed.

The tensor is imported on first use: a specification needs no jax.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jqserve.quant.spec import NO_ACTIVATION, ActivationSpec, QuantSpec

if TYPE_CHECKING:
    from jqserve.quant.tensor import QuantizedTensor, dequantize

__all__ = ["NO_ACTIVATION", "ActivationSpec", "QuantSpec", "QuantizedTensor", "dequantize"]


def __getattr__(name: str) -> Any:
    if name not in ("QuantizedTensor", "dequantize"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from jqserve.quant import tensor

    value = getattr(tensor, name)
    globals()[name] = value
    return value
