"""Lowering the number of tokens that may hold the threshold: a search over all of the row, by all of its cluster.

`least` is a key at which enough is kept (top_k tokens, or top_p of the mass) and `limit` one at which it is not. A pass
counts and weighs the tokens above three pivots at once. It ends when at most CAPACITY tokens are above `least`, or
between `least` and `limit`; or, with equal tokens, when `limit` is the key after `least`, which then is the threshold.
The first pivots are such that it nearly always ends there:

  top-k  the k-th largest of the cluster's 128 warps' maxima, k <= 128, has k tokens above it, and seldom 4 k
  top-p  V tokens that weigh (1 - p) S / V each are (1 - p) S together, so that lower ones may all go: the lowest pivot
         is enough for certain; two higher ones are for distributions with too many tokens above that
  min-p  known
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from pallas_kernels.sample.exchange import Place, each_load, slots_of, summed, tell, warp_sum
from pallas_kernels.sample.problem import CAPACITY, PLANE, SLOTS
from pallas_kernels.sample.row import Row

_MARGIN = 0.01  # of the certain pivot, in nats: more than the sums' rounding
_NEARER = (0.7, 0.45)  # the other two's distance from the maximum, as a share of its
_BLIND = (24.0, 12.0, 6.0)  # nats below the maximum, where the maxima say nothing
_GUESS_BITS = 12
_FAR = 2**24  # keys apart: floats in more than two octaves


@dataclasses.dataclass(frozen=True)
class Narrowed:
    """complete: at most CAPACITY tokens are at `least` or above. between: so many are below `limit`, and those above it
    are all kept. Neither: `least` is the threshold, but for min-p's."""

    complete: Any
    between: Any
    least: Any  # keys
    limit: Any
    count: Any  # of the tokens at `least` or above
    above_count: Any  # of those at `limit` or above, and their mass
    above_mass: Any
    pivot: Any  # 0, 1 or 2: which one of the last pass `least` was, where complete
    counting: Any  # whether top-k is still to be applied to them; else top-p, where asked, which then wants:
    wanted_mass: Any
    turn: Any  # of the slots, the one to write next


def narrow(place: Place, row: Row, maxima: list[Any], scale: Callable[[Any], Any], raw_top: Any) -> Narrowed:
    """maxima: this lane's four warps' largest logits, as keys, before the temperature; raw_top: the largest of them."""
    ops = place.ops
    bottom, top = ops.sort_key(row.bottom), ops.sort_key(row.maximum)
    only_floor = ops.both(row.by_floor, ops.either(row.by_count, row.by_mass).equals(False))
    counting = ops.either(row.by_count, only_floor)
    wanted_count = ops.select(row.by_count, row.top_k, ops.const_i32(1))
    beyond = ops.select(only_floor, ops.sort_key(row.floor) + 1, top + 1)
    pivots = []
    blind = ops.const_i32(SLOTS) < row.top_k
    guessing = ops.same(ops.both(row.by_count, blind.equals(False)))
    (guess,) = ops.update(guessing, [raw_top], lambda: [_guess(ops, maxima, raw_top, row.top_k)])
    guess = scale(ops.from_key(guess))
    for x, distance in zip(_certain(place, row), _BLIND):
        x = ops.select(row.by_count, ops.select(blind, row.maximum - distance, guess), x)
        key = ops.sort_key(ops.select(only_floor, row.floor, x))
        key = ops.select(key < bottom + 1, bottom + 1, key)
        pivots.append(ops.select(top < key, top, key))

    def one(carry: list[Any]) -> list[Any]:
        _, least, limit, count, mass, above_count, above_mass, counting, wanted, pivot, turn, *pivots = carry
        counts, masses = _weigh(place, row, pivots, turn)
        for i, key in enumerate(pivots):
            enough = either_of(ops, counting, counts[i] >= wanted_count, masses[i] >= wanted)
            higher = ops.both(enough, key >= least)
            lower = ops.both(enough.equals(False), key < limit)
            here = (key, counts[i], masses[i])
            least, count, mass = (ops.select(higher, a, b) for a, b in zip(here, (least, count, mass)))
            pivot = ops.select(higher, ops.const_i32(i), pivot)
            above = (limit, above_count, above_mass)
            limit, above_count, above_mass = (ops.select(lower, a, b) for a, b in zip(here, above))
        # The threshold of top-k, and too many tokens at it: on to that of top-p.
        many, closed = ops.const_i32(CAPACITY) < count, ops.below(limit - least, 2)
        on = ops.both(ops.both(closed, many), ops.both(counting, row.by_mass))
        counting = ops.both(counting, on.equals(False))
        wanted = ops.select(on, row.top_p * mass, wanted)
        limit = ops.select(on, top + 1, limit)
        above_count = ops.select(on, nothing, above_count)
        above_mass = ops.select(on, ops.const_f32(0.0), above_mass)

        ends = ops.either(many.equals(False), ops.below(limit - least, 2))
        ends = ops.either(ends, few_between(count, above_count, counting))
        following = _between(ops, least, limit, ops.both(turn.equals(1), ops.below(limit - least, _FAR).equals(False)))
        go = ops.select(ends, nothing, ops.const_i32(1))
        return [
            go, least, limit, count, mass, above_count, above_mass, counting, wanted, pivot, ops.const_i32(1) - turn,
            *following,
        ]  # fmt: skip

    def few_between(count: Any, above_count: Any, counting: Any) -> Any:
        """With both cuts asked the tokens above count too: top-p's may lie there."""
        few = (count - above_count) < CAPACITY + 1
        return ops.both(few, ops.both(counting, row.by_mass).equals(False))

    nothing = ops.const_i32(0)
    start = [
        nothing, bottom, beyond, ops.const_i32(place.p.vocabulary), row.mass, nothing, ops.const_f32(0.0), counting,
        row.top_p * row.mass, nothing, ops.const_i32(1), *pivots,
    ]  # fmt: skip
    asked = ops.same(ops.either(counting, row.by_mass))
    _, least, limit, count, _, above_count, above_mass, counting, wanted, pivot, turn, *_ = ops.update(
        asked, start, lambda: ops.repeat(start, one)
    )
    complete = ops.both(asked, count < CAPACITY + 1)
    between = ops.both(ops.both(asked, complete.equals(False)), few_between(count, above_count, counting))
    return Narrowed(
        complete=ops.same(complete),
        between=ops.same(between),
        least=least,
        limit=limit,
        count=count,
        above_count=above_count,
        above_mass=above_mass,
        pivot=pivot,
        counting=ops.both(counting, row.by_count),
        wanted_mass=wanted,
        turn=turn,
    )


def either_of(ops: Any, first: Any, a: Any, b: Any) -> Any:
    """a where `first`, else b; conditions."""
    return ops.either(ops.both(first, a), ops.both(first.equals(False), b))


def _between(ops: Any, least: Any, limit: Any, by_value: Any) -> list[Any]:
    """Three keys at even distances between two, rising, or as many as there are. `by_value`: where their floats are at
    even distances; of all floats half are between -1 and 1. That halves the tokens and not the keys, and need not end.
    """
    first, last = ops.from_key(least), ops.from_key(limit)
    gap = limit - least
    quarter = gap >> 2
    quarter = ops.select(quarter.equals(0), ops.const_i32(1), quarter)
    keys: list[Any] = []
    for i in (1, 2, 3):
        key = ops.select(by_value, ops.sort_key(first + (last - first) * (i / 4)), least + quarter * i)
        inside = ops.both(ops.below(key - least, gap), key.equals(least).equals(False))
        keys.append(ops.select(inside, key, keys[-1] if keys else least + 1))
    return keys


def _certain(place: Place, row: Row) -> list[Any]:
    """top-p's first pivots, rising."""
    ops = place.ops
    share = (ops.const_f32(1.0) - row.top_p) * row.mass * (1.0 / place.p.vocabulary)
    distance = ops.log(share)
    return [row.maximum + distance - _MARGIN, *(row.maximum + distance * part for part in _NEARER)]


def _guess(ops: Any, maxima: list[Any], top: Any, k: Any) -> Any:
    """A key with k of the cluster's maxima above it, and not much lower than the k-th: bit by bit, by its distance from
    the largest, of which the upper bits do."""
    gaps = [top - key for key in maxima]
    widest = gaps[0]
    for gap in gaps[1:]:
        widest = ops.select(ops.below(widest, gap), gap, widest)
    for distance in (16, 8, 4, 2, 1):
        other = ops.shuffle_xor(widest, distance)
        widest = ops.select(ops.below(widest, other), other, widest)
    bits = ops.bit_length(widest)
    skipped = ops.max_int(bits - _GUESS_BITS, 0)

    def one(i: Any, carry: list[Any]) -> list[Any]:
        # The upper bits of the least gap that k of the maxima stay below, all lower bits taken as ones.
        bit = ops.const_i32(1) << (skipped + (_GUESS_BITS - 1) - i)
        reach = carry[0] + (bit - 1)
        within = ops.const_i32(0)
        for gap in gaps:
            within = within + ops.select(ops.below(reach, gap), ops.const_i32(0), ops.const_i32(1))
        return [ops.select(ops.warp_add(within) >= k, carry[0], carry[0] + bit)]

    (gap,) = ops.loop(ops.unknown(_GUESS_BITS), [ops.const_i32(0)], one)
    return top - (gap + ((ops.const_i32(1) << skipped) - 1))


def _weigh(place: Place, row: Row, pivots: list[Any], turn: Any) -> tuple[list[Any], list[Any]]:
    """How many tokens are at each pivot (rising) or above, and their weights' sum."""
    ops = place.ops
    levels = [ops.from_key(key) for key in pivots]

    def one(token: Any, values: list[Any], carry: list[Any]) -> list[Any]:
        largest = values[0]
        for x in values[1:]:
            largest = ops.max(largest, x)

        def add() -> list[Any]:
            sums = list(carry)
            for x in values:
                weight = row.weight(ops, x)
                for i, level in enumerate(levels):
                    sums[i] = sums[i] + ops.select(x >= level, ops.const_i32(1), ops.const_i32(0))
                    sums[3 + i] = sums[3 + i] + ops.select(x >= level, weight, ops.const_f32(0.0))
            return sums

        return ops.update(largest >= levels[0], carry, add)

    sums = each_load(place, [ops.const_i32(0)] * 3 + [ops.const_f32(0.0)] * 3, one)
    counts = [ops.warp_add(x) for x in sums[:3]]
    masses = [warp_sum(ops, x) for x in sums[3:]]
    tell(place, place.turn(turn), [*counts, counts[2]])
    tell(place, place.turn(turn) + PLANE, [*masses, masses[2]])
    ops.cluster_barrier()
    slots = slots_of(place, place.turn(turn))
    counts = [summed(ops, slots, word, floats=False) for word in range(3)]
    slots = slots_of(place, place.turn(turn) + PLANE)  # not earlier: they are 16 registers
    return counts, [summed(ops, slots, word, floats=True) for word in range(3)]
