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
    """For `items` (row, kv head) pairs of at most `tokens` keys of `row_bytes` on a GPU of `cores` SMs.

    From a sweep on one H200 (kernel us, heads 32/8 x 128 bf16; bench/results/paged_attention_decode_sweep.json):
    few items take one CTA of 8 warps per SM and share a row over a cluster (1 x 1,024: split 8 5.1, 4 5.6, 16 9.1;
    1 x 8,192: 12.4, 14.5, 17.7); many items take two CTAs of 4 warps per SM, so that one streams while the other
    starts or merges (64 x 1,024: 65.0 against 66.4). Rows of many pages are split in two even then, up to
    four items an SM: it costs 0.2 % (64 x 8,192: 484.7 against 484.0) and halves the tail when lengths differ. `tokens`
    is what the page table could hold, not what is there, and a cluster costs each short row: 256 x 128 takes 75 us in
    two parts and 51 in one, 64 x 128 18 and 11 (H100, tables of 2,048 pages).
    """
    padded = -(-row_bytes // 128) * 128
    ring = 2 * 16 * padded  # bytes of one warp's stage
    few = 2 * items <= cores
    split = 1
    while few and split < 8 and items * split * 2 <= cores and tokens // (split * 2) >= 128:
        split *= 2
    if items <= cores and 8 * 2 * ring <= 200 * 1024:
        return DecodeConfig(8, min(6, 192 * 1024 // (8 * ring)), split)
    if not few and tokens >= 4096 and items <= 4 * cores:
        split = 2
    return DecodeConfig(4, max(3, min(6, 96 * 1024 // (4 * ring))), split)


def decode_search_space(row_bytes: int) -> list[DecodeConfig]:
    """Configs that fit into an SM's 227 KiB of shared memory."""
    padded = -(-row_bytes // 128) * 128
    every = itertools.product((4, 8), (2, 3, 4, 6, 8), (1, 2, 4, 8))
    return [DecodeConfig(w, s, c) for w, s, c in every if w * s * 32 * padded <= 200 * 1024]


@dataclasses.dataclass(frozen=True)
class PrefillConfig:
    """block_kv: keys of a block. stages: blocks in the ring. pingpong: the two warpgroups take turns at the wgmmas.

    early_keys: the next block's keys are asked for in front of this one's values.
    split_last: all CTAs share the last round's items by keys (see prefill_walk).
    """

    block_kv: int = 128
    stages: int = 2
    pingpong: bool = True
    early_keys: bool = False
    split_last: bool = False


def prefill_heuristic(head_dim: int, items: int, cores: int, *, fp8: bool) -> PrefillConfig:
    """For `items` heads of 128 queries each, on `cores` multiprocessors; `fp8`: the pages.

    16-bit pages and heads of 128 (bench/results/prefill_other.json, an H200): early keys make 1,024 items of 4,096 keys
    5 % faster (412 -> 396 us; causal 217 -> 208). Where the last round leaves a tenth of the work's time unused it is
    split instead (64 items of 8,192 keys: 108 -> 57 us); both together are slower than either. With fp8 pages and
    other heads the split kernel spills and early keys were not measured.
    """
    if head_dim != 128 or fp8:
        return PrefillConfig(64 if head_dim > 128 else 128, 2)
    unused = -(-items // cores) * cores / max(items, 1) - 1
    return PrefillConfig(early_keys=unused < 0.1, split_last=unused >= 0.1)


def prefill_search_space(head_dim: int, page_size: int) -> list[PrefillConfig]:
    """Configs that fit into an SM's 227 KiB of shared memory, whose blocks are whole pages and whose threads (128, 16
    bytes at a time) have equal shares of a block.

    160 and 176 (FlashAttention-3's) reach 649 and 642 TFLOP/s on an H200 where 128 reaches 672 (S = 4,096, not causal;
    bench/results/kernels.json, group prefill_other). `early_keys` and `split_last` are not searched: see PrefillConfig.
    """
    every = itertools.product((64, 128, 160, 176), (2, 3, 4), (True, False))
    return [
        PrefillConfig(block, stages, pingpong)
        for block, stages, pingpong in every
        if block % page_size == 0
        and block * head_dim % 2048 == 0
        and (128 + 2 * stages * block) * head_dim * 2 <= 224 * 1024
    ]
