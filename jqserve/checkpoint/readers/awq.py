"""AWQ as AutoAWQ's GEMM kernels store it (FORMATS.md section 3): 4 bit, packed along N, nibbles interleaved."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from jqserve.checkpoint.fields import Fields
from jqserve.checkpoint.readers.dense import DENSE
from jqserve.checkpoint.scheme import Arrays, Need, Prepared, Scheme, finite, group_count, namespace, transposed
from jqserve.errors import CheckpointError
from jqserve.quant import QuantSpec

#: Nibble i of a word (bits 4i) holds column 8j + COLUMNS[i].
COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)
#: Column 8j + c sits in nibble NIBBLES[c].
NIBBLES = (0, 4, 1, 5, 2, 6, 3, 7)


@dataclasses.dataclass(frozen=True)
class Awq(Scheme):
    """W[n, k] = (q - z) * s with the true zero z; `group_size` -1 is one group over K."""

    group_size: int

    @property
    def method(self) -> str:
        return "awq"

    def _group(self, k: int) -> int:
        return k if self.group_size == -1 else self.group_size

    def spec(self, n: int, k: int) -> QuantSpec:
        return QuantSpec("uint4", (n, k), (1, self._group(k)), "int")

    def check(self, where: str, n: int, k: int) -> None:
        if n % 8 or k % 2 or k % self._group(k):
            raise CheckpointError(
                f"{where}: AWQ needs out features in eights and in features in groups of {self._group(k)}, "
                f"found [{n}, {k}]"
            )

    def needs(self, n: int, k: int) -> dict[str, Need]:
        groups = group_count(k, self._group(k))
        return {
            "qweight": Need(("I32",), ((k, n // 8),)),
            "qzeros": Need(("I32",), ((groups, n // 8),)),
            "scales": Need(("F16", "BF16", "F32"), ((groups, n),)),
        }

    def prepare(self, where: str, raw: Mapping[str, np.ndarray], n: int, k: int) -> Prepared:
        finite(where, "scales", raw["scales"])
        return Prepared({name: raw[name] for name in ("qweight", "qzeros", "scales")})

    def decode(self, arrays: Arrays, n: int, k: int) -> tuple[Any, Any, Any]:
        words = arrays["qweight"].view(np.uint32)
        xp = namespace(words)
        even, odd = words[0::2], words[1::2]  # rows 2m and 2m+1 share a byte of the canonical form
        low, high = np.uint32(0x0F0F0F0F), np.uint32(0xF0F0F0F0)
        four = np.uint32(4)
        halves = ((even & low) | ((odd & low) << four), ((even >> four) & low) | (odd & high))
        # Byte b of halves[h] is nibble 2b + h of both rows, that is column COLUMNS[2b + h] of its eight.
        parts = [h.view(np.uint8).reshape(k // 2, n // 8, 4) for h in halves]
        columns = [parts[NIBBLES[c] % 2][:, :, NIBBLES[c] // 2] for c in range(8)]
        qvalue = xp.stack([c.T for c in columns], axis=1).reshape(n, k // 2)
        zeros = arrays["qzeros"].view(np.uint32)
        fields = [((zeros >> np.uint32(4 * NIBBLES[c])) & np.uint32(15)).astype(xp.uint8).T for c in range(8)]
        zero = xp.stack(fields, axis=1).reshape(n, -1)
        return qvalue, transposed(arrays["scales"]), zero


class AwqPlan:
    """Which Linears are quantized: all but lm_head and those whose name contains an entry of modules_to_not_convert."""

    method = "awq"

    def __init__(self, config: Fields) -> None:
        for key in ("bits", "w_bit"):
            if key == "bits" or config.data.get("bits") is None:
                config.one_of(key, (4,), 4)
        version = config.text("version", "gemm")
        if version.lower() != "gemm":
            raise config.unsupported("version", "'gemm' (save again with version GEMM)")
        if not config.flag("zero_point", True):
            raise config.unsupported("zero_point", "true: GEMM files always store zeros")
        key = "group_size" if config.data.get("group_size") is not None else "q_group_size"
        group = config.integer(key, 128, minimum=-1)
        if group == 0:
            raise config.error(key, "-1 or a positive group size")
        self._scheme = Awq(group)
        self._dense = config.texts("modules_to_not_convert")

    def why_dense(self, module: str) -> str:
        if module == "lm_head":
            return "AWQ leaves the head as it is"
        part = next((part for part in self._dense if part in module), None)
        return "" if part is None else f"modules_to_not_convert has {part!r}"

    def scheme(self, module: str) -> Scheme:
        return DENSE if self.why_dense(module) else self._scheme
