"""Reordering the columns of a packed matrix, once, when an act-order checkpoint is read."""

from __future__ import annotations

from typing import Any

from jqserve.checkpoint.scheme import namespace
from jqserve.quant.packing import pack_uint4, unpack_uint4


def permute_columns(qvalue: Any, perm: Any, bits: int, k: int) -> Any:
    """canonical uint8 [N, ceil(K/2)] (4 bit) or [N, K] (8 bit), int32 [K] -> the same with columns W[:, perm]."""
    xp = namespace(qvalue)
    if bits == 8:
        return xp.take(qvalue, perm, axis=1)
    return pack_uint4(xp.take(unpack_uint4(qvalue, k), perm, axis=1))
