"""torchao as transformers saves it to safetensors: each Linear's tensors stand beside each other, `_weight_qdata` and
its scales (FORMATS.md section 6; torchao 0.18, quantize_/workflows)."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from jqserve.checkpoint.fields import Fields
from jqserve.checkpoint.readers.dense import DENSE
from jqserve.checkpoint.readers.patterns import SkipList
from jqserve.checkpoint.scheme import (
    FLOATS,
    FP8_TOKEN,
    INT8_TOKEN,
    Arrays,
    Need,
    Prepared,
    Scheme,
    finite,
    grid_f32,
    transposed,
    uneven,
    ungrouped,
)
from jqserve.errors import CheckpointError
from jqserve.quant import NO_ACTIVATION, ActivationSpec, QuantSpec
from jqserve.quant.spec import QType


@dataclasses.dataclass(frozen=True)
class TorchaoEight(Scheme):
    """Int8Tensor or Float8Tensor: W = qdata * scale, scale a row or one (`tensor`); zero points must be 0.

    sixteens  Linears with a side that 16 does not divide were left as they are (fp8 x fp8)
    """

    qtype: QType
    tensor: bool
    activation: ActivationSpec
    sixteens: bool = False

    @property
    def method(self) -> str:
        return "torchao"

    def misfit(self, n: int, k: int) -> str:
        return uneven(n, k) if self.sixteens else ""

    def spec(self, n: int, k: int) -> QuantSpec | None:
        if self.misfit(n, k):
            return None
        return QuantSpec(self.qtype, (n, k), (n if self.tensor else 1, k), "none", self.activation)

    def needs(self, n: int, k: int) -> dict[str, Need]:
        if self.misfit(n, k):
            return DENSE.needs(n, k)
        shapes: tuple[tuple[int, ...], ...] = ((1, 1), (1,), ()) if self.tensor else ((n, 1), (n,))
        needs = {
            "_weight_qdata": Need(("I8" if self.qtype == "int8" else "F8_E4M3",), ((n, k),)),
            "_weight_scale": Need(FLOATS, shapes),
        }
        if self.qtype == "int8":
            needs["_weight_zero_point"] = Need(("I8", "I32", "I64"), shapes, required=False)
        return needs

    def prepare(self, where: str, raw: Mapping[str, np.ndarray], n: int, k: int) -> Prepared:
        if self.misfit(n, k):
            return DENSE.prepare(where, raw, n, k)
        if "_weight_zero_point" in raw and raw["_weight_zero_point"].any():
            raise CheckpointError(f"{where}._weight_zero_point: is not 0, though the config's mapping is symmetric")
        return Prepared({"weight": raw["_weight_qdata"], "scale": finite(where, "_weight_scale", raw["_weight_scale"])})

    def decode(self, arrays: Arrays, n: int, k: int) -> tuple[Any, Any, Any]:
        spec = self.spec(n, k)
        if spec is None:
            return DENSE.decode(arrays, n, k)
        return arrays["weight"], grid_f32(arrays["scale"], spec), None

    def scale_dtype(self, stored: Mapping[str, str]) -> str:
        return "float32"


@dataclasses.dataclass(frozen=True)
class TorchaoInt4(Scheme):
    """Int4Tensor in the plain packing: signed nibbles, the low one first; W = q * scale + zero_point, both [G, N]."""

    group_size: int

    @property
    def method(self) -> str:
        return "torchao"

    def spec(self, n: int, k: int) -> QuantSpec | None:
        return None if self.misfit(n, k) else QuantSpec("uint4", (n, k), (1, self.group_size), "offset")

    def misfit(self, n: int, k: int) -> str:
        return ungrouped(k, self.group_size) if k % self.group_size else ""

    def needs(self, n: int, k: int) -> dict[str, Need]:
        if k % self.group_size:  # torchao leaves such a Linear as it is
            return DENSE.needs(n, k)
        grid = ((k // self.group_size, n),)
        return {
            "_weight_qdata": Need(("I8", "U8"), ((n, k // 2),)),
            "_weight_scale": Need(FLOATS, grid),
            "_weight_zero_point": Need(FLOATS, grid),
        }

    def prepare(self, where: str, raw: Mapping[str, np.ndarray], n: int, k: int) -> Prepared:
        if k % self.group_size:
            return DENSE.prepare(where, raw, n, k)
        scale, zero = (finite(where, name, raw[name]) for name in ("_weight_scale", "_weight_zero_point"))
        return Prepared({"packed": raw["_weight_qdata"], "scale": scale, "zeros": zero})

    def decode(self, arrays: Arrays, n: int, k: int) -> tuple[Any, Any, Any]:
        if "packed" not in arrays:
            return DENSE.decode(arrays, n, k)
        # Two's complement to unsigned around 8: the top bit of each nibble turns.
        qvalue = arrays["packed"].view(np.uint8) ^ np.uint8(0x88)
        return qvalue, transposed(arrays["scale"]), transposed(arrays["zeros"])


class TorchaoPlan:
    """One config for all Linears but lm_head and modules_to_not_convert."""

    method = "torchao"

    def __init__(self, config: Fields) -> None:
        quant_type = config.child("quant_type")
        if quant_type is None or list(quant_type.data) != ["default"]:
            raise config.unsupported("quant_type", "one config for all modules, {'default': {...}}")
        if config.flag("include_input_output_embeddings"):
            raise config.unsupported("include_input_output_embeddings", "false")
        chosen = quant_type.child("default")
        data = chosen and chosen.child("_data")
        if chosen is None or data is None:
            raise quant_type.error("default", "a config with _type and _data")
        self._scheme = _scheme(chosen, data)
        self._skip = SkipList(config, "modules_to_not_convert")

    def why_dense(self, module: str) -> str:
        return "torchao leaves the head as it is" if module == "lm_head" else self._skip.why(module)

    def scheme(self, module: str) -> Scheme:
        return DENSE if self.why_dense(module) else self._scheme


def _scheme(chosen: Fields, data: Fields) -> Scheme:
    _plain(data)
    match chosen.text("_type"):
        case "Int8WeightOnlyConfig":
            if data.data.get("group_size") is not None:
                raise data.unsupported("group_size", "null (one scale a row)")
            return TorchaoEight("int8", _per_tensor(data), NO_ACTIVATION)
        case "Int8DynamicActivationInt8WeightConfig":
            mapping = data.child("act_mapping_type")
            if mapping is not None and mapping.data.get("_data") != "SYMMETRIC":
                raise data.unsupported("act_mapping_type", "SYMMETRIC")
            if data.flag("weight_only_decode"):
                raise data.unsupported("weight_only_decode", "false")
            return TorchaoEight("int8", _per_tensor(data), INT8_TOKEN)
        case "Float8WeightOnlyConfig":
            return TorchaoEight("float8_e4m3fn", _per_tensor(data), NO_ACTIVATION)
        case "Float8DynamicActivationFloat8WeightConfig":
            return TorchaoEight("float8_e4m3fn", _per_tensor(data), FP8_TOKEN, sixteens=True)
        case "Int4WeightOnlyConfig":
            packing = data.child("int4_packing_format")
            name = packing.data.get("_data") if packing is not None else data.data.get("int4_packing_format", "PLAIN")
            if str(name).upper() != "PLAIN":
                raise data.unsupported("int4_packing_format", "PLAIN (others are layouts of one kernel)")
            return TorchaoInt4(data.one_of("group_size", (32, 64, 128, 256), 128))
    raise chosen.unsupported(
        "_type",
        "Int8WeightOnlyConfig, Int8DynamicActivationInt8WeightConfig, Float8WeightOnlyConfig, "
        "Float8DynamicActivationFloat8WeightConfig, Int4WeightOnlyConfig",
    )


#: Settings under which torchao computes otherwise than the kernels here: key -> what is served, the default first.
PLAIN: dict[str, tuple[Any, ...]] = {
    "reduce_range": (None, False),  # int8 inputs in 7 bits
    "activation_value_lb": (None,),
    "activation_value_ub": (None,),
    "activation_dtype": (None, "float8_e4m3fn"),
    "weight_dtype": (None, "float8_e4m3fn"),
    "packing_format": (None, "PLAIN"),
}


def _plain(data: Fields) -> None:
    """Raises UnsupportedError for a setting that would change the numbers and that nothing here heeds."""
    for key, served in PLAIN.items():
        value = data.data.get(key)
        if isinstance(value, dict):  # an enum or a dtype: {"_type": ..., "_data": its name}
            value = value.get("_data")
        if value not in served:
            raise data.unsupported(key, " or ".join(v if isinstance(v, str) else json.dumps(v) for v in served))


def _per_tensor(data: Fields) -> bool:
    """Of the weight: `granularity` is one, or [activation's, weight's], which must be alike; the default is a row."""
    value = data.data.get("granularity")
    both = value if isinstance(value, list) and value else [value]
    kinds = [one.get("_type") if isinstance(one, dict) else one for one in both]
    if any(kind not in (None, "PerRow", "PerTensor") or kind != kinds[0] for kind in kinds):
        raise data.unsupported("granularity", "PerRow, PerTensor, the same for weights and inputs")
    return kinds[0] == "PerTensor"
