"""The tokens that are left when the search over the row ends, and the threshold among them, by one of the blocks.

A round of the search finds four bits: warp w takes the pivot of digit w, and sums what is above it. The candidates lie
in an order that the row alone decides, and so do the sums.
"""

from __future__ import annotations

from typing import Any

from pallas_kernels.sample.exchange import Place, each_load, tell, warp_sum
from pallas_kernels.sample.narrow import Narrowed
from pallas_kernels.sample.problem import CAPACITY, ROUND, WARPS
from pallas_kernels.sample.row import Row

_DIGIT = 4  # bits; 2^_DIGIT = WARPS


def gather(place: Place, row: Row, narrowed: Narrowed) -> Any:
    """Every thread writes its candidates (key, weight, token) to the first block. Returns how many there are."""
    ops = place.ops
    turn, nothing = narrowed.turn, place.ops.const_i32(0)
    least = ops.from_key(narrowed.least)
    beyond = ops.select(narrowed.between, ops.from_key(narrowed.limit), ops.const_f32(float("inf")))

    def inside(x: Any) -> Any:
        return ops.both(x >= least, x < beyond)

    def add(token: Any, values: list[Any], carry: list[Any]) -> list[Any]:
        total = carry[0]
        for x in values:
            total = total + ops.select(inside(x), ops.const_i32(1), nothing)
        return [total]

    (mine,) = each_load(place, [nothing], add)

    def told_anew() -> list[Any]:
        """The last pass told the numbers above `least` alone."""
        tell(place, place.turn(turn), [ops.warp_add(mine), nothing, nothing, nothing])
        ops.cluster_barrier()
        return [place.turn(turn)]

    last_pass = place.turn(ops.const_i32(1) - turn) + narrowed.pivot * 4
    (told,) = ops.update(narrowed.between, [last_pass], told_anew)
    before = nothing
    for i in range(4):
        slot = place.lane + 32 * i
        before = before + ops.select(slot < place.slot, ops.load_shared_word(told + slot * 16), nothing)
    upto = mine
    for distance in (1, 2, 4, 8, 16):
        lower = ops.shuffle_up(upto, distance)
        upto = ops.select(place.lane >= distance, upto + lower, upto)
    there = ops.peer_address(place.shared(place.p.keys), nothing)

    def write(token: Any, values: list[Any], carry: list[Any]) -> list[Any]:
        for i, x in enumerate(values):

            def put(i: int = i, x: Any = x, at: Any = carry[0]) -> list[Any]:
                for array, word in enumerate((ops.sort_key(x), row.weight(ops, x), token + i)):
                    ops.store_peer(there + at * 4 + array * CAPACITY * 4, [word])
                return [at + 1]

            carry = ops.update(inside(x), carry, put)
        return carry

    each_load(place, [ops.warp_add(before) + upto - mine], write)
    return ops.select(narrowed.between, narrowed.count - narrowed.above_count, narrowed.count)


def threshold(place: Place, row: Row, narrowed: Narrowed, count: Any) -> Any:
    """As a key, min-p's apart; by the first block alone, behind a cluster barrier."""
    ops = place.ops
    keys = place.shared(place.p.keys)
    span = ops.select(narrowed.between, narrowed.limit, ops.sort_key(row.maximum)) - narrowed.least
    rounds = (ops.bit_length(span) + (_DIGIT - 1)) // _DIGIT
    nothing, zero = ops.const_i32(0), ops.const_f32(0.0)
    above_count = ops.select(narrowed.between, ops.to_float(narrowed.above_count), zero)
    above_mass = ops.select(narrowed.between, narrowed.above_mass, zero)

    def above(pivot: Any, *, counted: bool) -> Any:
        """The sum of the weights, or the number, of the candidates whose distance from `least` is pivot or more."""

        def one(i: Any, carry: list[Any]) -> list[Any]:
            index = i * 32 + place.lane
            key = ops.load_shared_word(keys + index * 4)
            weight = ops.const_f32(1.0) if counted else ops.load_shared(keys + index * 4 + CAPACITY * 4)
            outside = ops.either(index >= count, ops.below(key - narrowed.least, pivot))
            return [carry[0] + ops.select(outside, zero, weight)]

        (total,) = ops.loop((count + 31) // 32, [zero], one)
        return (above_count if counted else above_mass) + warp_sum(ops, total)

    def search(rounds: Any, wanted: Any, *, counted: bool) -> Any:
        """The greatest distance that keeps `wanted`."""

        def one(i: Any, carry: list[Any]) -> list[Any]:
            shift = (rounds - 1 - i) * _DIGIT
            total = above(carry[0] + (place.warp << shift), counted=counted)
            told = place.shared(place.p.rounds) + (i & 1) * ROUND
            ops.when(place.lane.equals(0), lambda: ops.store_shared_floats(told + place.warp * 8, [total]))
            ops.barrier()
            digit = place.lane & (WARPS - 1)
            enough = ops.either(digit.equals(0), ops.load_shared(told + digit * 8) >= wanted)
            return [carry[0] + ((ops.bit_length(ops.ballot(enough) & (2**WARPS - 1)) - 1) << shift)]

        (found,) = ops.loop(rounds, [nothing], one)
        ops.barrier()  # the slots of the rounds are free again
        return found

    by_count = search(ops.select(narrowed.counting, rounds, nothing), ops.to_float(row.top_k), counted=True)
    kept = row.top_p * above(by_count, counted=False)
    wanted = ops.select(narrowed.counting, kept, narrowed.wanted_mass)
    by_mass = search(ops.select(row.by_mass, rounds, nothing), wanted, counted=False)
    return narrowed.least + ops.select(ops.below(by_count, by_mass), by_mass, by_count)
