"""The plan's row of a matrix that is there: what loading writes and `forecast` foretells."""

from __future__ import annotations

from typing import Any

import numpy as np

from jqserve.checkpoint.plan import PlanRow, input_text, scheme_text
from jqserve.quant import QuantizedTensor


def matrix_row(path: str, source: str, method: str, weight: Any, note: str = "") -> PlanRow:
    """The row of a Linear or of the embedding table: `weight` is an array or a QuantizedTensor, host or device.
    method: of a QuantizedTensor."""
    if not isinstance(weight, QuantizedTensor):
        shape, dtype = (int(weight.shape[0]), int(weight.shape[1])), np.dtype(weight.dtype)
        bits = dtype.itemsize * 8
        return PlanRow(path, source, shape, "dense", bits, None, "none", dtype.name, int(weight.nbytes), note)
    spec = weight.spec
    group = spec.group_size if spec.group_size < spec.shape[1] else None
    text = scheme_text(method, spec, weight.perm is not None)
    scales, activation = np.dtype(weight.scale.dtype).name, input_text(method, spec)
    return PlanRow(path, source, spec.shape, text, spec.bits, group, activation, scales, weight.nbytes, note, spec)
