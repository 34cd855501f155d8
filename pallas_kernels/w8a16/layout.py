"""Canonical arrays <-> the arrays that kernels read. Every layout keeps N as the first axis.

canonical: qweight [N, K] int8 | uint8 | float8_e4m3fn, scale [N, G], [N, 1] or [1, 1], zero like scale or None.
"""

from __future__ import annotations

import jax

from pallas_kernels.dispatch import Device, current_device

LAYOUTS = ("canonical",)
Arrays = tuple[jax.Array, jax.Array, jax.Array | None]


def preferred_layout(n: int, k: int, group_size: int, zero_kind: str, device: Device | None = None) -> str:
    """The layout to convert a [n, k] weight to on `device` (default: the current one).

    zero_kind: "none" or "int" (integer zero points).
    """
    if zero_kind not in ("none", "int"):
        raise ValueError(f"zero_kind must be 'none' or 'int', got {zero_kind!r}")
    del n, k, group_size
    device = device or current_device()
    return "canonical"


def _known(layout: str) -> None:
    if layout not in LAYOUTS:
        raise ValueError(f"unknown w8a16 layout {layout!r}; known: {', '.join(LAYOUTS)}")


def to_layout(qweight: jax.Array, scale: jax.Array, zero: jax.Array | None, layout: str, group_size: int) -> Arrays:
    """Canonical (qweight, scale, zero) -> the same three in `layout`."""
    del group_size
    _known(layout)
    return qweight, scale, zero


def from_layout(qweight: jax.Array, scale: jax.Array, zero: jax.Array | None, layout: str, group_size: int) -> Arrays:
    """The bit-exact inverse of `to_layout`."""
    del group_size
    _known(layout)
    return qweight, scale, zero
