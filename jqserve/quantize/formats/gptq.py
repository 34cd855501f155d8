"""GPTQ, versions 1 and 2 (FORMATS.md section 2)."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np

from jqserve.errors import UnsupportedError
from jqserve.quantize.formats.format import Facts, Inputs, Tensors
from jqserve.quantize.formats.words import pack_first, pack_last
from jqserve.quantize.grid import Grid

if TYPE_CHECKING:  # codes are made by jax; a configuration alone (`jqserve plan`) needs none
    from jqserve.quantize.codes import Codes


class Gptq:
    """`qweight` packed along K, `qzeros` along N, `scales` F16, `g_idx` always there."""

    dtype = ""

    def __init__(self, version: int) -> None:
        self.version = version
        self.name = "gptq" if version == 1 else "gptq_v2"

    def check(self, grid: Grid, where: str, n: int, k: int) -> None:
        per_word = 32 // grid.bits
        if n % per_word or k % per_word:
            raise UnsupportedError(
                f"{where}: [{n}, {k}] are not multiples of {per_word}, the values of a word in GPTQ's format; use "
                f"--format compressed-tensors, or --ignore {where}"
            )

    def tensors(self, codes: Codes, inputs: Inputs) -> Tensors:
        grid, k = codes.grid, codes.shape[1]
        zero = codes.zero
        if zero is None:
            zero = np.full(codes.scale.shape, grid.middle, np.uint8)
        if self.version == 1:  # zeros are 1 and more (Grid.min_zero), so that no field borrows from the next
            zero = zero - np.uint8(1)
        index = codes.group_index
        if index is None:
            index = np.arange(k, dtype=np.int32) // (grid.group[1] or k)
        return {
            "qweight": pack_first(codes.values.T, grid.bits),
            "qzeros": pack_last(np.ascontiguousarray(zero.T), grid.bits),
            "scales": np.ascontiguousarray(codes.scale.T),
            "g_idx": index.astype(np.int32),
        }

    def config(self, facts: Facts) -> dict[str, Any]:
        grid = facts.grid
        config = {
            "quant_method": "gptq",
            "method": "gptq",
            "bits": grid.bits,
            "group_size": grid.group[1] or -1,
            "desc_act": facts.act_order and not facts.static_groups,
            "static_groups": facts.static_groups,
            "sym": grid.symmetric,
            "lm_head": False,
            "true_sequential": True,
            "damp_percent": facts.damp,
            "checkpoint_format": self.name,
            "format": self.name,
            "pack_dtype": "int32",
            "meta": {"quantizer": ["jqserve"], "algorithm": facts.algorithm},
        }
        if facts.ignored:
            config["dynamic"] = {f"-:^{re.escape(name)}$": {} for name in facts.ignored}
        return config

    def files(self, facts: Facts) -> dict[str, dict[str, Any]]:
        return {"quantize_config.json": self.config(facts)}
