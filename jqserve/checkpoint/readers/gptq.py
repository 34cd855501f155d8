"""GPTQ as gptqmodel and AutoGPTQ store it (FORMATS.md section 2): 2, 3, 4 or 8 bit, packed along K, zeros along N.

2 and 3 bits have no kernel of their own: their values are held as 4-bit ones, exactly, and run as such.
"""

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
from jqserve.quant.packing import pack_uint4

#: What v1 subtracted from each word, by bits: one from every field, with borrows between them. Of 3 bits, whose fields
#: cross words, each field by itself (gptqmodel 7: `_shift_gptq_qzeros`).
V1_ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}
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
        return "gptq" if self.bits >= 4 else f"gptq of {self.bits} bits, held in 4"

    @property
    def narrow_bits(self) -> int | None:
        return self.bits if self.bits < 4 else None

    def _group(self, k: int) -> int:
        return k if self.group_size == -1 else self.group_size

    def spec(self, n: int, k: int) -> QuantSpec:
        return QuantSpec(
            "uint8" if self.bits == 8 else "uint4", (n, k), (1, self._group(k)), "none" if self.sym else "int"
        )

    def check(self, where: str, n: int, k: int) -> None:
        count, words = (32, "three words") if self.bits == 3 else (32 // self.bits, "a word")
        if n % count or k % count:
            raise CheckpointError(f"{where}: {self.bits}-bit GPTQ packs {count} values {words}, found [{n}, {k}]")

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
        words = raw["qzeros"].view(np.uint32)
        if not self.v2 and self.bits in V1_ONES:  # word-wise: a zero of 0 had borrowed from its neighbour
            words = words + np.uint32(V1_ONES[self.bits])
        zeros = _fields(words, self.bits)
        if not self.v2 and self.bits == 3:
            zeros = (zeros + 1) & 7
        arrays: Arrays = {"qweight": raw["qweight"], "scales": raw["scales"]}
        if self.sym:
            middle = 1 << (self.bits - 1)
            wrong = zeros[zeros != middle]
            if wrong.size:
                raise CheckpointError(
                    f"{where}.qzeros: the config says sym, so every zero point is {middle}, but read as "
                    f"{'gptq_v2' if self.v2 else 'gptq (v1)'} one is {int(wrong[0])}; is checkpoint_format (gptq | "
                    "gptq_v2) or sym wrong?"
                )
        else:
            arrays["zeros"] = zeros
        perm = act_order(where, "g_idx", raw["g_idx"], k, self._group(k)) if "g_idx" in raw else None
        return Prepared(arrays, perm)

    def decode(self, arrays: Arrays, n: int, k: int) -> tuple[Any, Any, Any]:
        words = arrays["qweight"]
        xp = namespace(words)
        if self.bits >= 4:
            # Little-endian bytes of a word hold consecutive k, low nibble first: the transpose is the canonical form.
            qvalue = transposed(words).view(np.uint8)
        else:
            values = _fields(transposed(words).view(np.uint32), self.bits)
            # Without zero points a uint4 means q - 8, and these mean q - 2 or q - 4.
            qvalue = pack_uint4(values + xp.uint8(8 - (1 << (self.bits - 1)) if self.sym else 0))
        if "perm" in arrays:
            qvalue = permute_columns(qvalue, arrays["perm"], max(self.bits, 4), k)
        zero = transposed(arrays["zeros"]) if "zeros" in arrays else None
        return qvalue, transposed(arrays["scales"]), zero


def _fields(words: Any, bits: int) -> Any:
    """uint32 [R, W] -> uint8 [R, W * 32 / bits], the low bits first. 32 fields of 3 bits run through three words."""
    xp = namespace(words)
    if bits == 3:
        low = words.reshape(words.shape[0], -1, 3)
        high = xp.concatenate([low[..., 1:], low[..., :1]], axis=-1)  # after the third word nothing follows
    else:
        low = high = words[..., None]
    found = []
    for start in range(0, 32 * low.shape[-1], bits):
        word, shift = divmod(start, 32)
        field = low[..., word] >> np.uint32(shift)
        if shift + bits > 32:
            field = field | (high[..., word] << np.uint32(32 - shift))
        found.append((field & np.uint32((1 << bits) - 1)).astype(xp.uint8))
    return xp.stack(found, axis=-1).reshape(words.shape[0], -1)


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
        bits=config.one_of("bits", (2, 3, 4, 8), base.bits),
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
