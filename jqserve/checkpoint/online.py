"""Quantization while loading: `--quantization fp8` on an unquantized checkpoint, one module at a time."""

from __future__ import annotations

import dataclasses
from typing import Any

import ml_dtypes
import numpy as np

from jqserve.checkpoint.loaded import Activations
from jqserve.checkpoint.scheme import FP8_TOKEN, namespace
from jqserve.errors import UnsupportedError
from jqserve.quant import ActivationSpec, QuantizedTensor, QuantSpec

FP8_MAX = 448.0
#: XLA turns a division by a constant into this product; numpy has to do the same for equal bits.
_PER_MAX = np.float32(1 / FP8_MAX)
#: Values that the host quantizes at a time: bounds the float32 temporaries, and keeps them in the cache.
_VALUES = 1 << 16
REFUSED = {
    "awq": "it needs calibration data: load a checkpoint that AutoAWQ or llm-compressor quantized",
    "gptq": "it needs calibration data: load a checkpoint that gptqmodel or llm-compressor quantized",
    "compressed-tensors": "it is a checkpoint format: load a checkpoint that has it, no flag is needed",
    "int8": "weights would be quantized without looking at activations: load a W8A8 checkpoint of llm-compressor",
}


@dataclasses.dataclass(frozen=True)
class OnlineFp8:
    """Weights float8_e4m3fn with a float32 scale a channel, absmax / 448; activations per token, at run time."""

    activation: ActivationSpec = FP8_TOKEN

    def spec(self, n: int, k: int) -> QuantSpec:
        return QuantSpec("float8_e4m3fn", (n, k), (1, k), "none", self.activation)

    def quantize(self, weight: Any) -> QuantizedTensor:
        """[N, K] of any float dtype -> canonical QuantizedTensor. A row of zeros gets scale 1."""
        n, k = weight.shape
        if namespace(weight) is np:
            qvalue: Any = np.empty((n, k), ml_dtypes.float8_e4m3fn)
            scale: Any = np.empty((n, 1), np.float32)
            rows = max(1, _VALUES // k)
            for i in range(0, n, rows):
                qvalue[i : i + rows], scale[i : i + rows] = _quantize_rows(weight[i : i + rows])
        else:
            qvalue, scale = _quantize_rows(weight)
        return QuantizedTensor(qvalue, scale, None, None, None, self.spec(n, k))


def _quantize_rows(weight: Any) -> tuple[Any, Any]:
    xp = namespace(weight)
    value = weight.astype(xp.float32)
    absmax = xp.abs(value).max(axis=1, keepdims=True)
    scale = xp.where(absmax > 0, absmax * _PER_MAX, xp.float32(1))
    # float8_e4m3fn has no infinity: what rounds past 448 would become NaN.
    return xp.clip(value / scale, -FP8_MAX, FP8_MAX).astype(ml_dtypes.float8_e4m3fn), scale


def online_scheme(name: str | None, method: str, activations: Activations) -> OnlineFp8 | None:
    """The scheme behind `--quantization NAME` for a checkpoint of quantization `method` ("none": unquantized).

    Raises UnsupportedError for a name that does not exist (yet), and on a checkpoint that is quantized already.
    """
    if name is None or name == "none":
        return None
    if name != "fp8":
        reason = f": {REFUSED[name]}" if name in REFUSED else ""
        raise UnsupportedError(
            f"--quantization {name!r} is not supported{reason}; supported: fp8, on unquantized weights"
        )
    if method != "none":
        raise UnsupportedError(
            f"--quantization {name}: the checkpoint is quantized already ({method}); leave the flag out, the method is "
            "read from config.json"
        )
    return OnlineFp8() if activations == "config" else OnlineFp8(ActivationSpec())
