"""Small unsigned integers packed into int32 words."""

from __future__ import annotations

import numpy as np

#: AutoAWQ's GEMM order: nibble i of word j holds column 8 j + AWQ_ORDER[i].
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def pack_last(codes: np.ndarray, bits: int, order: tuple[int, ...] | None = None) -> np.ndarray:
    """uint8 [..., C] -> int32 [..., ceil(C bits / 32)], the first value in the lowest bits; the tail is zero bits.

    bits is 4 or 8. `order`: which of a word's values stands in each of its fields.
    """
    per_word = 32 // bits
    padding = -codes.shape[-1] % per_word
    if padding:
        codes = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, padding)])
    fields = codes.reshape(*codes.shape[:-1], -1, per_word)
    if order is not None:
        fields = fields[..., list(order)]
    if bits == 4:
        fields = fields[..., 0::2] | (fields[..., 1::2] << np.uint8(4))
    return np.ascontiguousarray(fields).view("<i4")[..., 0]


def pack_first(codes: np.ndarray, bits: int, order: tuple[int, ...] | None = None) -> np.ndarray:
    """uint8 [C, ...] -> int32 [ceil(C bits / 32), ...]: the same along the first axis, in whatever layout the codes
    lie (a transposed view costs nothing)."""
    per_word = 32 // bits
    padding = -codes.shape[0] % per_word
    if padding:
        codes = np.pad(codes, [(0, padding)] + [(0, 0)] * (codes.ndim - 1))
    fields = codes.reshape(-1, per_word, *codes.shape[1:])
    if order is not None:
        fields = fields[:, list(order)]
    if bits == 4:
        fields = fields[:, 0::2] | (fields[:, 1::2] << np.uint8(4))
    return np.ascontiguousarray(np.moveaxis(fields, 1, -1)).view("<i4")[..., 0]
