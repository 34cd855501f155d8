"""Where the held kernel is taken, and how: the cases in which it won on an H200 (bench/results/a16_variants.json).

It streams a row tile of W over all warps at once, so that it needs many tiles to pay for loading x into registers:
28672 x 4096 took 22.2 us in 4 bits at M = 16 (26.9 without it), 30.7 us in 8 bits at M = 1 (34.9); layers of 4096 and
6144 rows and 4-bit weights at M = 1 gained 0.5 us or nothing. Up to eight rows of x take the same instructions. Not
timed, and left to the other kernels: fp8 weights, zero points.
"""

from __future__ import annotations

import dataclasses

from pallas_kernels.a16.held_plan import Config, Plan

MIN_ROWS = 16384
FASTEST = {"u4": (9, 16), "s8": (1, 8)}  # kind of weight -> least and most M


def check_faster(plan: Plan) -> None:
    """Raises NotImplementedError where another kernel is the better one, as far as is known."""
    kind, (first, last) = plan.kind.name, FASTEST.get(plan.kind.name, (0, 0))
    problem = None
    if kind not in FASTEST or plan.has_zero:
        problem = f"{kind} weights {'with zero points ' if plan.has_zero else ''}were not timed"
    elif plan.m > last:
        problem = f"M = {plan.m} is larger than {last}, up to which it is the fastest"
    elif plan.m < first:
        problem = f"M = {plan.m} is smaller than {first}, from where on it is the fastest"
    elif plan.n < MIN_ROWS:
        problem = f"N = {plan.n} is less than {MIN_ROWS}, from where on it is the fastest"
    if problem:
        raise NotImplementedError(f"held kernel: {problem}")


def search_space(plan: Plan) -> list[Config]:
    """The configurations that can run `plan`'s problem, likeliest first."""
    lift = plan.kind.name == "u4" and not plan.has_zero
    shapes = ((8, 2), (16, 4), (16, 2)) if plan.kind.name == "u4" else ((16, 4), (16, 2), (8, 2))
    ranked = [Config(warps, pieces, lift=lift) for warps, pieces in shapes]
    return [config for config in ranked if _legal(dataclasses.replace(plan, config=config))]


def heuristic(plan: Plan) -> Config:
    """The likeliest of them. Raises NotImplementedError when none can run it."""
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
