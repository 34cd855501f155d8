"""Canonical arrays <-> the arrays that kernels read. Every layout keeps N as the first axis.

canonical: qweight uint8 [N, K/2] (low nibble = even k), scale [N, G], zero uint8 [N, G] or None, offset [N, G] or None.
"""

from __future__ import annotations

import jax

from pallas_kernels.dispatch import Device, current_device

LAYOUTS = ("canonical",)
Arrays = tuple[jax.Array, jax.Array, jax.Array | None, jax.Array | None]


def preferred_layout(n: int, k: int, group_size: int, zero_kind: str, device: Device | None = None) -> str:
    """The layout to convert a [n, k] weight to on `device` (default: the current one).

    zero_kind: "none" (symmetric), "int" (integer zero points) or "offset" (float offset).
    """
    if zero_kind not in ("none", "int", "offset"):
        raise ValueError(f"zero_kind must be 'none', 'int' or 'offset', got {zero_kind!r}")
    del n, k, group_size
    device = device or current_device()
    return "canonical"


def _known(layout: str) -> None:
    if layout not in LAYOUTS:
        raise ValueError(f"unknown w4a16 layout {layout!r}; known: {', '.join(LAYOUTS)}")


def to_layout(
    qweight: jax.Array,
    scale: jax.Array,
    zero: jax.Array | None,
    offset: jax.Array | None,
    layout: str,
    group_size: int,
) -> Arrays:
    """Canonical (qweight, scale, zero, offset) -> the same four in `layout`."""
    del group_size
    _known(layout)
    return qweight, scale, zero, offset


def from_layout(
    qweight: jax.Array,
    scale: jax.Array,
    zero: jax.Array | None,
    offset: jax.Array | None,
    layout: str,
    group_size: int,
) -> Arrays:
    """The bit-exact inverse of `to_layout`."""
    del group_size
    _known(layout)
    return qweight, scale, zero, offset
