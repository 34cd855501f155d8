"""Which tile configuration the decode kernel takes: a model of its time, calibrated on an H200."""

from __future__ import annotations

import dataclasses
import functools
import itertools

from pallas_kernels.a16.decode_plan import WARPS, Config, Plan

MAX_M = 16  # beyond it the small tiles of mma cost more than the wgmma kernel


def search_space(plan: Plan) -> list[Config]:
    """All configurations that can run `plan`'s problem, best estimate first."""
    return [config for _, config in _ranked(dataclasses.replace(plan, config=Config()))]


def heuristic(plan: Plan) -> Config:
    """The configuration with the smallest estimated time. Raises NotImplementedError when none can run it."""
    ranked = _ranked(dataclasses.replace(plan, config=Config()))
    if not ranked:
        raise NotImplementedError(f"decode kernel: no configuration takes M = {plan.m}, N = {plan.n}, K = {plan.k}")
    return ranked[0][1]


def best_estimate(plan: Plan) -> float:
    """Microseconds that the heuristic's configuration is expected to take; inf where none can run the problem."""
    ranked = _ranked(dataclasses.replace(plan, config=Config()))
    return ranked[0][0] if ranked else float("inf")


@functools.lru_cache(maxsize=1024)
def _ranked(plan: Plan) -> tuple[tuple[float, Config], ...]:
    found = []
    for split, row_tiles, row_warps, k_warps in itertools.product(
        (1, 2, 4, 8), (1, 2, 4), (1, 2, 4), (2, 4, 7, 8, 14, 16)
    ):
        if row_warps * k_warps > WARPS or row_warps * k_warps < 8 or row_tiles * plan.n_tiles > 8:
            continue
        blocks = plan.k // plan.kind.block_k
        if blocks * plan.kind.block_k != plan.k or blocks % (split * k_warps):
            continue
        per_warp = blocks // (split * k_warps)
        for unit in (u for u in (8, 7, 6, 5, 4, 3, 2, 1) if per_warp % u == 0 and u * row_tiles <= 8):
            config = Config(row_tiles, row_warps, k_warps, unit, split)
            candidate = dataclasses.replace(plan, config=config)
            try:
                candidate.check()
            except NotImplementedError:
                continue
            found.append((estimate(candidate), config))
    return tuple(sorted(found, key=lambda pair: pair[0]))


def estimate(plan: Plan) -> float:
    """Microseconds. The slowest block's share of: HBM, loading x, issuing instructions, and meeting at tile ends."""
    c = plan.config
    rounds = -(-plan.tiles // plan.clusters)
    blocks = plan.clusters * c.split
    words = rounds * c.rows * plan.k_block / 256 * plan.kind.words  # of 32 lanes each, one block's share
    weight_bytes = words * 128 * (1 + (0 if plan.scales_in_epilogue else 32 / (8 * plan.group)))
    hbm = max(plan.n * plan.k * plan.kind.words / 2 / 4.6e6, weight_bytes / 42e3 * blocks / max(blocks, 120))
    load_x = plan.m * plan.k_block * 2 / 80e3
    # Cycles of one scheduler per word: the half-rate integer pipe, the tensor core, all issued instructions.
    per_word = max(14.0, 8.0 * plan.n_tiles / plan.kind.words, 13 + 1.5 * plan.n_tiles + plan.n_tiles / c.row_tiles)
    # Refilling a stage and waiting for the next costs some 75 instructions: at M = 16 stages of 512 bytes took 27 us
    # where 1 KiB took 17 (6144 x 4096, int8, H100).
    per_word += 75 / (4 * c.unit * c.row_tiles)
    busy = c.row_warps * c.k_warps / WARPS
    issue = words / 4 * per_word / busy / 1750
    smem = words * (128 * 2 + 256 * plan.n_tiles / c.row_tiles / plan.kind.words) / 128 / 1750
    partial = c.k_warps * plan.n_tiles * 8 * c.rows * 4
    meet = rounds * (0.35 + (0.6 * c.split if c.split > 1 else 0) + partial * 2 / 60e3)
    return max(hbm, issue, smem) + 0.2 * issue + 0.6 * load_x + meet + 2.0
