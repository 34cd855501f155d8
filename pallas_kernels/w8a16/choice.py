"""Which implementation of w8a16_matmul runs where: layouts by name, and what each takes, without jax."""

from __future__ import annotations

from pallas_kernels.a16 import choice
from pallas_kernels.a16 import layout as sm90
from pallas_kernels.a16.problem import Problem
from pallas_kernels.dispatch import Device, Shaped, current_device

OP = "w8a16_matmul"


def preferred_layout(n: int, k: int, group_size: int, zero_kind: str, device: Device | None = None) -> str:
    """The layout to convert a [n, k] weight to on `device` (default: the current one).

    zero_kind: "none" or "int" (integer zero points).
    """
    if zero_kind not in ("none", "int"):
        raise ValueError(f"zero_kind must be 'none' or 'int', got {zero_kind!r}")
    return sm90.preferred(n, k, group_size, device or current_device())


def parse(layout: str) -> sm90.Layout | None:
    """None for "canonical". Raises ValueError for an unknown name."""
    return sm90.parse(OP, layout)


def problem(
    x: Shaped,
    qweight: Shaped,
    scale: Shaped,
    zero: Shaped | None = None,
    *,
    perm: Shaped | None = None,
    group_size: int,
    layout: str = "canonical",
) -> Problem:
    """The product, from the op's own arguments. Raises NotImplementedError for what no kernel takes."""
    return choice.problem_of(OP, x, qweight, scale, zero, None, group_size, layout, four_bit=False)


CANDIDATES = choice.candidates(OP, problem)
