"""The Linear of every block: a dense or quantized weight and perhaps a bias; `jqserve.ops.linear` does the work."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from jqserve.ops.activations import QuantizedRows
from jqserve.ops.linear import Weight, linear


class Linear(nnx.Module):
    """y = x @ W.T + b from one LIN entry of the parameter tree: {"weight": [N, K], "bias": [N] (optional)}."""

    def __init__(self, entry: Mapping[str, Any]) -> None:
        self.weight = nnx.Param(entry["weight"])
        bias = entry.get("bias")
        self.bias = None if bias is None else nnx.Param(bias)

    @property
    def matrix(self) -> Weight:
        return self.weight.get_value()

    def __call__(self, x: jax.Array | QuantizedRows) -> jax.Array:
        """x [..., K] -> [..., N]"""
        return linear(x, self.matrix, None if self.bias is None else self.bias.get_value())
