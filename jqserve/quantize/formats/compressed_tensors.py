"""compressed-tensors: float-quantized, int-quantized and pack-quantized (FORMATS.md section 1)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from jqserve.quantize.formats.format import Facts, Inputs, Tensors, check_blocks
from jqserve.quantize.formats.words import pack_first, pack_last
from jqserve.quantize.grid import Grid

if TYPE_CHECKING:  # codes are made by jax; a configuration alone (`jqserve plan`) needs none
    from jqserve.quantize.codes import Codes

#: The version of compressed-tensors whose files these are, field by field.
VERSION = "0.19.0"


class CompressedTensors:
    """Weights alone in integers are packed into words; weights with quantized inputs are stored a value a byte."""

    name = "compressed-tensors"
    dtype = ""

    def check(self, grid: Grid, where: str, n: int, k: int) -> None:
        if grid.group[0] > 1:
            check_blocks(grid, where, n, k)

    def tensors(self, codes: Codes, inputs: Inputs) -> Tensors:
        grid, (n, k) = codes.grid, codes.shape
        scale = codes.scale.reshape(1) if grid.group == (0, 0) else codes.scale
        assert codes.group_index is None  # Options refuses groups in the order of work
        if _format(grid, inputs.kind) == "pack-quantized":
            found: Tensors = {
                "weight_packed": pack_last(codes.values, grid.bits),
                "weight_scale": scale,
                "weight_shape": np.array([n, k], np.int64),
            }
            if codes.zero is not None:
                found["weight_zero_point"] = pack_first(codes.zero, grid.bits)
            return found
        values = codes.values
        if grid.kind == "int":  # u - 128 as int8: the top bit of two's complement, flipped
            values = (values ^ np.uint8(128)).view(np.int8)
        found = {"weight": values, "weight_scale": scale}
        if inputs.scale is not None:
            found["input_scale"] = inputs.scale.reshape(1)
        return found

    def config(self, facts: Facts) -> dict[str, Any]:
        grid, form = facts.grid, _format(facts.grid, facts.inputs)
        order = ("static" if facts.static_groups else "weight") if facts.act_order else None
        weights = _arguments(grid.bits, grid.kind, **_strategy(grid), symmetric=grid.symmetric, actorder=order)
        group = {
            "targets": ["Linear"],
            "weights": weights,
            "input_activations": _inputs(grid, facts.inputs),
            "output_activations": None,
            "format": form,
        }
        kv = _arguments(8, "float", strategy="tensor", symmetric=True) if facts.kv_cache else None
        return {
            "quant_method": "compressed-tensors",
            "format": form,
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": [*facts.ignored, "lm_head"],
            "kv_cache_scheme": kv,
            "sparsity_config": {},
            "transform_config": {},
            "global_compression_ratio": None,
            "version": VERSION,
        }

    def files(self, facts: Facts) -> dict[str, dict[str, Any]]:
        return {}


def _format(grid: Grid, inputs: str) -> str:
    if grid.kind == "float8":
        return "float-quantized"
    return "pack-quantized" if inputs == "none" else "int-quantized"


def _strategy(grid: Grid) -> dict[str, Any]:
    rows, columns = grid.group
    if grid.group == (0, 0):
        return {"strategy": "tensor"}
    if rows != 1:
        return {"strategy": "block", "block_structure": [rows, columns]}
    return {"strategy": "group", "group_size": columns} if columns else {"strategy": "channel"}


def _inputs(grid: Grid, kind: str) -> dict[str, Any] | None:
    word = "float" if grid.kind == "float8" else "int"
    if kind == "none":
        return None
    if kind == "static":
        return _arguments(8, word, strategy="tensor", symmetric=True)
    if kind == "block":
        return _arguments(8, word, strategy="group", group_size=128, symmetric=True, dynamic=True)
    return _arguments(8, word, strategy="token", symmetric=True, dynamic=True)


def _arguments(bits: int, kind: str, **given: Any) -> dict[str, Any]:
    """A `QuantizationArgs` with every field of the version named."""
    fields: dict[str, Any] = {
        "num_bits": bits,
        "type": "float" if kind in ("float8", "float") else "int",
        "symmetric": True,
        "group_size": None,
        "strategy": None,
        "block_structure": None,
        "dynamic": False,
        "actorder": None,
        "scale_dtype": None,
        "zp_dtype": None,
        "observer": None,
        "observer_kwargs": {},
    }
    return {**fields, **given}
