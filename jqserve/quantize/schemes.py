"""`--scheme`: the schemes that can be made, what each stores, and in which formats."""

from __future__ import annotations

import dataclasses
from typing import Literal

from jqserve.quantize.grid import Kind

Algorithm = Literal["rtn", "gptq", "awq"]


@dataclasses.dataclass(frozen=True)
class Scheme:
    """One row of the table.

    bits, formats: what may be chosen, the default first. group: (rows, columns) as Grid has it, columns replaced by
    --group-size where `grouped`. inputs: how activations are treated. zero_points: whether --asym may be said.
    """

    summary: str
    kind: Kind
    bits: tuple[int, ...]
    group: tuple[int, int]
    grouped: bool
    symmetric: bool
    zero_points: bool
    inputs: str
    algorithms: tuple[Algorithm, ...]
    formats: tuple[str, ...]


_CT, _GPTQ = "compressed-tensors", ("gptq", "gptq_v2")

SCHEMES: dict[str, Scheme] = {
    "gptq": Scheme(
        "4- or 8-bit weights, errors of each column compensated in the next (calibrated)",
        "int", (4, 8), (1, 128), True, True, True, "none", ("gptq",), (*_GPTQ, _CT),
    ),
    "awq": Scheme(
        "4-bit weights, input channels scaled by their activations, ranges clipped (calibrated)",
        "int", (4,), (1, 128), True, False, True, "none", ("awq",), ("awq", _CT),
    ),
    "w4a16": Scheme(
        "4-bit weights, rounded to nearest",
        "int", (4,), (1, 128), True, True, True, "none", ("rtn",), (_CT, *_GPTQ),
    ),
    "w8a16": Scheme(
        "8-bit weights, rounded to nearest",
        "int", (8,), (1, 128), True, True, True, "none", ("rtn",), (_CT, *_GPTQ),
    ),
    "w8a8-int8": Scheme(
        "int8 weights per channel, int8 activations per token (--smoothquant, --gptq: calibrated)",
        "int", (8,), (1, 0), False, True, False, "token", ("rtn", "gptq"), (_CT,),
    ),
    "fp8-dynamic": Scheme(
        "fp8 weights per channel, fp8 activations per token",
        "float8", (8,), (1, 0), False, True, False, "token", ("rtn",), (_CT,),
    ),
    "fp8-static": Scheme(
        "fp8 weights and activations with one scale a tensor (calibrated)",
        "float8", (8,), (0, 0), False, True, False, "static", ("rtn",), (_CT,),
    ),
    "fp8-block": Scheme(
        "fp8 weights in 128 x 128 blocks, fp8 activations per 128 features",
        "float8", (8,), (128, 128), False, True, False, "block", ("rtn",), (_CT, "fp8"),
    ),
}  # fmt: skip
