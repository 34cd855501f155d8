"""How weights lie in memory, and no jax: the tile, and the types that a weight may have."""

from __future__ import annotations

import dataclasses

ROWS = 16  # rows of a tile
BLOCK_BYTES = 512


@dataclasses.dataclass(frozen=True)
class Kind:
    """A stored type: "u4", "s8" or "e4m3" (float8_e4m3fn)."""

    name: str
    words: int  # per lane for 16 rows x 16 columns
    block_k: int  # columns in a block of 512 bytes

    @property
    def steps(self) -> int:
        """16-column steps in a block."""
        return self.block_k // 16


KINDS = {"u4": Kind("u4", 1, 64), "s8": Kind("s8", 2, 32), "e4m3": Kind("e4m3", 2, 32)}
KIND_OF = {"uint8": "s8", "int8": "s8", "float8_e4m3fn": "e4m3"}  # of 8-bit arrays; uint8 are stored as u - 128
