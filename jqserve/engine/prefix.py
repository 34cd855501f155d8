"""Names of full pages: a chain of hashes over everything up to the page's end. Plain Python.

    name[i] = BLAKE2b-128(name[i - 1] || tokens of page i as little-endian int32)

Keys and values of a position depend on the tokens up to it and on nothing else (attention is causal, also where a
sliding window hides the far past), so pages of the same name hold the same. The hash is cryptographic because a
collision would show one user what another wrote.
"""

from __future__ import annotations

import hashlib
import sys
from array import array
from collections.abc import Sequence

_ROOT = b"jqserve"


def page_name(before: bytes | None, tokens: Sequence[int]) -> bytes:
    """The name of a page with these tokens after the page named `before` (None: it is the first)."""
    packed = array("i", tokens)
    if sys.byteorder == "big":
        packed.byteswap()
    return hashlib.blake2b((before or _ROOT) + packed.tobytes(), digest_size=16).digest()


def extend(names: list[bytes], tokens: Sequence[int], page_size: int, pages: int) -> None:
    """Adds to the names of a sequence's first pages those up to page `pages` (which `tokens` must fill)."""
    for i in range(len(names), pages):
        names.append(page_name(names[-1] if names else None, tokens[i * page_size : (i + 1) * page_size]))
