"""Quantization while loading: `--quantization NAME` (or `--torchao-config NAME`) on unquantized weights.

An online scheme is a `Scheme` like those of the formats: it needs a dense `weight`, and decoding it quantizes. So a
module is read, quantized where it is decoded (on the device, in one jitted program), placed and forgotten before the
next one but one arrives: at no time is there more of the unquantized model than two modules.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from jqserve.checkpoint import rounding
from jqserve.checkpoint.readers.dense import DENSE
from jqserve.checkpoint.rounding import Quantized
from jqserve.checkpoint.scheme import (
    FP8_BLOCK,
    FP8_TOKEN,
    INT8_TOKEN,
    INT8_TOKEN_127,
    Arrays,
    Need,
    Prepared,
    Scheme,
    namespace,
    uneven,
    ungrouped,
)
from jqserve.quant import NO_ACTIVATION, ActivationSpec, QuantSpec
from jqserve.quant.spec import QType

GROUPS = (32, 64, 128, 256)


@dataclasses.dataclass(frozen=True)
class Online(Scheme):
    """name  as the user wrote it; "torchao:int4wo-128" for a --torchao-config
    rule   which arithmetic of `rounding`
    group  values of K that share a scale, where the rule has groups
    """

    name: str
    rule: str
    group: int = -1
    activation: ActivationSpec = NO_ACTIVATION

    @property
    def method(self) -> str:
        return "online"

    def misfit(self, n: int, k: int) -> str:
        """torchao leaves a Linear as it is when its group does not divide K, or 16 not both sides of one for fp8 x fp8
        (its `_fp8_mm_compat`, which fp8wo does not ask)."""
        if self.rule in ("int4 tinygemm", "nf4", "fp4") and k % self.group:
            return ungrouped(k, self.group)
        return uneven(n, k) if self.name.startswith("torchao:fp8dq") else ""

    def spec(self, n: int, k: int) -> QuantSpec | None:
        if self.misfit(n, k):
            return None
        fp8: QType = "float8_e4m3fn"
        shape = (n, k)
        match self.rule:
            case "fp8 channel" | "fp8 row":
                return QuantSpec(fp8, shape, (1, k), "none", self.activation)
            case "fp8 tensor":
                return QuantSpec(fp8, shape, (n, k), "none", self.activation)
            case "fp8 block":
                return QuantSpec(fp8, shape, (128, 128), "none", self.activation)
            case "int8 channel" | "int8 torchao":
                return QuantSpec("int8", shape, (1, k), "none", self.activation)
            case "int4 group":
                return QuantSpec("uint4", shape, (1, min(self.group, k)))
            case "int4 tinygemm":
                return QuantSpec("uint4", shape, (1, self.group), "offset")
            case "nf4":
                return QuantSpec("nf4", shape, (1, self.group))
            case "fp4":
                return QuantSpec("fp4", shape, (1, self.group))
        raise AssertionError(self.rule)

    def needs(self, n: int, k: int) -> dict[str, Need]:
        return DENSE.needs(n, k)

    def prepare(self, where: str, raw: Mapping[str, np.ndarray], n: int, k: int) -> Prepared:
        return DENSE.prepare(where, raw, n, k)

    def decode(self, arrays: Arrays, n: int, k: int) -> Quantized:
        weight = arrays["weight"]
        if self.misfit(n, k):
            return weight, None, None
        match self.rule:
            case "fp8 channel":
                return rounding.fp8_channel(weight)
            case "fp8 row":
                return rounding.fp8_row(weight)
            case "fp8 tensor":
                return rounding.fp8_tensor(weight)
            case "fp8 block":
                return rounding.fp8_block(weight)
            case "int8 channel":
                return rounding.int8_channel(weight)
            case "int8 torchao":
                return rounding.int8_torchao(weight)
            case "int4 group":
                return rounding.int4_group(weight, min(self.group, k))
            case "int4 tinygemm":
                return rounding.int4_tinygemm(weight, self.group)
            case "nf4" | "fp4":
                return rounding.codebook(weight, self.rule, self.group)
        raise AssertionError(self.rule)

    def scale_dtype(self, stored: Mapping[str, str]) -> str:
        own = {"BF16": "bfloat16", "F16": "float16"}.get(stored.get("weight", ""), "float32")
        return own if self.rule.startswith("int4") else "float32"

    def quantize(self, weight: Any) -> Any:
        """[N, K] of any float dtype -> canonical QuantizedTensor, or `weight` itself where the scheme does not fit."""
        from jqserve.quant import QuantizedTensor  # which loads jax: a plan has no use for it

        spec = self.spec(*weight.shape)
        if spec is None:
            return weight
        qvalue, scale, zero = self.decode({"weight": weight}, *weight.shape)
        assert namespace(qvalue) is namespace(weight)
        return QuantizedTensor(qvalue, scale, zero, None, None, spec)


def _int4(name: str, group: int) -> Online:
    return Online(name, "int4 group", group)


#: --quantization NAME on an unquantized checkpoint.
ONLINE: dict[str, Online] = {
    "fp8": Online("fp8", "fp8 channel", activation=FP8_TOKEN),
    "w8a8_fp8": Online("w8a8_fp8", "fp8 channel", activation=FP8_TOKEN),
    "fp8_block": Online("fp8_block", "fp8 block", 128, FP8_BLOCK),
    "w8a8_int8": Online("w8a8_int8", "int8 channel", activation=INT8_TOKEN_127),
    "int8": Online("int8", "int8 channel"),
    "int4": _int4("int4", 128),
    **{f"int4-{group}": _int4(f"int4-{group}", group) for group in GROUPS},
    "bitsandbytes": Online("bitsandbytes", "nf4", 64),
}
#: --torchao-config NAME: the names of SGLang, the arithmetic of torchao.
TORCHAO: dict[str, Online] = {
    "int8wo": Online("torchao:int8wo", "int8 torchao"),
    "int8dq": Online("torchao:int8dq", "int8 torchao", activation=INT8_TOKEN),
    "fp8wo": Online("torchao:fp8wo", "fp8 row"),
    # torchao scales the whole input by one number there; see `plan.input_text`, which says so.
    "fp8dq-per_tensor": Online("torchao:fp8dq-per_tensor", "fp8 tensor", activation=FP8_TOKEN),
    "fp8dq-per_row": Online("torchao:fp8dq-per_row", "fp8 row", activation=FP8_TOKEN),
    **{f"int4wo-{group}": Online(f"torchao:int4wo-{group}", "int4 tinygemm", group) for group in GROUPS},
}
