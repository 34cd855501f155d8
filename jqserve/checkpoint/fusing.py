"""Which Linears of one input may become one: their specs, concatenated along N."""

from __future__ import annotations

from jqserve.quant import QuantSpec

#: Blocks of fp8 scales that scaled_matmul takes, and that fuse as they are.
BLOCKS = (128, 128)


def fused_spec(specs: list[QuantSpec | None], n: int) -> QuantSpec | None:
    """The spec of parts concatenated along N. Raises ValueError, with the reason, where they do not agree."""
    if all(s is not None and s.group_shape == BLOCKS for s in specs):
        blocks = [s.replace(shape=(n, s.shape[1])) for s in specs if s is not None]
        if any(s is not None and s.shape[0] % BLOCKS[0] for s in specs[:-1]):
            raise ValueError("their rows do not fill whole 128x128 blocks")
        if any(s != blocks[0] for s in blocks):
            raise ValueError("schemes differ")
        return blocks[0]
    per_channel = [s and s.replace(shape=(n, s.shape[1]), group_shape=(1, s.group_shape[1])) for s in specs]
    if any(s != per_channel[0] for s in per_channel):
        raise ValueError("schemes differ")
    return per_channel[0]
