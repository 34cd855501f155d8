"""Unquantized Linears: `weight` [N, K] in bf16, fp16 or fp32."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from jqserve.checkpoint.scheme import FLOATS, Arrays, Need, Prepared, Scheme


@dataclasses.dataclass(frozen=True)
class Dense(Scheme):
    """The matrix as it is; the cast to the serving dtype is the converter's."""

    @property
    def method(self) -> str:
        return "dense"

    def spec(self, n: int, k: int) -> None:
        return None

    def needs(self, n: int, k: int) -> dict[str, Need]:
        return {"weight": Need(FLOATS, ((n, k),))}

    def prepare(self, where: str, raw: Mapping[str, np.ndarray], n: int, k: int) -> Prepared:
        return Prepared({"weight": raw["weight"]})

    def decode(self, arrays: Arrays, n: int, k: int) -> tuple[Any, Any, Any]:
        return arrays["weight"], None, None


DENSE = Dense()
