"""GPTQ as gptqmodel and AutoGPTQ store it (FORMATS.md section 2): 4 or 8 bit, packed along K, zeros along N."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from jqserve.checkpoint.fields import Fields
from jqserve.checkpoint.readers.columns import permute_columns
from jqserve.checkpoint.readers.dense import DENSE
from jqserve.checkpoint.readers.marlin import Marlin
from jqserve.checkpoint.readers.patterns import regex_matches
from jqserve.checkpoint.scheme import (
    Arrays,
    Need,
    Prepared,
    Scheme,
    act_order,
    finite,
    group_count,
    namespace,
    transposed,
)
from jqserve.errors import CheckpointError
from jqserve.quant import QuantSpec

#: What v1 subtracted from each word, by bits: one from every field, with borrows between them.
V1_ONES = {4: 0x11111111, 8: 0x01010101}
FORMATS = ("gptq", "gptq_v2", "marlin")


@dataclasses.dataclass(frozen=True)
class Gptq(Scheme):
    """W[n, k] = (q - z) * s of the group g_idx[k]; q and z unsigned; `group_size` -1 is one group over K."""

    bits: int
    group_size: int
    desc_act: bool
    sym: bool
    v2: bool

    @property
    def method(self) -> str:
        return "gptq"

    def _group(self, k: int) -> int:
        return k if self.group_size == -1 else self.group_size

    def spec(self, n: int, k: int) -> QuantSpec:
        return QuantSpec(
            "uint4" if self.bits == 4 else "uint8", (n, k), (1, self._group(k)), "none" if self.sym else "int"
        )

    def check(self, where: str, n: int, k: int) -> None:
        per_word = 32 // self.bits
        if n % per_word or k % per_word:
            raise CheckpointError(f"{where}: {self.bits}-bit GPTQ packs {per_word} values a word, found [{n}, {k}]")

    def needs(self, n: int, k: int) -> dict[str, Need]:
        groups, bits = group_count(k, self._group(k)), self.bits
        return {
            "qweight": Need(("I32",), ((k * bits // 32, n),)),
            "qzeros": Need(("I32",), ((groups, n * bits // 32),)),
            "scales": Need(("F16", "BF16", "F32"), ((groups, n),)),
            "g_idx": Need(("I32",), ((k,),), required=self.desc_act and self.group_size != -1),
        }

    def prepare(self, where: str, raw: Mapping[str, np.ndarray], n: int, k: int) -> Prepared:
        finite(where, "scales", raw["scales"])
        zeros = raw["qzeros"].view(np.uint32)
        if not self.v2:  # word-wise, as it was subtracted: a zero of 0 had borrowed from its neighbour
            zeros = zeros + np.uint32(V1_ONES[self.bits])
        arrays: Arrays = {"qweight": raw["qweight"], "scales": raw["scales"]}
        if self.sym:
            middle = np.uint32(V1_ONES[self.bits] << (self.bits - 1))
            wrong = zeros[zeros != middle]
            if wrong.size:
                found, expected = f"0x{int(wrong[0]):08x}", f"0x{int(middle):08x}"
                raise CheckpointError(
                    f"{where}.qzeros: the config says sym, so every zero point is {1 << (self.bits - 1)} (words "
                    f"{expected}), but read as {'gptq_v2' if self.v2 else 'gptq (v1)'} a word is {found}; is "
                    f"checkpoint_format (gptq | gptq_v2) or sym wrong?"
                )
        else:
            arrays["zeros"] = zeros
        perm = act_order(where, "g_idx", raw["g_idx"], k, self._group(k)) if "g_idx" in raw else None
        return Prepared(arrays, perm)

    def decode(self, arrays: Arrays, n: int, k: int) -> tuple[Any, Any, Any]:
        words = arrays["qweight"]
        xp = namespace(words)
        # Little-endian bytes of a word hold consecutive k, low nibble first: the transpose is the canonical form.
        qvalue = transposed(words).view(np.uint8)
        if "perm" in arrays:
            qvalue = permute_columns(qvalue, arrays["perm"], self.bits, k)
        zero = None
        if "zeros" in arrays:
            per_word, mask = 32 // self.bits, np.uint32((1 << self.bits) - 1)
            fields = [(arrays["zeros"] >> np.uint32(self.bits * i)) & mask for i in range(per_word)]
            zero = xp.stack([f.astype(xp.uint8).T for f in fields], axis=1).reshape(n, -1)
        return qvalue, transposed(arrays["scales"]), zero


class GptqPlan:
    """Which Linears are quantized, and how: `dynamic` (gptqmodel's rule: the first match in order), lm_head,
    and modules_in_block_to_quantize (transformers)."""

    method = "gptq"

    def __init__(self, config: Fields) -> None:
        formats = [config.one_of(key, FORMATS, None) for key in ("checkpoint_format", "format")]
        marlin = config.flag("is_marlin_format") or "marlin" in formats
        if None not in formats and formats[0] != formats[1]:
            raise config.error("checkpoint_format", f"the same as format {formats[1]!r}")
        if config.text("method", "gptq").lower() != "gptq":
            raise config.unsupported("method", "'gptq'")
        if config.text("pack_dtype", "int32") != "int32":
            raise config.unsupported("pack_dtype", "'int32'")
        base = Gptq(4, 128, False, True, v2="gptq_v2" in formats)
        self._base: Scheme = _override(config, base)
        if marlin:
            self._base = _marlin(config)
        self._lm_head = config.flag("lm_head")
        self._dynamic: list[tuple[bool, str, Scheme]] = []
        dynamic = config.child("dynamic")
        for pattern in dynamic.data if dynamic else ():
            assert dynamic is not None
            if pattern.startswith("-:"):
                self._dynamic.append((False, pattern[2:], DENSE))
            else:
                overrides = dynamic.child(pattern) or Fields({}, dynamic.where)
                if not isinstance(self._base, Gptq):
                    raise config.unsupported("dynamic", "only exclusions (-:) in Marlin's layout")
                self._dynamic.append((True, pattern.removeprefix("+:"), _override(overrides, self._base)))
        self._where = f"{config.where}, dynamic"
        self._inside = _block_modules(config)

    def scheme(self, module: str) -> Scheme:
        return self._decide(module)[0]

    def why_dense(self, module: str) -> str:
        return self._decide(module)[1]

    def _decide(self, module: str) -> tuple[Scheme, str]:
        """(scheme, why it is dense or "")."""
        for takes, pattern, scheme in self._dynamic:
            if regex_matches(pattern, module, self._where):
                return scheme, "" if takes else f"dynamic has '-:{pattern}'"
        if module == "lm_head":
            return (self._base, "") if self._lm_head else (DENSE, "lm_head is false: the head is left as it is")
        if self._inside is not None and not any(module.endswith("." + name) for name in self._inside):
            return DENSE, "modules_in_block_to_quantize does not have it"
        return self._base, ""


def _marlin(config: Fields) -> Marlin:
    config.one_of("bits", (4,), 4)
    if not config.flag("sym", True) or config.flag("desc_act"):
        raise config.unsupported("sym", "true, without desc_act, in Marlin's layout")
    return Marlin(config.integer("group_size", 128, minimum=-1) or -1)


def _override(config: Fields, base: Gptq) -> Gptq:
    group = config.integer("group_size", base.group_size, minimum=-1)
    if group == 0:
        raise config.error("group_size", "-1 or a positive group size")
    return dataclasses.replace(
        base,
        bits=config.one_of("bits", (4, 8), base.bits),
        group_size=group,
        desc_act=config.flag("desc_act", base.desc_act),
        sym=config.flag("sym", base.sym),
    )


def _block_modules(config: Fields) -> tuple[str, ...] | None:
    value = config.data.get("modules_in_block_to_quantize")
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(inner, list) for inner in value):
        raise config.error("modules_in_block_to_quantize", "a list of lists of names")
    return tuple(str(name) for inner in value for name in inner)
