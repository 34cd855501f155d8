"""Code books of 4-bit floats: the value of each code, and the code nearest to a value.

Source of the tables: bitsandbytes 0.50 (`get_4bit_type`), whose nf4 is that of QLoRA (arXiv:2305.14314).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from jqserve.quant.namespace import namespace

#: name -> float32 [16]
CODEBOOKS: dict[str, np.ndarray] = {
    "nf4": np.array(
        [
            *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
            *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
            *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
            *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
        ],
        np.float32,
    ),
    # sign, two bits of exponent, one of mantissa, over 12: 0, 1/192, 2/3, 1, 1/3, 1/2, 1/6, 1/4
    "fp4": np.array([0, 1 / 192, 2 / 3, 1, 1 / 3, 1 / 2, 1 / 6, 1 / 4] * 2, np.float32)
    * np.array([1] * 8 + [-1] * 8, np.float32),
}


def decode(codes: Any, name: str) -> Any:
    """Codes 0..15 of any shape -> float32 values."""
    table = CODEBOOKS[name]
    xp = namespace(codes)
    return table[codes] if xp is np else xp.take(table, codes, axis=0, mode="clip")


def encode(value: Any, name: str) -> Any:
    """float32 values in [-1, 1] of any shape -> uint8 codes of the nearest value, the lower one from the middle."""
    xp = namespace(value)
    table = CODEBOOKS[name]
    levels, first = np.unique(table, return_index=True)  # sorted, -0 and 0 are one
    bounds = (levels[1:] + levels[:-1]) / np.float32(2)
    rank = sum((value > bound).astype(xp.uint8) for bound in bounds)
    order = first.astype(np.uint8)
    return xp.take(xp.asarray(order), rank, axis=0)
