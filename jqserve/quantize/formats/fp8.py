"""DeepSeek's fp8: 128 x 128 blocks, `weight_scale_inv` float32, which multiplies (FORMATS.md section 4)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jqserve.quantize.formats.format import Facts, Inputs, Tensors, check_blocks
from jqserve.quantize.grid import Grid

if TYPE_CHECKING:  # codes are made by jax; a configuration alone (`jqserve plan`) needs none
    from jqserve.quantize.codes import Codes


class BlockFp8:
    """Activations are quantized per 128 features when the model runs."""

    name = "fp8"
    dtype = ""

    def check(self, grid: Grid, where: str, n: int, k: int) -> None:
        check_blocks(grid, where, n, k)

    def tensors(self, codes: Codes, inputs: Inputs) -> Tensors:
        return {"weight": codes.values, "weight_scale_inv": codes.scale}

    def config(self, facts: Facts) -> dict[str, Any]:
        return {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "scale_fmt": "float",
            "weight_block_size": [128, 128],
            "modules_to_not_convert": [*facts.ignored, "lm_head"],
            "dequantize": False,
        }

    def files(self, facts: Facts) -> dict[str, dict[str, Any]]:
        return {}
