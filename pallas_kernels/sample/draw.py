"""The draw among the tokens that are kept: the largest of scaled logit plus noise, of equals the first."""

from __future__ import annotations

from typing import Any

from pallas_kernels.sample.exchange import Place, best_of, slots_of, tell
from pallas_kernels.sample.noise import gumbel
from pallas_kernels.sample.problem import CAPACITY, THREADS, WARPS
from pallas_kernels.sample.row import Row

#: The noise is from -log(126 log 2) = -4.47 to 23 log 2 = 15.94: a token further below the maximum is never drawn.
_REACH = 20.5
_ROUNDING = 2.0**-20  # and more, by this share of the maximum, where the sum's rounding makes equals


def nobody(ops: Any) -> list[Any]:
    """[score as a key, token] that any token beats."""
    return [ops.const_i32(-(2**31)), ops.const_i32(2**31 - 1)]


def larger(ops: Any, best: list[Any], key: Any, token: Any) -> list[Any]:
    wins = ops.either(best[0] < key, ops.both(best[0].equals(key), token < best[1]))
    return [ops.select(wins, key, best[0]), ops.select(wins, token, best[1])]


def better(ops: Any, noise: tuple[Any, Any], x: Any, token: Any, best: list[Any]) -> list[Any]:
    return larger(ops, best, ops.sort_key(x + gumbel(ops, noise, token)), token)


def store(place: Place, token: Any, least: Any) -> None:
    place.ops.store_word("tokens", place.row, token)
    place.ops.store_word("thresholds", place.row, least)


def draw_from_all(place: Place, row: Row, threshold: Any, turn: Any) -> None:
    """threshold: as a key. Every block draws from its part; a warp of the first one compares."""
    ops = place.ops
    least = ops.max(ops.from_key(threshold), row.floor)
    size = ops.max(row.maximum, row.maximum * -1.0)
    noise = row.noise_key(ops)
    reached = ops.max(least, row.maximum - (size * _ROUNDING + _REACH))

    def one(i: Any, best: list[Any]) -> list[Any]:
        at = i * THREADS + place.thread  # not by fours: the noise alone is a hundred instructions
        x = ops.load_shared(ops.smem_base + at * 4)
        return ops.update(x >= reached, best, lambda: better(ops, noise, x, place.rank * place.p.slice + at, best))

    key, token = best_of(ops, *ops.loop(ops.unknown(place.p.loads * place.p.width), nobody(ops), one))
    tell(place, place.turn(turn), [key, token, token, token])
    ops.cluster_barrier()

    def compare() -> None:
        best = nobody(ops)
        for key, token, *_ in slots_of(place, place.turn(turn)):
            best = larger(ops, best, key, token)
        _, token = best_of(ops, *best)
        ops.when(place.lane.equals(0), lambda: store(place, token, least))

    ops.when(ops.same(place.slot.equals(0)), compare)


def draw_from_few(place: Place, row: Row, count: Any, threshold: Any) -> None:
    """The first block draws from `count` candidates (see `candidates`)."""
    ops, nothing = place.ops, place.ops.const_i32(0)
    least = ops.max(ops.from_key(threshold), row.floor)
    noise = row.noise_key(ops)

    def one(i: Any, best: list[Any]) -> list[Any]:
        index = i * THREADS + place.thread
        at = place.shared(place.p.keys) + ops.select(index < count, index, nothing) * 4
        x = ops.from_key(ops.load_shared_word(at))
        token = ops.load_shared_word(at + 2 * CAPACITY * 4)
        keep = ops.both(index < count, x >= least)
        return ops.update(keep, best, lambda: better(ops, noise, x, token, best))

    key, token = best_of(ops, *ops.loop((count + (THREADS - 1)) // THREADS, nobody(ops), one))
    told = place.shared(place.p.rounds)

    def tell_block() -> None:
        ops.store_shared_word(told + place.warp * 8, key)
        ops.store_shared_word(told + place.warp * 8 + 4, token)

    ops.when(place.lane.equals(0), tell_block)
    ops.barrier()

    def compare() -> None:
        at = told + (place.lane & (WARPS - 1)) * 8
        _, token = best_of(ops, ops.load_shared_word(at), ops.load_shared_word(at + 4))
        ops.when(place.lane.equals(0), lambda: store(place, token, least))

    ops.when(ops.same(place.warp.equals(0)), compare)
