"""Tile configs of the paged attention kernels, and what to take for shapes nobody measured."""

from __future__ import annotations

import dataclasses
import itertools


@dataclasses.dataclass(frozen=True)
class DecodeConfig:
    """warps: of a CTA (4 or 8). stages: tiles of 16 tokens in each warp's ring. split: CTAs (a cluster) of a row."""

    warps: int = 4
    stages: int = 3
    split: int = 1
    pdl: bool = False  # launch while the kernel before still runs, and wait for it in the kernel


def decode_heuristic(items: int, tokens: int, row_bytes: int, cores: int) -> DecodeConfig:
    """For `items` (row, kv head) pairs of at most `tokens` keys of `row_bytes` on a GPU of `cores` SMs."""
    split = 1
    while split < 8 and items * split * 2 <= 2 * cores and tokens // (split * 2) >= 64:
        split *= 2
    padded = -(-row_bytes // 128) * 128
    stages = max(3, min(8, 96 * 1024 // (4 * 2 * 16 * padded)))  # two CTAs an SM
    return DecodeConfig(4, stages, split)


def decode_search_space(row_bytes: int) -> list[DecodeConfig]:
    """Configs that fit into an SM's 227 KiB of shared memory."""
    padded = -(-row_bytes // 128) * 128
    every = itertools.product((4, 8), (2, 3, 4, 6, 8), (1, 2, 4, 8))
    return [DecodeConfig(w, s, c) for w, s, c in every if w * s * 32 * padded <= 200 * 1024]
