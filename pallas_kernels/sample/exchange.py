"""One thread's place in the cluster that draws a row's token, and how the cluster's warps tell each other numbers.

A warp's lanes 0 to 7 each write its numbers to its slot in one block's shared memory; a cluster barrier later every
warp reads all slots, four a lane. All of them sum in the same order, and so arrive at the same bits. Slots have two
turns: whoever writes to one again has passed a barrier that its readers have passed behind their reading.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from pallas_kernels.sample.problem import CLUSTER, SLOTS, THREADS, TURN, WARPS, Problem


@dataclasses.dataclass(frozen=True)
class Place:
    ops: Any
    p: Problem
    row: Any
    rank: Any  # of the block in its cluster
    thread: Any
    lane: Any
    warp: Any

    @property
    def slot(self) -> Any:
        return self.rank * WARPS + self.warp

    def shared(self, at: int) -> Any:
        """The address of byte `at` of the block's shared memory."""
        return self.ops.smem_base + at

    def token(self, load: int) -> Any:
        """The first token of this thread's load number `load`."""
        return self.rank * self.p.slice + (self.thread + load * THREADS) * self.p.width

    def turn(self, turn: Any) -> Any:
        return self.shared(self.p.slots) + turn * TURN


def tell(place: Place, address: Any, words: Sequence[Any]) -> None:
    """Writes 1 or 4 words to the warp's slot of an array [SLOTS, words] at `address`, in every block."""
    ops = place.ops
    mine = address + place.slot * (4 * len(words))
    ops.when(place.lane < CLUSTER, lambda: ops.store_peer(ops.peer_address(mine, place.lane), words))


def slots_of(place: Place, address: Any) -> list[list[Any]]:
    """This lane's four slots of an array [SLOTS, 4 words] at `address`, as words."""
    ops = place.ops
    assert SLOTS == 4 * 32
    return [ops.load_shared_words(address + (place.lane + 32 * i) * 16) for i in range(4)]


def warp_sum(ops: Any, x: Any) -> Any:
    """Of a float32 over the lanes, the same bits in each."""
    for distance in (16, 8, 4, 2, 1):
        x = x + ops.shuffle_xor(x, distance)
    return x


def summed(ops: Any, slots: list[list[Any]], word: int, *, floats: bool) -> Any:
    """The sum of one word over all slots."""
    values = [slot[word] for slot in slots]
    if not floats:
        return ops.warp_add(values[0] + values[1] + values[2] + values[3])
    values = [ops.as_float(v) for v in values]
    return warp_sum(ops, (values[0] + values[1]) + (values[2] + values[3]))


def best_of(ops: Any, key: Any, token: Any) -> tuple[Any, Any]:
    """The largest key over the lanes and, of those that have it, the first token."""
    top = ops.warp_max(key)
    return top, ops.warp_min(ops.select(key.equals(top), token, ops.const_i32(0x7FFFFFFF)))


def each_load(place: Place, carry: list[Any], body: Callable[..., Any], *, written: bool = False) -> list[Any]:
    """carry = body(first token, its logits, carry) over the thread's part of the row in shared memory, the pads
    included; with `written` body returns (carry, logits) and those replace them."""
    ops, p = place.ops, place.p
    begin = place.token(0)

    def one(i: Any, carry: list[Any]) -> list[Any]:
        address = ops.smem_base + (i * THREADS + place.thread) * (p.width * 4)
        result = body(begin + i * (THREADS * p.width), ops.load_shared_floats(address, p.width), carry)
        if not written:
            return result
        ops.store_shared_floats(address, result[1])
        return result[0]

    return ops.loop(ops.unknown(p.loads), carry, one)
