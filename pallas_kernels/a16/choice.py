"""Which of the three kernels takes a product, and how: from shapes, dtypes and the device, without jax.

`run` asks when an op is traced, `jqserve plan` where there is no device: the answer is the same because it is one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from pallas_kernels import tuning
from pallas_kernels.a16 import decode_config, decode_plan, held_config, held_plan, wgmma_config, wgmma_plan
from pallas_kernels.a16 import layout as layouts
from pallas_kernels.a16.problem import DTYPES, Problem
from pallas_kernels.a16.stored import KIND_OF, KINDS, ROWS
from pallas_kernels.dispatch import Candidate, Operand, Shaped, current_device, hopper_only

X_DTYPES = ("bfloat16", "float16")
_TRIED = 32  # candidates of a tuner, best estimates first


def packed(
    shape: tuple[int, int],
    group_size: int,
    layout: str,
    qweight: str,
    scale: Operand,
    zero: Operand | None,
    offset: Operand | None,
) -> tuple[Operand, Operand, Operand | None, Operand | None]:
    """What `to_layout` makes of canonical operands in the "sm90" layout: their shapes; dtypes stay.

    shape: [N, K] of the weight; qweight: its stored dtype, two values a byte where that is "uint4".
    """
    rows, columns = layouts.padded_shape(*shape, group_size)
    groups = layouts.groups_of(columns, shape[1], group_size)
    width = 8 if qweight == "uint4" else 16  # bytes of 16 rows' values of one k

    def table(a: Operand | None) -> Operand | None:
        return None if a is None else Operand(layouts.table_shape(a.shape, rows, groups), a.dtype)

    return (
        Operand((rows // ROWS, width * columns), "uint8" if qweight == "uint4" else qweight),
        Operand(layouts.scale_shape(scale.shape, rows, groups, offset is not None), scale.dtype),
        table(zero),
        table(offset),
    )


def problem_of(
    op: str,
    x: Shaped,
    qweight: Shaped,
    scale: Shaped,
    zero: Shaped | None,
    offset: Shaped | None,
    group_size: int,
    layout: str,
    four_bit: bool,
) -> Problem:
    """The product that the kernels would compute. Raises NotImplementedError with the reason when neither takes it."""
    if layouts.parse(op, layout) is None:
        raise NotImplementedError("weights are in the canonical layout; bring them to the one of `preferred_layout`")
    x_dtype, scale_dtype, stored = str(x.dtype), str(scale.dtype), str(qweight.dtype)
    if x_dtype not in X_DTYPES:
        raise NotImplementedError(f"x is {x_dtype} (supported: bfloat16, float16)")
    if scale_dtype not in DTYPES:
        raise NotImplementedError(f"scales are {scale_dtype} (supported: bfloat16, float16, float32)")
    kind = KINDS["u4" if four_bit else KIND_OF[stored]]
    if zero is not None and (str(zero.dtype) != stored or kind.name == "e4m3"):
        raise NotImplementedError(f"zero points of {zero.dtype} for {stored} weights (supported: both the same)")
    (m, k), padded_k = x.shape, qweight.shape[1] // (8 if four_bit else 16)
    if m == 0:
        raise NotImplementedError("M = 0: there is nothing to multiply")
    one_zero = zero is None or len(zero.shape) == 2 or zero.shape[1] == 1
    in_epilogue = len(scale.shape) == 2 and offset is None and one_zero
    groups = 1 if in_epilogue else layouts.groups_of(padded_k, k, group_size)
    return Problem(
        m=m,
        n=qweight.shape[0] * ROWS,
        k=padded_k,
        kind=kind,
        x_dtype=DTYPES[x_dtype],
        scale_dtype=DTYPES[scale_dtype],
        group=padded_k if groups == 1 else group_size,
        scales_in_epilogue=in_epilogue,
        one_scale=tuple(scale.shape) == (1, 1),
        has_zero=zero is not None,
        has_offset=offset is not None,
        sms=current_device().core_count,
    )


def held(op: str, problem: Problem) -> held_plan.Plan:
    """Small M, many rows of W. Raises NotImplementedError where another is better, or for what it cannot take."""
    plan = held_plan.Plan(**vars(problem), config=held_plan.Config())
    held_config.check_faster(plan)
    return _configured(op, "held", plan, held_config)


def decode(op: str, problem: Problem) -> decode_plan.Plan:
    """Small M. Raises NotImplementedError where the wgmma kernel is the better one, or for shapes it cannot take."""
    if problem.m > decode_config.MAX_M:
        raise NotImplementedError(f"decode kernel: M = {problem.m} is larger than {decode_config.MAX_M}")
    plan = decode_plan.Plan(**vars(problem), config=decode_plan.Config())
    if problem.m > 8:  # x of a large K leaves little shared memory for the weights, or must be cut over clusters
        mine, rival = decode_config.best_estimate(plan), wgmma_plan.Plan(**vars(problem), config=wgmma_plan.Config())
        other = wgmma_config.best_estimate(rival)
        if any(config.k_groups > 1 for config in wgmma_config.search_space(rival)[:1]):
            # M = 16, 4 bits, an H100: qkv 10.7 us here and 9.0 there, o 8.2 and 7.5
            raise NotImplementedError("decode kernel: for few rows of W two warpgroups of the wgmma kernel share them")
        if other < mine:
            raise NotImplementedError(f"decode kernel: some {mine:.0f} us expected, of the wgmma kernel {other:.0f} us")
    return _configured(op, "decode", plan, decode_config)


def wgmma(op: str, problem: Problem) -> wgmma_plan.Plan:
    """Any M. Raises NotImplementedError for shapes it cannot take."""
    return _configured(op, "wgmma", wgmma_plan.Plan(**vars(problem), config=wgmma_plan.Config()), wgmma_config)


def _configured[Plan: (held_plan.Plan, decode_plan.Plan, wgmma_plan.Plan)](
    op: str, kernel: str, plan: Plan, configs: Any
) -> Plan:
    """The plan with the config that was tuned for it, or else that of the kernel's heuristic (its module `configs`).
    Raises NotImplementedError for shapes that it cannot take."""
    config = tuning.choose(
        op,
        _key(kernel, plan),
        heuristic=lambda: configs.heuristic(plan),
        space=lambda: configs.search_space(plan)[:_TRIED],
        check=lambda config: dataclasses.replace(plan, config=config).check(),
    )
    chosen = dataclasses.replace(plan, config=config)
    chosen.check()
    return chosen


def candidates(op: str, problem: Callable[..., Problem]) -> tuple[Candidate, ...]:
    """The ways of an op, first choice first. problem: from the op's own arguments."""
    return (
        Candidate("held_sm90", hopper_only, lambda *args, **kwargs: held(op, problem(*args, **kwargs))),
        Candidate("decode_sm90", hopper_only, lambda *args, **kwargs: decode(op, problem(*args, **kwargs))),
        Candidate("wgmma_sm90", hopper_only, lambda *args, **kwargs: wgmma(op, problem(*args, **kwargs))),
        Candidate("xla"),
    )


def _key(kernel: str, plan: Problem) -> str:
    where = "row" if plan.scales_in_epilogue else plan.group
    zero = "int" if plan.has_zero else "offset" if plan.has_offset else "none"
    m = tuning.bucket(plan.m)
    return tuning.key(kernel=kernel, m=m, n=plan.n, k=plan.k, kind=plan.kind.name, group=where, zero=zero)
