"""The kernel as a program of one thread: a row's logits in, its next token out. numpy can run it too.

A cluster of eight blocks takes a row: 128,256 logits are 32 a thread, read once; every later look at them is at
registers or shared memory. Two exchanges give the maximum and the sums; `narrow` finds a lower bound of the threshold
with at most CAPACITY tokens above it, nearly always in one more; the first block takes those over (`candidates`) and
ends alone. Where the nucleus itself is larger, it finds the threshold among those between two bounds, and all blocks
draw.
"""

from __future__ import annotations

from typing import Any

from pallas_kernels.sample.candidates import gather, threshold
from pallas_kernels.sample.draw import draw_from_all, draw_from_few, store
from pallas_kernels.sample.exchange import Place, each_load, slots_of, summed, tell, warp_sum
from pallas_kernels.sample.narrow import narrow
from pallas_kernels.sample.problem import BOTTOM, CLUSTER, FLOOR, IN_FLIGHT, PAD, THREADS
from pallas_kernels.sample.reference import LEAST_TEMPERATURE
from pallas_kernels.sample.row import LOG2_E, row_of, scaling

_INFINITY = 0x7F800000  # as a key; NaNs are above


def sample_row(place: Place) -> None:
    """Writes tokens[row], totals[row] and thresholds[row]."""
    ops, p = place.ops, place.p
    largest = _load(place)
    tell(place, place.shared(p.maxima), [ops.warp_max(ops.sort_key(largest))])
    temperature = ops.load_float("temperature", place.row)
    ops.cluster_barrier()
    maxima = ops.load_shared_words(place.shared(p.maxima) + place.lane * 16)
    raw_top = maxima[0]
    for other in maxima[1:]:
        raw_top = ops.select(raw_top < other, other, raw_top)
    raw_top = ops.warp_max(raw_top)
    raw_maximum = ops.from_key(raw_top)
    masked = raw_maximum < FLOOR * 0.999
    greedy = ops.either(ops.either(raw_top >= _INFINITY, masked), temperature < LEAST_TEMPERATURE)
    scale = scaling(ops, ops.select(greedy, ops.const_f32(1.0), temperature))
    maximum = scale(raw_maximum)

    def add(token: Any, values: list[Any], carry: list[Any]) -> tuple[list[Any], list[Any]]:
        total, mass, first = carry
        scaled = []
        for i, v in enumerate(values):
            first = ops.select(ops.both(v.equals(raw_maximum), token + i < first), token + i, first)
            total = total + ops.exp2((v - raw_maximum) * LOG2_E)
            scaled.append(scale(v))
            mass = mass + ops.exp2((scaled[-1] - maximum) * LOG2_E)
        return [total, mass, first], scaled

    total, mass, first = ops.const_f32(0.0), ops.const_f32(0.0), ops.const_i32(2**31 - 1)
    total, mass, first = each_load(place, [total, mass, first], add, written=True)
    first = ops.warp_min(first)
    tell(place, place.turn(ops.const_i32(0)), [warp_sum(ops, total), warp_sum(ops, mass), first, first])
    ops.cluster_barrier()
    slots = slots_of(place, place.turn(ops.const_i32(0)))
    total, mass = (summed(ops, slots, word, floats=True) for word in (0, 1))
    for slot in slots:
        first = ops.select(slot[2] < first, slot[2], first)
    first = ops.warp_min(first)

    nowhere = ops.const_f32(float("-inf"))
    total = raw_maximum + ops.log(total)
    total = ops.select(raw_top.equals(_INFINITY), raw_maximum, total)
    total = ops.select(masked, nowhere, total)
    leader = ops.both(place.rank.equals(0), place.thread.equals(0))
    ops.when(leader, lambda: ops.store_word("totals", place.row, total))
    token = ops.select(raw_top >= _INFINITY + 1, ops.const_i32(-1), first)
    ops.when(ops.both(leader, greedy), lambda: store(place, token, nowhere))

    def draw() -> None:
        row = row_of(place, maximum, scale(ops.const_f32(BOTTOM)), mass)
        narrowed = narrow(place, row, maxima, scale, raw_top)
        one_ends, first_block = narrowed.complete, ops.same(place.rank.equals(0))

        def from_candidates() -> list[Any]:
            count = gather(place, row, narrowed)
            ops.cluster_barrier()
            (key,) = ops.update(first_block, [narrowed.least], lambda: [threshold(place, row, narrowed, count)])
            ops.when(ops.both(first_block, one_ends), lambda: draw_from_few(place, row, count, key))
            return ops.update(narrowed.between, [key], lambda: [_known_to_all(place, key)])

        (key,) = ops.update(ops.either(one_ends, narrowed.between), [narrowed.least], from_candidates)
        turn = ops.select(narrowed.between, ops.const_i32(1) - narrowed.turn, narrowed.turn)
        ops.when(one_ends.equals(False), lambda: draw_from_all(place, row, key, turn))

    ops.when(ops.same(greedy.equals(False)), draw)


def _load(place: Place) -> Any:
    """Puts this thread's logits into shared memory, those masked as FLOOR and PAD behind the row's end; returns the
    largest, or NaN."""
    ops, p = place.ops, place.p
    floor, pad = ops.const_f32(FLOOR), ops.const_f32(PAD)
    start = place.row * p.vocabulary
    begin = ops.pointer("logits", start + place.token(0), 4)
    end = ops.min_int(place.rank * p.slice + p.slice, p.vocabulary)
    largest = pad
    for first in range(0, p.loads, IN_FLIGHT):
        batch = range(first, min(first + IN_FLIGHT, p.loads))
        loaded = []
        for load in batch:
            if load < p.full_loads:
                loaded.append(ops.load_floats(begin, load * THREADS * p.width * 4, p.width))
                continue
            token = place.token(load)
            inside = token < end
            nearest = start + ops.select(inside, token, ops.const_i32(0))
            values = ops.load_floats(ops.pointer("logits", nearest, 4), 0, p.width)
            loaded.append([ops.select(inside, v, pad) for v in values])
        for load, values in zip(batch, loaded):
            if load < p.full_loads:
                values = [ops.max_nan(v, floor) for v in values]
            else:
                inside = place.token(load) < end
                values = [ops.select(inside, ops.max_nan(v, floor), v) for v in values]
            element = (place.thread + load * THREADS) * p.width
            ops.store_shared_floats(ops.smem_base + element * 4, values)
            for v in values:
                largest = ops.max_nan(largest, v)
    return largest


def _known_to_all(place: Place, key: Any) -> Any:
    """What the first block holds, in all of them; the maxima's place is free by now."""
    ops, at = place.ops, place.shared(place.p.maxima)
    speaks = ops.both(place.slot.equals(0), place.lane < CLUSTER)
    ops.when(speaks, lambda: ops.store_peer(ops.peer_address(at, place.lane), [key]))
    ops.cluster_barrier()
    return ops.load_shared_word(at)
