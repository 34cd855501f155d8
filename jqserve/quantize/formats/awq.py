"""AutoAWQ's GEMM form (FORMATS.md section 3)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from jqserve.errors import UnsupportedError
from jqserve.quantize.formats.format import Facts, Inputs, Tensors
from jqserve.quantize.formats.words import AWQ_ORDER, pack_first
from jqserve.quantize.grid import Grid

if TYPE_CHECKING:  # codes are made by jax; a configuration alone (`jqserve plan`) needs none
    from jqserve.quantize.codes import Codes


class Awq:
    """`qweight`, `qzeros` packed along N in AutoAWQ's order, `scales` F16. Its readers compute in float16 alone, so
    every dense tensor is float16 as well."""

    name = "awq"
    dtype = "float16"

    def check(self, grid: Grid, where: str, n: int, k: int) -> None:
        if n % 8:
            raise UnsupportedError(
                f"{where}: {n} out features are not a multiple of 8, which AutoAWQ's format packs; use --format "
                f"compressed-tensors, or --ignore {where}"
            )

    def tensors(self, codes: Codes, inputs: Inputs) -> Tensors:
        assert codes.zero is not None and codes.group_index is None
        return {
            "qweight": np.ascontiguousarray(pack_first(codes.values, 4, AWQ_ORDER).T),
            "qzeros": np.ascontiguousarray(pack_first(codes.zero, 4, AWQ_ORDER).T),
            "scales": np.ascontiguousarray(codes.scale.T),
        }

    def config(self, facts: Facts) -> dict[str, Any]:
        return {
            "quant_method": "awq",
            "bits": 4,
            "group_size": facts.grid.group[1] or -1,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": _substrings(facts.ignored, facts.layers) or None,
        }

    def files(self, facts: Facts) -> dict[str, dict[str, Any]]:
        return {}


def _substrings(ignored: tuple[str, ...], layers: int) -> list[str]:
    """AutoAWQ looks for substrings of names inside a layer ("self_attn.o_proj"): it cannot leave out one layer's."""
    tails = [name.split(".", 3)[3] for name in ignored]
    for tail in tails:
        if tails.count(tail) != layers:
            raise UnsupportedError(
                f"--ignore: {tail} is left out in {tails.count(tail)} of {layers} layers, which AutoAWQ's format "
                "cannot say; leave it out in all of them, or use --format compressed-tensors"
            )
    return sorted(set(tails))
