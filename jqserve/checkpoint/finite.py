"""Is every value of a float array finite? By its bits, so that one pass over narrow integers is all it takes."""

from __future__ import annotations

from typing import Any

import numpy as np

from jqserve.quant.namespace import namespace

#: dtype -> (unsigned integer of its width, mask of all but the sign, smallest masked value that is not finite)
_BITS: dict[str, tuple[Any, int, int]] = {
    "float8_e4m3fn": (np.uint8, 0x7F, 0x7F),
    "float16": (np.uint16, 0x7FFF, 0x7C00),
    "bfloat16": (np.uint16, 0x7FFF, 0x7F80),
    "float32": (np.uint32, 0x7FFFFFFF, 0x7F800000),
}


#: Values that numpy looks at a time: they stay in the cache, and no second array of the size is made.
_CHUNK = 1 << 18


def all_finite(array: Any) -> Any:
    """True (a bool, or a traced bool) where `array` has no NaN and no infinity; integers are always finite."""
    name = np.dtype(array.dtype).name
    if name not in _BITS or array.size == 0:
        return True
    word, mask, limit = _BITS[name]
    if namespace(array) is not np:
        return (array.view(word) & word(mask)).max() < word(limit)
    bits = array.reshape(-1).view(word)
    return all((bits[i : i + _CHUNK] & word(mask)).max() < limit for i in range(0, bits.size, _CHUNK))
