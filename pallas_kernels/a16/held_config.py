"""Where the held kernel is taken, and how: the cases in which it won on an H200 (bench/a16_variants.py, 2026-11-27).

It streams a row tile of W over all warps at once, so that it needs many tiles to pay for loading x into registers:
28672 x 4096 took 22.2 us in 4 bits at M = 16 (26.9 without it), 30.7 us in 8 bits at M = 1 (34.9); layers of 4096 and
6144 rows and 4-bit weights at M = 1 gained 0.5 us or nothing.
"""

from __future__ import annotations

import dataclasses

from pallas_kernels.a16.held_plan import Config, Plan

MIN_ROWS = 16384


def search_space(plan: Plan) -> list[Config]:
    """The configurations that can run `plan`'s problem, likeliest first."""
    four = plan.kind.name == "u4"
    lift = four and not plan.has_zero
    first = [Config(8, 2, lift=lift), Config(16, 4, lift=lift), Config(16, 2, lift=lift)]
    ranked = first if four else [Config(16, 4), Config(16, 2), Config(8, 2)]
    return [config for config in ranked if _legal(dataclasses.replace(plan, config=config))]


def heuristic(plan: Plan) -> Config:
    """Raises NotImplementedError where another kernel is the better one, or for shapes it cannot take."""
    first, last = (9, 16) if plan.kind.name == "u4" else (1, 8)
    if not first <= plan.m <= last:
        problem = f"M = {plan.m} is larger than {last}" if plan.m > last else f"M = {plan.m} is smaller than {first}"
        raise NotImplementedError(f"held kernel: {problem}, up to which it is the fastest")
    if plan.n < MIN_ROWS:
        raise NotImplementedError(f"held kernel: N = {plan.n} is less than {MIN_ROWS}, from where on it is the fastest")
    found = search_space(plan)
    if not found:
        raise NotImplementedError(f"held kernel: no configuration takes K = {plan.k}, group {plan.group}")
    return found[0]


def _legal(plan: Plan) -> bool:
    try:
        plan.check()
    except NotImplementedError:
        return False
    return plan.stages > plan.config.pieces
