"""bitsandbytes as transformers saves it (FORMATS.md section 5): nf4, fp4, with or without double quantization; int8."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from jqserve.checkpoint.fields import Fields
from jqserve.checkpoint.readers.dense import DENSE
from jqserve.checkpoint.readers.patterns import SkipList
from jqserve.checkpoint.scheme import Arrays, Need, Prepared, Scheme, finite
from jqserve.errors import CheckpointError
from jqserve.quant import QuantSpec
from jqserve.quant.codebook import CODEBOOKS

BLOCK, NESTED = 64, 256


@dataclasses.dataclass(frozen=True)
class Bnb4(Scheme):
    """W[i] = quant_map[code[i]] * absmax[i // 64] over the flat matrix; two codes a byte, the first in the high nibble.

    double: absmax is stored in 8 bits, nested_quant_map[u8] * nested_absmax[i // 256] + nested_offset.
    """

    kind: Literal["nf4", "fp4"]
    double: bool

    @property
    def method(self) -> str:
        return "bitsandbytes"

    def spec(self, n: int, k: int) -> QuantSpec:
        return QuantSpec(self.kind, (n, k), (1, BLOCK))

    def check(self, where: str, n: int, k: int) -> None:
        if k % BLOCK:
            raise CheckpointError(
                f"{where}: {k} in features are not a multiple of {BLOCK}: blocks that run over the end of a row are "
                "not supported"
            )

    @property
    def _state(self) -> str:
        return f"weight.quant_state.bitsandbytes__{self.kind}"

    def needs(self, n: int, k: int) -> dict[str, Need]:
        blocks = n * k // BLOCK
        needs = {
            "weight": Need(("U8",), ((n * k // 2, 1),)),
            "weight.absmax": Need(("U8" if self.double else "F32",), ((blocks,),)),
            "weight.quant_map": Need(("F32",), ((16,),)),
            self._state: Need(("U8",), tuple((size,) for size in range(2, 1025))),
        }
        if self.double:
            needs["weight.nested_absmax"] = Need(("F32",), ((-(-blocks // NESTED),),))
            needs["weight.nested_quant_map"] = Need(("F32",), ((256,),))
        return needs

    def prepare(self, where: str, raw: Mapping[str, np.ndarray], n: int, k: int) -> Prepared:
        try:
            state = Fields(json.loads(raw[self._state].tobytes().decode("utf-8")), f"{where}.{self._state}")
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{where}.{self._state}: not valid JSON: {error}") from error
        state.one_of("quant_type", (self.kind,))
        state.one_of("blocksize", (BLOCK,))
        if state.data.get("shape") != [n, k]:
            raise state.error("shape", f"[{n}, {k}], as the model's config makes it")
        if not np.allclose(raw["weight.quant_map"], CODEBOOKS[self.kind], rtol=0, atol=1e-6):
            raise CheckpointError(f"{where}.weight.quant_map: is not the table of {self.kind}; found another code book")
        absmax = raw["weight.absmax"]
        if self.double:
            state.one_of("nested_blocksize", (NESTED,), NESTED)
            scales = finite(where, "weight.nested_absmax", raw["weight.nested_absmax"])
            table = finite(where, "weight.nested_quant_map", raw["weight.nested_quant_map"])
            absmax = table[absmax] * scales.repeat(NESTED)[: absmax.size] + np.float32(state.number("nested_offset"))
        scale = finite(where, "weight.absmax", absmax.astype(np.float32)).reshape(n, k // BLOCK)
        return Prepared({"codes": raw["weight"], "scale": scale})

    def decode(self, arrays: Arrays, n: int, k: int) -> tuple[Any, Any, Any]:
        codes = arrays["codes"].reshape(n, k // 2)
        return (codes >> np.uint8(4)) | (codes << np.uint8(4)), arrays["scale"], None


@dataclasses.dataclass(frozen=True)
class Bnb8(Scheme):
    """W = weight * SCB / 127 by rows. Inputs stay in 16 bits: what bitsandbytes does to outliers only, for all."""

    @property
    def method(self) -> str:
        return "bitsandbytes int8"

    def spec(self, n: int, k: int) -> QuantSpec:
        return QuantSpec("int8", (n, k), (1, k))

    def needs(self, n: int, k: int) -> dict[str, Need]:
        return {
            "weight": Need(("I8",), ((n, k),)),
            "SCB": Need(("F32",), ((n,),)),
            "weight_format": Need(("U8",), ((), (1,)), required=False),
        }

    def prepare(self, where: str, raw: Mapping[str, np.ndarray], n: int, k: int) -> Prepared:
        if "weight_format" in raw and raw["weight_format"].any():
            raise CheckpointError(f"{where}.weight_format: found {raw['weight_format']}, expected 0 (rows)")
        scale = finite(where, "SCB", raw["SCB"]).reshape(n, 1) * np.float32(1 / 127)
        return Prepared({"weight": raw["weight"], "scale": scale})

    def decode(self, arrays: Arrays, n: int, k: int) -> tuple[Any, Any, Any]:
        return arrays["weight"], arrays["scale"], None


class BitsAndBytesPlan:
    """All Linears but lm_head and llm_int8_skip_modules."""

    method = "bitsandbytes"

    def __init__(self, config: Fields) -> None:
        four = config.flag("load_in_4bit") or config.flag("_load_in_4bit")
        eight = config.flag("load_in_8bit") or config.flag("_load_in_8bit")
        if four == eight:
            raise config.error("load_in_4bit", "one of load_in_4bit and load_in_8bit to be true")
        self._scheme: Scheme = Bnb8()
        if four:
            config.one_of("bnb_4bit_quant_storage", ("uint8",), "uint8")
            kind = config.one_of("bnb_4bit_quant_type", ("nf4", "fp4"), "fp4")
            self._scheme = Bnb4(kind, config.flag("bnb_4bit_use_double_quant"))
        self._skip = SkipList(config, "llm_int8_skip_modules")

    def why_dense(self, module: str) -> str:
        return "bitsandbytes leaves the head as it is" if module == "lm_head" else self._skip.why(module)

    def scheme(self, module: str) -> Scheme:
        return DENSE if self.why_dense(module) else self._scheme
