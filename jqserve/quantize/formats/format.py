"""What every writer is: a name, the tensors of one Linear, and the configuration."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from jqserve.errors import UnsupportedError
from jqserve.quantize.grid import Grid

if TYPE_CHECKING:  # codes are made by jax; a configuration alone (`jqserve plan`) needs none
    from jqserve.quantize.codes import Codes

Tensors = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Inputs:
    """How the scheme treats a Linear's input: none, dynamic (per token, or per 128 features), or a static scale."""

    kind: str = "none"  # none | token | block | static
    scale: np.ndarray | None = None  # static: a value of the model's dtype, shape [1]


@dataclasses.dataclass(frozen=True)
class Facts:
    """What a configuration states about a whole checkpoint.

    grid     of the quantized Linears; inputs: how their inputs are treated (kind alone)
    ignored  Hugging Face names of the Linears of the layers that were left dense
    layers   of the model
    head     whether there is an lm_head of its own (never quantized)
    act_order, static_groups, damp, algorithm: for the record, where a format has a place for them
    kv_cache whether FP8 scales of the KV cache are stored
    """

    grid: Grid
    inputs: str
    ignored: tuple[str, ...]
    layers: int
    head: bool
    algorithm: str
    act_order: bool = False
    static_groups: bool = False
    damp: float = 0.0
    kv_cache: bool = False


def check_blocks(grid: Grid, where: str, n: int, k: int) -> None:
    """Raises UnsupportedError where blocks end within a block. jqserve reads such files; compressed-tensors cannot run
    them (inputs in groups of 128), and transformers takes rows / grid rows for a block's height and is silently wrong:
    logits off by 9 % for 192 rows, by 22 % for 160 x 160 (transformers 5.24)."""
    rows, columns = grid.group
    if k % columns or (n > rows and n % rows):
        raise UnsupportedError(
            f"{where}: [{n}, {k}] does not divide into blocks of {rows} x {columns}, and the readers of such files "
            f"disagree about what is left over; use --scheme fp8-dynamic, or --ignore {where}"
        )


class Format(Protocol):
    """A writer. `dtype` is what dense tensors are stored in: "" for the model's own."""

    name: str
    dtype: str

    def check(self, grid: Grid, where: str, n: int, k: int) -> None:
        """Raises UnsupportedError, naming the Linear `where` [n, k], for a shape that not all readers take."""
        ...

    def tensors(self, codes: Codes, inputs: Inputs) -> Tensors:
        """Suffix -> array, of one Linear (its bias excepted)."""
        ...

    def config(self, facts: Facts) -> dict[str, Any]:
        """The quantization_config of config.json. Raises UnsupportedError for what the format cannot say."""
        ...

    def files(self, facts: Facts) -> dict[str, dict[str, Any]]:
        """Further JSON files, by name."""
        ...
