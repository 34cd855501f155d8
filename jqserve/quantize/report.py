"""How much of each Linear is left: a row of numbers, for the screen and for jqserve_quantize.json."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from jqserve.checkpoint.names import LinearSlot
from jqserve.quantize.awq import lost
from jqserve.quantize.host import Kept, fetch


@dataclasses.dataclass(frozen=True)
class LinearReport:
    """weight_db: 10 log10(|W|^2 / |W - Wq|^2). output_db: the same of the outputs over the calibration data (as the
    scaled weight sees them), None without. Infinite ratios are 999."""

    name: str
    shape: tuple[int, int]
    bits: int
    weight_db: float
    output_db: float | None
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(data: dict[str, Any]) -> LinearReport:
        return LinearReport(**{**data, "shape": tuple(data["shape"])})


def decibels(signal: float, noise: float) -> float:
    """10 log10(signal / noise), held to +-999."""
    if noise <= 0:
        return 999.0
    return 999.0 if signal <= 0 else round(min(999.0, max(-999.0, 10 * math.log10(signal / noise))), 3)


def linear_report(
    slot: LinearSlot, weight: jax.Array, left: jax.Array, hessian: Kept | None, bits: int, note: str
) -> LinearReport:
    """weight, left float32 [N, K]: before and after."""
    if not bool(jnp.any(weight)):
        note = f"{note}; all weights are zero".lstrip("; ")
    signal, noise = float(jnp.sum(weight**2)), float(jnp.sum((weight - left) ** 2))
    output = None
    if hessian is not None:
        second = fetch(hessian)
        whole, error = lost(weight, jnp.zeros_like(weight), second), lost(weight, left, second)
        output = decibels(float(whole.sum()), float(error.sum()))
    return LinearReport(slot.name, (slot.n, slot.k), bits, decibels(signal, noise), output, note)
