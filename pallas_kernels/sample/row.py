"""What every thread of a cluster knows of its row once the maximum and the sums are exchanged."""

from __future__ import annotations

import dataclasses
from typing import Any

from pallas_kernels.sample.exchange import Place
from pallas_kernels.sample.noise import fold_in
from pallas_kernels.sample.reference import LEAST_MIN_P

LOG2_E = 1.4426950408889634


@dataclasses.dataclass(frozen=True)
class Row:
    """x are the scaled logits; keys are integers in their order."""

    maximum: Any  # of x
    bottom: Any  # below every x
    mass: Any  # the sum of e^(x - maximum)
    top_k: Any
    by_count: Any  # whether top_k cuts anything
    top_p: Any
    by_mass: Any  # whether top_p does
    floor: Any  # min_p's threshold, `bottom` where there is none
    by_floor: Any
    seed: tuple[Any, Any]
    position: Any

    def weight(self, ops: Any, x: Any) -> Any:
        return ops.exp2((x - self.maximum) * LOG2_E)

    def noise_key(self, ops: Any) -> tuple[Any, Any]:
        """Computed where it is used: what follows from it would fill registers all the way there."""
        return fold_in(ops, self.seed, self.position)


def row_of(place: Place, maximum: Any, bottom: Any, mass: Any) -> Row:
    ops = place.ops
    top_k, position = (ops.load_word(name, place.row) for name in ("top_k", "position"))
    top_p, min_p = (ops.load_float(name, place.row) for name in ("top_p", "min_p"))
    by_floor = ops.const_f32(0.0) < min_p
    floor = maximum + ops.log(ops.max(min_p, ops.const_f32(LEAST_MIN_P)))
    return Row(
        maximum=maximum,
        bottom=bottom,
        mass=mass,
        top_k=top_k,
        by_count=ops.both(top_k >= 1, top_k < place.p.vocabulary),
        top_p=top_p,
        by_mass=top_p < 1.0,
        floor=ops.select(by_floor, floor, bottom),
        by_floor=by_floor,
        seed=(ops.load_word("seed", place.row * 2), ops.load_word("seed", place.row * 2 + 1)),
        position=position,
    )


def scaling(ops: Any, temperature: Any) -> Any:
    """x -> x / temperature, rounded once: with r = 1 / temperature and q = x * r, the quotient is q + (x - q *
    temperature) * r, the remainder exact (Markstein, IBM J. Res. Dev. 34(1), 1990)."""
    reciprocal = ops.divide(ops.const_f32(1.0), temperature)
    negative = temperature * -1.0

    def scale(x: Any) -> Any:
        quotient = x * reciprocal
        return ops.fma(ops.fma(quotient, negative, x), reciprocal, quotient)

    return scale
