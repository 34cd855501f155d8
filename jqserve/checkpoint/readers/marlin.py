"""GPTQ in Marlin's kernel layout (AutoGPTQ's `is_marlin_format`, vLLM's and GPTQModel's `marlin`): unpacked once.

Layout, after the packer of https://github.com/IST-DASLab/marlin (marlin/__init__.py): W.T [K, N] is cut into 16x16
tiles, 1,024 consecutive values (four tiles along N) are permuted as the tensor cores' fragments lie in a warp, and
eight 4-bit values share an int32. Values are symmetric around 8; scales are permuted in runs of 64 (32 when there is
one group).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from jqserve.checkpoint.scheme import Arrays, Need, Prepared, Scheme, finite, namespace, transposed
from jqserve.errors import CheckpointError
from jqserve.quant import QuantSpec
from jqserve.quant.packing import pack_uint4

TILE, RUN = 16, 1024


def fragment_order() -> np.ndarray:
    """int [1024]: position p of a packed run holds value order[p] of the tiles' row-major values.

    Lane i of a warp holds, of each of four tiles, rows 2 (i % 4) + {0, 1, 8, 9} of column i // 4 and of the one eight
    further right; a word's nibbles take those eight in the order 0, 2, 4, 6, 1, 3, 5, 7.
    """
    order = []
    for lane in range(32):
        column, row = lane // 4, 2 * (lane % 4)
        eight = [TILE * (row + r) + column + right for right in (0, 8) for r in (0, 1, 8, 9)]
        for tile in range(4):
            order += [256 * tile + eight[i] for i in (0, 2, 4, 6, 1, 3, 5, 7)]
    return np.array(order)


def scale_order(one_group: bool) -> np.ndarray:
    """int [64] or [32]: position p of a run of stored scales holds column order[p]."""
    if one_group:
        return np.array([2 * i + j for i in range(4) for j in (0, 1, 8, 9, 16, 17, 24, 25)])
    return np.array([i + 8 * j for i in range(8) for j in range(8)])


@dataclasses.dataclass(frozen=True)
class Marlin(Scheme):
    """W[n, k] = (q - 8) * s[k // group, n]; 4 bits, symmetric, no act-order."""

    group_size: int

    @property
    def method(self) -> str:
        return "gptq marlin"

    def _group(self, k: int) -> int:
        return k if self.group_size == -1 else self.group_size

    def spec(self, n: int, k: int) -> QuantSpec:
        return QuantSpec("uint4", (n, k), (1, self._group(k)))

    def check(self, where: str, n: int, k: int) -> None:
        if n % 64 or k % TILE or k % self._group(k):
            raise CheckpointError(
                f"{where}: Marlin's layout needs out features in 64s and in features in 16s and groups of "
                f"{self._group(k)}, found [{n}, {k}]"
            )

    def needs(self, n: int, k: int) -> dict[str, Need]:
        return {
            "B": Need(("I32",), ((k // TILE, n * TILE // 8),)),
            "s": Need(("F16", "BF16"), ((k // self._group(k), n),)),
            "workspace": Need(("I32",), tuple((size,) for size in range(1, n + 1)), required=False),
        }

    def prepare(self, where: str, raw: Mapping[str, np.ndarray], n: int, k: int) -> Prepared:
        return Prepared({"words": raw["B"], "scale": finite(where, "s", raw["s"])})

    def decode(self, arrays: Arrays, n: int, k: int) -> tuple[Any, Any, Any]:
        words, scale = arrays["words"].view(np.uint32), arrays["scale"]
        xp = namespace(words)
        nibbles = [((words >> np.uint32(4 * i)) & np.uint32(15)).astype(xp.uint8) for i in range(8)]
        packed = xp.stack(nibbles, axis=2).reshape(-1, RUN)
        tiles = packed[:, np.argsort(fragment_order())].reshape(k // TILE, n // TILE, TILE, TILE)
        values = tiles.transpose(1, 3, 0, 2).reshape(n, k)
        order = scale_order(self._group(k) == k)
        scale = scale.reshape(-1, order.size)[:, np.argsort(order)].reshape(-1, n)
        return pack_uint4(values), transposed(scale), None
