"""From an op's arguments in the "sm90" layout to one of the kernels: pads x, completes tables, picks a config."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import tuning
from pallas_kernels.a16 import decode_config, decode_sm90, fragments, wgmma_config, wgmma_sm90
from pallas_kernels.a16 import layout as layouts
from pallas_kernels.a16.dequant import KINDS
from pallas_kernels.a16.problem import DTYPES, Problem
from pallas_kernels.dispatch import current_device

KIND_OF = {"uint8": "s8", "int8": "s8", "float8_e4m3fn": "e4m3"}  # of 8-bit arrays; uint8 are stored as u - 128


@dataclasses.dataclass(frozen=True)
class Prepared:
    """Arrays as the kernels take them, and what is static about the product."""

    op: str
    x: jax.Array
    arrays: list[jax.Array]  # weight, scale and, where present, zero and offset
    problem: dict[str, Any]  # the fields of `Problem`
    n: int  # columns of the result before padding


def prepare(
    op: str,
    x: jax.Array,
    qweight: jax.Array,
    scale: jax.Array,
    zero: jax.Array | None,
    offset: jax.Array | None,
    perm: jax.Array | None,
    group_size: int,
    layout: str,
    four_bit: bool,
) -> Prepared:
    """Raises NotImplementedError with the reason when no kernel of this package takes the arguments."""
    found = layouts.parse(op, layout)
    if found is None:
        raise NotImplementedError("weights are in the canonical layout; bring them to the one of `preferred_layout`")
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"x is {x.dtype} (supported: bfloat16, float16)")
    if scale.dtype not in DTYPES:
        raise NotImplementedError(f"scales are {scale.dtype} (supported: bfloat16, float16, float32)")
    if offset is not None and offset.dtype != scale.dtype:
        offset = offset.astype(scale.dtype)
    kind = KINDS["u4" if four_bit else KIND_OF[qweight.dtype.name]]
    if zero is not None and (zero.dtype != qweight.dtype or kind.name == "e4m3"):
        raise NotImplementedError(f"zero points of {zero.dtype} for {qweight.dtype} weights (supported: both the same)")
    m, k = x.shape
    n = qweight.shape[0] * fragments.ROWS
    padded_k = qweight.shape[1] // (8 if four_bit else 16)
    if m == 0:
        raise NotImplementedError("M = 0: there is nothing to multiply")
    if perm is not None:
        x = jnp.take(x, perm, axis=1, unique_indices=True, mode="clip")
    if padded_k != k:
        x = jnp.pad(x, ((0, 0), (0, padded_k - k)))
    groups = layouts.groups_of(padded_k, k, group_size)
    one_zero = zero is None or zero.ndim == 2 or zero.shape[1] == 1
    in_epilogue = scale.ndim == 2 and offset is None and one_zero
    if in_epilogue:
        groups = 1
    complete = functools.partial(_complete, rows=n, groups=groups)
    arrays = [qweight, scale if in_epilogue else complete(scale)]
    arrays += [complete(a) for a in (zero, offset) if a is not None]
    problem = dict(
        m=m,
        n=n,
        k=padded_k,
        kind=kind,
        x_dtype=DTYPES[x.dtype],
        scale_dtype=DTYPES[scale.dtype],
        group=padded_k if groups == 1 else group_size,
        scales_in_epilogue=in_epilogue,
        one_scale=scale.shape == (1, 1),
        has_zero=zero is not None,
        has_offset=offset is not None,
        sms=current_device().core_count,
    )
    return Prepared(op, x, arrays, problem, found.n or n)


def _complete(table: jax.Array, rows: int, groups: int) -> jax.Array:
    """A [1, 1] or one-group table for every row and group. Rare: schemes mix one zero with group scales, say."""
    if table.ndim == 2:
        table = jnp.broadcast_to(table, (rows // 16, 1, 8, 2))
    return jnp.broadcast_to(table, (table.shape[0], groups, 8, 2))


_decode = jax.jit(decode_sm90.matmul, static_argnums=0)
_wgmma = jax.jit(wgmma_sm90.matmul, static_argnums=0)
_TRIED = 32  # candidates of a tuner, best estimates first


def decode(p: Prepared) -> jax.Array:
    """Small M. Raises NotImplementedError where the wgmma kernel is the better one, or for shapes it cannot take."""
    m = p.problem["m"]
    if m > decode_config.MAX_M:
        raise NotImplementedError(f"decode kernel: M = {m} is larger than {decode_config.MAX_M}")
    plan = decode_sm90.Plan(**p.problem, config=decode_sm90.Config())
    if m > 8:  # x of a large K leaves little shared memory for the weights, or must be cut over clusters
        mine, other = decode_config.best_estimate(plan), _wgmma_estimate(p)
        if other < mine:
            raise NotImplementedError(f"decode kernel: some {mine:.0f} us expected, of the wgmma kernel {other:.0f} us")
    config = tuning.choose(
        p.op,
        _key("decode", plan),
        heuristic=lambda: decode_config.heuristic(plan),
        space=lambda: decode_config.search_space(plan)[:_TRIED],
    )
    return _decode(dataclasses.replace(plan, config=config), p.x, *p.arrays)[:, : p.n]


def _wgmma_estimate(p: Prepared) -> float:
    return wgmma_config.best_estimate(wgmma_sm90.Plan(**p.problem, config=wgmma_sm90.Config()))


def wgmma(p: Prepared) -> jax.Array:
    """Any M. Raises NotImplementedError for shapes it cannot take."""
    plan = wgmma_sm90.Plan(**p.problem, config=wgmma_sm90.Config())
    config = tuning.choose(
        p.op,
        _key("wgmma", plan),
        heuristic=lambda: wgmma_config.heuristic(plan),
        space=lambda: wgmma_config.search_space(plan)[:_TRIED],
    )
    return _wgmma(dataclasses.replace(plan, config=config), p.x, *p.arrays)[:, : p.n]


def _key(kernel: str, plan: Problem) -> str:
    where = "row" if plan.scales_in_epilogue else plan.group
    zero = "int" if plan.has_zero else "offset" if plan.has_offset else "none"
    m = tuning.bucket(plan.m)
    return tuning.key(kernel=kernel, m=m, n=plan.n, k=plan.k, kind=plan.kind.name, group=where, zero=zero)
