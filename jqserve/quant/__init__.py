"""What a quantized tensor is: its specification, its arrays, and how values are packed."""

from jqserve.quant.spec import NO_ACTIVATION, ActivationSpec, QuantSpec
from jqserve.quant.tensor import QuantizedTensor, dequantize

__all__ = ["NO_ACTIVATION", "ActivationSpec", "QuantSpec", "QuantizedTensor", "dequantize"]
