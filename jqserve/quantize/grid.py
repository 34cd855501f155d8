"""`Grid`: the values that a weight may take. `on_grid` finds a group's scale and rounds to them."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import ml_dtypes
import numpy as np

from jqserve.errors import UnsupportedError

FP8_MAX = 448.0
Kind = Literal["int", "float8"]


@dataclasses.dataclass(frozen=True)
class Grid:
    """How one Linear's weight W [N, K] is stored.

    kind         int: unsigned codes 0 .. 2^bits - 1 around a zero point; float8: e4m3fn, +-448
    bits         2 to 8; 8 for float8
    symmetric    the zero point is 2^(bits - 1) everywhere, and none is stored
    group        (rows, columns) that share a scale; 0 stands for all of them: (1, 128) groups, (1, 0) per channel,
                 (0, 0) per tensor, (128, 128) blocks
    scale_dtype  what scales are stored in; they are rounded to it before a value is, so that the error of the rounding
                 is compensated like any other
    native       float dtype whose roundings the arithmetic follows step by step, or "float32". LLM Compressor computes
                 scale and x / scale in the dtype of the weight: its bytes can only be met that way
    reciprocal   values are multiplied by 448 / absmax, and the scale is that number's inverse, as in transformers' fp8
    min_zero     smallest zero point. 1 where a file stores zero - 1 (GPTQ v1): readers disagree about a stored -1
    """

    kind: Kind
    bits: int
    symmetric: bool
    group: tuple[int, int]
    scale_dtype: str = "float32"
    native: str = "float32"
    reciprocal: bool = False
    min_zero: int = 0

    @property
    def levels(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    @property
    def middle(self) -> int:
        """The zero point of a symmetric grid."""
        return 1 << (self.bits - 1)

    def extent(self, n: int, k: int) -> tuple[int, int]:
        """`group` with its zeros resolved for a weight of [n, k]."""
        return self.group[0] or n, self.group[1] or k

    def check(self, where: str, n: int, k: int) -> None:
        """Raises UnsupportedError when K is no multiple of the group: no format here stores a ragged last group."""
        _, columns = self.extent(n, k)
        if self.group[0] == 1 and k % columns:
            fitting = [size for size in (128, 64, 32) if k % size == 0]
            advice = f"--group-size {fitting[0]}" if fitting else "--group-size -1 (one scale a channel)"
            raise UnsupportedError(
                f"{where}: {k} in features are not a multiple of the group size {columns}; use {advice}, or --ignore "
                f"{where}"
            )


def storage(dtype: str) -> Any:
    """The numpy dtype of a scale dtype's name."""
    return np.dtype(getattr(ml_dtypes, dtype, dtype))


def stored_as(array: np.ndarray, dtype: str, name: str) -> np.ndarray:
    """A dense tensor in the dtype that it is written in. Raises UnsupportedError where float16 cannot hold it."""
    kept = array.astype(storage(dtype))
    if dtype == "float16" and not np.isfinite(kept.astype(np.float32)).all():
        raise UnsupportedError(
            f"{name}: holds values beyond float16's 65504, and this format is float16 throughout; use --format "
            "compressed-tensors"
        )
    return kept
