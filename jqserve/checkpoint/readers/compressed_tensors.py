"""compressed-tensors (llm-compressor; FORMATS.md section 1): the tensors of a module, by the format of its group."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from jqserve.checkpoint.readers.columns import permute_columns
from jqserve.checkpoint.scheme import (
    FLOATS,
    Arrays,
    Need,
    Prepared,
    Scheme,
    act_order,
    finite,
    grid_f32,
    group_count,
    namespace,
    static_input_scale,
)
from jqserve.errors import CheckpointError, UnsupportedError
from jqserve.quant import NO_ACTIVATION, ActivationSpec, QuantSpec
from jqserve.quant.spec import QType


@dataclasses.dataclass(frozen=True)
class PackQuantized(Scheme):
    """Integers of 4 or 8 bits packed along K into int32: W = (u - offset - zp) * scale, zp packed along N.

    group_size -1 is one group over K (strategy channel); `act_order`: `weight_g_idx` must be there.
    """

    bits: int
    group_size: int
    symmetric: bool
    act_order: bool

    @property
    def method(self) -> str:
        return "compressed-tensors pack-quantized"

    def _group(self, k: int) -> int:
        return k if self.group_size == -1 else self.group_size

    def spec(self, n: int, k: int) -> QuantSpec:
        qtype: QType = "uint4" if self.bits == 4 else "uint8"
        return QuantSpec(qtype, (n, k), (1, self._group(k)), "none" if self.symmetric else "int")

    def check(self, where: str, n: int, k: int) -> None:
        if k % self._group(k):
            raise CheckpointError(f"{where}: {k} in features are not a multiple of group_size {self.group_size}")

    def needs(self, n: int, k: int) -> dict[str, Need]:
        groups = group_count(k, self._group(k))
        words = -(-k * self.bits // 32)
        needs = {
            "weight_packed": Need(("I32",), ((n, words),)),
            "weight_scale": Need(FLOATS, ((n, groups),)),
            "weight_shape": Need(("I64", "I32"), ((2,),)),
            "weight_g_idx": Need(("I32", "I64"), ((k,),), required=self.act_order),
        }
        if not self.symmetric:
            needs["weight_zero_point"] = Need(("I32",), ((-(-n * self.bits // 32), groups),))
        return needs

    def prepare(self, where: str, raw: Mapping[str, np.ndarray], n: int, k: int) -> Prepared:
        stored = tuple(int(s) for s in raw["weight_shape"])
        if stored != (n, k):
            raise CheckpointError(f"{where}.weight_shape: found {list(stored)}, the model's config makes it [{n}, {k}]")
        arrays = {"packed": raw["weight_packed"], "scale": finite(where, "weight_scale", raw["weight_scale"])}
        if not self.symmetric:
            arrays["zeros"] = raw["weight_zero_point"].view(np.uint32)
        perm = None
        if "weight_g_idx" in raw:
            perm = act_order(where, "weight_g_idx", raw["weight_g_idx"], k, self._group(k))
        return Prepared(arrays, perm)

    def decode(self, arrays: Arrays, n: int, k: int) -> tuple[Any, Any, Any]:
        xp = namespace(arrays["packed"])
        # Little-endian bytes of a word hold consecutive k, low nibble first: that is the canonical form already.
        # u - offset - (zp_u - offset) = u - zp_u: the unsigned zero as stored serves as it is.
        qvalue = arrays["packed"].view(np.uint8)[:, : -(-k * self.bits // 8)]
        if "perm" in arrays:
            qvalue = permute_columns(qvalue, arrays["perm"], self.bits, k)
        zero = None
        if "zeros" in arrays:
            per_word, mask = 32 // self.bits, np.uint32((1 << self.bits) - 1)
            fields = [((arrays["zeros"] >> np.uint32(self.bits * i)) & mask).astype(xp.uint8) for i in range(per_word)]
            zero = xp.stack(fields, axis=1).reshape(-1, fields[0].shape[1])[:n]
        return qvalue, arrays["scale"], zero


@dataclasses.dataclass(frozen=True)
class EightBit(Scheme):
    """One value a byte: float8 (float-quantized) or int8 (int-quantized), W = (weight - zp) * weight_scale.

    group_size 0 is one scale for the tensor, -1 one a channel, else groups along K. `static`: the file stores
    `input_scale` (and `asymmetric_input`: `input_zero_point`), whether or not they are used.
    """

    qtype: QType  # float8_e4m3fn | int8
    group_size: int
    symmetric: bool
    static: bool
    asymmetric_input: bool
    activation: ActivationSpec

    @property
    def method(self) -> str:
        return f"compressed-tensors {'int' if self.qtype == 'int8' else 'float'}-quantized"

    def _group_shape(self, n: int, k: int) -> tuple[int, int]:
        if self.group_size == 0:
            return n, k
        return 1, k if self.group_size == -1 else self.group_size

    def spec(self, n: int, k: int) -> QuantSpec:
        if self.symmetric:
            return QuantSpec(self.qtype, (n, k), self._group_shape(n, k), "none", self.activation)
        return QuantSpec("uint8", (n, k), self._group_shape(n, k), "int", self.activation)

    def check(self, where: str, n: int, k: int) -> None:
        if self.asymmetric_input and self.activation != NO_ACTIVATION:
            raise UnsupportedError(
                f"{where}: its input is quantized with a zero point (asymmetric), which is not supported; supported: "
                "symmetric inputs; `--activations none` (of jqserve-server, too) leaves all inputs in 16 bits instead"
            )
        if self.group_size > 0 and k % self.group_size:
            raise CheckpointError(f"{where}: {k} in features are not a multiple of group_size {self.group_size}")

    def needs(self, n: int, k: int) -> dict[str, Need]:
        grid = self.spec(n, k).grid
        shapes = ((), (1,), (1, 1)) if self.group_size == 0 else (grid,)
        if self.group_size == -1:
            shapes = (*shapes, (n,))
        word = "F8_E4M3" if self.qtype == "float8_e4m3fn" else "I8"
        needs = {"weight": Need((word,), ((n, k),)), "weight_scale": Need(FLOATS, shapes)}
        if not self.symmetric:
            needs["weight_zero_point"] = Need(("I8",), shapes)
        if self.static:
            needs["input_scale"] = Need(FLOATS, ((), (1,), (1, 1)))
        if self.asymmetric_input:
            needs["input_zero_point"] = Need(("I8", "I32", "F8_E4M3", *FLOATS), ((), (1,), (1, 1)))
        return needs

    def prepare(self, where: str, raw: Mapping[str, np.ndarray], n: int, k: int) -> Prepared:
        arrays = {"weight": raw["weight"], "scale": finite(where, "weight_scale", raw["weight_scale"])}
        if not self.symmetric:
            arrays["zeros"] = raw["weight_zero_point"]
        if not self.static:
            return Prepared(arrays)
        scale = static_input_scale(where, "input_scale", raw["input_scale"])
        return Prepared(arrays, input_scale=scale if self.activation.kind == "static_tensor" else None)

    def scale_dtype(self, stored: Mapping[str, str]) -> str:
        return super().scale_dtype(stored) if self.group_size > 0 else "float32"

    def decode(self, arrays: Arrays, n: int, k: int) -> tuple[Any, Any, Any]:
        spec = self.spec(n, k)
        scale = arrays["scale"] if self.group_size > 0 else grid_f32(arrays["scale"], spec)
        if "zeros" not in arrays:
            return arrays["weight"], scale, None
        # Signed to unsigned: (q + 128) - (zp + 128); flipping the top bit of two's complement adds 128.
        flip = np.uint8(128)
        return arrays["weight"].view(np.uint8) ^ flip, scale, (arrays["zeros"].view(np.uint8) ^ flip).reshape(spec.grid)
