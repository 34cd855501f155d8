"""`quant_method: fp8` (FORMATS.md section 4): one scale a tensor (AutoFP8, vLLM) or 128x128 blocks (DeepSeek, Qwen)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from jqserve.checkpoint.fields import Fields
from jqserve.checkpoint.readers.dense import DENSE
from jqserve.checkpoint.readers.patterns import SkipList
from jqserve.checkpoint.scheme import (
    FLOATS,
    FP8_BLOCK,
    FP8_STATIC,
    FP8_TOKEN,
    Arrays,
    Need,
    Prepared,
    Scheme,
    finite,
    grid_f32,
    static_input_scale,
)
from jqserve.errors import CheckpointError
from jqserve.quant import ActivationSpec, QuantSpec

BLOCK = 128
#: Scales multiply, also the one that transformers calls the inverse.
WEIGHT_SCALES = ("weight_scale", "weight_scale_inv")
INPUT_SCALES = ("input_scale", "activation_scale")


@dataclasses.dataclass(frozen=True)
class Fp8PerTensor(Scheme):
    """W = weight * weight_scale. `static`: the file stores an input scale, whether or not it is used."""

    static: bool
    activation: ActivationSpec

    @property
    def method(self) -> str:
        return "fp8"

    def spec(self, n: int, k: int) -> QuantSpec:
        return QuantSpec("float8_e4m3fn", (n, k), (n, k), "none", self.activation)

    def needs(self, n: int, k: int) -> dict[str, Need]:
        scalar = Need(FLOATS, ((), (1,)), required=False)
        found = {"weight": Need(("F8_E4M3",), ((n, k),)), **dict.fromkeys(WEIGHT_SCALES, scalar)}
        return {**found, **dict.fromkeys(INPUT_SCALES, scalar)} if self.static else found

    def prepare(self, where: str, raw: Mapping[str, np.ndarray], n: int, k: int) -> Prepared:
        name = _the_one(where, WEIGHT_SCALES, raw)
        arrays = {"weight": raw["weight"], "scale": finite(where, name, raw[name])}
        if not self.static:
            return Prepared(arrays)
        name = _the_one(where, INPUT_SCALES, raw)
        scale = static_input_scale(where, name, raw[name])
        return Prepared(arrays, input_scale=scale if self.activation.kind == "static_tensor" else None)

    def decode(self, arrays: Arrays, n: int, k: int) -> tuple[Any, Any, Any]:
        return arrays["weight"], grid_f32(arrays["scale"], self.spec(n, k)), None

    def scale_dtype(self, stored: Mapping[str, str]) -> str:
        return "float32"


@dataclasses.dataclass(frozen=True)
class Fp8Block(Scheme):
    """W[n, k] = weight[n, k] * scale[n // 128, k // 128]; the last row and column of blocks may be partial.

    suffix  weight_scale_inv (DeepSeek), weight_scale (compressed-tensors)
    """

    suffix: str
    activation: ActivationSpec
    format: str = "fp8"

    @property
    def method(self) -> str:
        return self.format

    def spec(self, n: int, k: int) -> QuantSpec:
        return QuantSpec("float8_e4m3fn", (n, k), (BLOCK, BLOCK), "none", self.activation)

    def needs(self, n: int, k: int) -> dict[str, Need]:
        grid = self.spec(n, k).grid
        return {"weight": Need(("F8_E4M3",), ((n, k),)), self.suffix: Need((*FLOATS, "F8_E8M0"), (grid,))}

    def prepare(self, where: str, raw: Mapping[str, np.ndarray], n: int, k: int) -> Prepared:
        return Prepared({"weight": raw["weight"], "scale": finite(where, self.suffix, raw[self.suffix])})

    def decode(self, arrays: Arrays, n: int, k: int) -> tuple[Any, Any, Any]:
        return arrays["weight"], grid_f32(arrays["scale"], self.spec(n, k)), None

    def scale_dtype(self, stored: Mapping[str, str]) -> str:
        return "float32"


def block_size(config: Fields, key: str) -> None:
    """Raises UnsupportedError for blocks that scaled_matmul does not take."""
    if config.data.get(key) != [BLOCK, BLOCK]:
        raise config.unsupported(key, f"[{BLOCK}, {BLOCK}]")


def _the_one(where: str, names: tuple[str, ...], raw: Mapping[str, np.ndarray]) -> str:
    found = [name for name in names if name in raw]
    if len(found) != 1:
        raise CheckpointError(f"{where}: exactly one of {' and '.join(names)} is expected, found {found or 'none'}")
    return found[0]


class Fp8Plan:
    """All Linears but lm_head, `modules_to_not_convert` (transformers' prefix or suffix rule) and
    `ignored_layers` (exact names, as vLLM reads them)."""

    method = "fp8"

    def __init__(self, config: Fields) -> None:
        config.one_of("fmt", ("e4m3",), "e4m3")
        config.one_of("scale_fmt", ("float", "ue8m0"), "float")
        self._scheme: Scheme
        if config.data.get("weight_block_size") is not None:
            block_size(config, "weight_block_size")
            config.one_of("activation_scheme", ("dynamic",), "dynamic")
            self._scheme = Fp8Block("weight_scale_inv", FP8_BLOCK)
        else:
            static = config.one_of("activation_scheme", ("dynamic", "static"), "dynamic") == "static"
            self._scheme = Fp8PerTensor(static, FP8_STATIC if static else FP8_TOKEN)
        self._skip = SkipList(config, "modules_to_not_convert")
        self._exact = frozenset(config.texts("ignored_layers"))

    def why_dense(self, module: str) -> str:
        if module == "lm_head":
            return "fp8 checkpoints leave the head as it is"
        return f"ignored_layers has {module!r}" if module in self._exact else self._skip.why(module)

    def scheme(self, module: str) -> Scheme:
        return DENSE if self.why_dense(module) else self._scheme
