"""Which tile configuration the wgmma kernel takes: a model of its time, calibrated on an H200 (within some 15 %)."""

from __future__ import annotations

import dataclasses
import functools
import itertools

from pallas_kernels.a16.wgmma_plan import Config, Plan

CLOCK = 1700.0  # cycles per microsecond under load


def search_space(plan: Plan) -> list[Config]:
    """All configurations that can run `plan`'s problem, best estimate first."""
    return [config for _, config in _ranked(dataclasses.replace(plan, config=Config()))]


def heuristic(plan: Plan) -> Config:
    """The configuration with the smallest estimated time. Raises NotImplementedError when none can run it."""
    ranked = _ranked(dataclasses.replace(plan, config=Config()))
    if not ranked:
        raise NotImplementedError(
            f"wgmma kernel: no configuration takes N = {plan.n}, K = {plan.k}, group {plan.group}"
        )
    return ranked[0][1]


def best_estimate(plan: Plan) -> float:
    """Microseconds that the heuristic's configuration is expected to take; inf where none can run the problem."""
    ranked = _ranked(dataclasses.replace(plan, config=Config()))
    return ranked[0][0] if ranked else float("inf")


@functools.lru_cache(maxsize=1024)
def _ranked(plan: Plan) -> tuple[tuple[float, Config], ...]:
    found = []
    most = max(16, min(256, -(-plan.m // 16) * 16))
    m_tiles = sorted({t for t in (16, 32, 48, 64, 96, 128, 192, 256) if t <= most} | ({most} if most < 256 else set()))
    for warpgroups, m_tile, k_step, split in itertools.product((1, 2, 3, 4), m_tiles, (64, 128, 256), (1, 2)):
        if m_tile > {1: 256, 2: 256, 3: 160, 4: 128}[warpgroups]:  # registers of the accumulators
            continue
        if plan.m > 256 and m_tile not in (64, 128, 192, 256):  # 96 was a quarter slower at M = 4096
            continue
        for parts in (1, 2, 4, 8) if split == 1 and plan.m <= 512 else (1,):
            config = Config(warpgroups, m_tile, k_step, split, parts=parts)
            candidate = dataclasses.replace(plan, config=config)
            try:
                candidate.check()
            except NotImplementedError:
                continue
            found.append((estimate(candidate), config))
    found.sort(key=lambda pair: pair[0])
    if found and (shared := _shared_rows(plan)) is not None:
        found.insert(0, (0.9 * found[0][0], shared))
    return tuple(found)


def _shared_rows(plan: Plan) -> Config | None:
    """Two warpgroups to the same 64 rows of W, for a layer with fewer such blocks than there are multiprocessors.

    Their sums meet in shared memory, where parts of K want another kernel. M = 16, 4 bits, an H100 (bench/results/
    a16_variants_h100.json): qkv 10.7 -> 9.0 us, o 8.3 -> 7.5, down 16.8 -> 16.1; M = 64, 8 bits: 16.0 -> 13.3,
    12.8 -> 11.0, 29.9 -> 26.8.
    """
    blocks = plan.n // 64
    split = 2 if 2 * blocks <= plan.sms else 1
    if not 8 < plan.m <= 64 or not plan.sms // 2 < blocks * split <= plan.sms:  # fewer would leave most of the GPU idle
        return None
    config = Config(2, -(-plan.m // 16) * 16, 256, split, k_groups=2)
    try:
        dataclasses.replace(plan, config=config).check()
    except NotImplementedError:
        return None
    return config


def estimate(plan: Plan) -> float:
    """Microseconds: rounds of tiles, each the slowest of tensor core, dequantization, L2 and HBM, plus its ends."""
    c = plan.config
    rounds = -(-plan.tiles // plan.clusters)
    blocks = plan.k_block / 16
    tensor = max(c.m_tile / 2, 16) * c.warpgroups * blocks
    # One warpgroup alone waits for its own dequantization; several hide it behind each other's products.
    convert = blocks * (20 + 14 * plan.kind.words + (0 if plan.scales_in_epilogue else 10)) * c.warpgroups
    hidden = {1: 1.0, 2: 0.15, 3: 0.12, 4: 0.05}[c.warpgroups]  # the part that is not, in fact
    if c.warpgroups == 4 and c.m_tile > 64 and plan.kind.words == 2:
        # Conversions fill the issue slots. gate_up, M = 4096: 1431 us; two warpgroups with m_tile 256 make half of
        # them for the same product: 1271 us.
        hidden = 0.25
    busy = tensor + convert if c.warpgroups == 1 else max(tensor * 1.05, convert) + hidden * min(tensor, convert)
    busy = max(busy, blocks * (85 + c.m_tile / 4))  # load, convert, multiply, wait: one warpgroup's chain
    per_step = plan.copied_bytes / 36.0  # bytes per cycle from L2
    copies = plan.steps * per_step
    # Blocks of a cluster read each other's float32 sums at some 25 bytes per cycle.
    meet = 900 + (c.m_tile * c.rows / 40 if c.split == 1 else 600 + c.m_tile * c.rows * 4 / 25)
    # Three stages of 256 columns hold as much as six of 128, and were the best where many follow (M = 64: int8 down
    # 23.0 us, 4-bit gate_up 31.2), not where the first is an eighth of all.
    deep = plan.stages > 3 or (plan.stages == 3 and c.k_step == 256 and plan.steps >= 14)
    busy = busy * (1.0 if deep else 1.02 if plan.stages == 3 else 1.15) + plan.steps * 25
    if plan.m > 128 and plan.m_tiles == 1:  # one block reads a weight (gate_up, M = 256, 4 bits: 82.0 us against 84.5)
        busy *= 0.97
    # The producer must be far enough ahead to hide a copy's latency of some 1000 cycles behind other stages' products.
    ahead = (plan.stages - 1) * max(busy, copies) / plan.steps
    copies += plan.steps * max(0.0, 1000 - ahead) / plan.stages
    cycles = rounds * (max(busy, copies) + meet)
    hbm = plan.n * plan.k * plan.kind.words / 2 / 4.6e6
    # XLA's sum of the parts: a kernel more, and float32 written and read.
    reduce = 1.0 + c.parts * plan.m * plan.n * 8 / 8e6 if c.parts > 1 else 0.0
    return max(cycles / CLOCK, hbm) + 3.5 + reduce
