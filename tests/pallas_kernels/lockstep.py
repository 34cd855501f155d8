"""Executes the sampling kernel's program on numpy: all threads of a cluster at once, an array of them for a register.

Every instruction does what the PTX manual says. Shared memory remembers who last wrote and read each word: an access
that no barrier orders behind another warp's is an error (Race), and so is a barrier that some threads miss. Not
modelled: time, and the last bits of ex2 and of the logarithm.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

_PEER = 1 << 24  # peer_address = rank * _PEER + address
_NOBODY, _MANY = -1, -2


class Race(AssertionError):
    """Two warps touch a word of shared memory, one of them writing, and no barrier is between them."""


class Value:
    """A register: uint32, int64 (addresses), float32 or bool, of every thread."""

    def __init__(self, a: Any):
        self.a = a

    def _other(self, x: Any) -> Any:
        if isinstance(x, Value):
            return x.a
        wide = np.asarray(x if self.a.dtype in (np.float32, bool) else int(x) & 0xFFFFFFFF)
        return wide.astype(self.a.dtype)

    def _op(self, x: Any, op: Callable[..., Any]) -> Value:
        with np.errstate(all="ignore"):
            return Value(op(self.a, self._other(x)).astype(self.a.dtype))

    def _signed(self) -> Any:
        return self.a.view(np.int32) if self.a.dtype == np.uint32 else self.a

    def _compare(self, x: Any, op: Callable[..., Any]) -> Value:
        return Value(op(self._signed(), Value(np.broadcast_to(self._other(x), self.a.shape).copy())._signed()))

    def __add__(self, x: Any) -> Value:
        return self._op(x, np.add)

    def __sub__(self, x: Any) -> Value:
        return self._op(x, np.subtract)

    def __mul__(self, x: Any) -> Value:
        return self._op(x, np.multiply)

    def __floordiv__(self, x: Any) -> Value:
        return self._op(x, np.floor_divide)

    def __and__(self, x: Any) -> Value:
        return self._op(x, np.bitwise_and)

    def __or__(self, x: Any) -> Value:
        return self._op(x, np.bitwise_or)

    def __xor__(self, x: Any) -> Value:
        return self._op(x, np.bitwise_xor)

    def __lshift__(self, x: Any) -> Value:
        return self._op(x, lambda a, b: np.where(b < 32, a << np.minimum(b, 31), 0))

    def __rshift__(self, x: Any) -> Value:
        return self._op(x, lambda a, b: np.where(b < 32, a >> np.minimum(b, 31), 0))

    def __lt__(self, x: Any) -> Value:
        return self._compare(x, np.less)

    def __ge__(self, x: Any) -> Value:
        return self._compare(x, np.greater_equal)

    def equals(self, x: Any) -> Value:
        return self._compare(x, np.equal)


class Lockstep:
    """`buffers`: name -> contiguous 32-bit array, outputs written in place."""

    def __init__(self, buffers: dict[str, np.ndarray], blocks: int, threads: int, shared_bytes: int):
        self.buffers = {name: b.reshape(-1) for name, b in buffers.items()}
        self.blocks, self.threads, self.count = blocks, threads, blocks * threads
        words = (blocks, shared_bytes // 4)
        self.shared = np.full(words, 0x7FC00BAD, np.uint32)  # as a float NaN
        self.written, self.read = ({name: np.zeros(words, np.int64) for name in ("block", "cluster")} for _ in range(2))
        self.writer, self.reader = np.full(words, _NOBODY), np.full(words, _NOBODY)
        self.epoch = {"block": np.ones(blocks, np.int64), "cluster": 1}
        self.active = np.ones(self.count, bool)
        every = np.arange(self.count)
        self.block, self.warp_of = every // threads, every // 32
        self.smem_base = self._word(0)
        self.cluster_barriers = 0

    # constants, arithmetic
    def _word(self, x: Any) -> Value:
        return Value(np.broadcast_to(np.asarray(x, np.int64) & 0xFFFFFFFF, (self.count,)).astype(np.uint32))

    def const_i32(self, x: int) -> Value:
        return self._word(x)

    unknown = const_i32

    def const_f32(self, x: float) -> Value:
        return Value(np.full(self.count, x, np.float32))

    def special(self, name: str) -> Value:
        every = np.arange(self.count)
        return self._word({"tid.x": every % self.threads, "cluster_ctarank": self.block}[name])

    def select(self, condition: Value, x: Value, y: Value) -> Value:
        assert x.a.dtype == y.a.dtype
        return Value(np.where(condition.a, x.a, y.a))

    def both(self, x: Value, y: Value) -> Value:
        return Value(x.a & y.a)

    def either(self, x: Value, y: Value) -> Value:
        return Value(x.a | y.a)

    def min_int(self, x: Value, y: int) -> Value:
        return self._word(np.minimum(x.a.view(np.int32), y))

    def max_int(self, x: Value, y: int) -> Value:
        return self._word(np.maximum(x.a.view(np.int32), y))

    def max(self, x: Value, y: Value) -> Value:
        return Value(np.fmax(x.a, y.a))

    def max_nan(self, x: Value, y: Value) -> Value:
        top = np.maximum(x.a, y.a)
        return Value(np.where(np.isnan(top), np.uint32(0x7FFFFFFF).view(np.float32), top))

    def fma(self, x: Value, y: Value, z: Value) -> Value:
        with np.errstate(all="ignore"):  # the product is exact in float64, the sum nearly
            return Value((x.a.astype(np.float64) * y.a + z.a).astype(np.float32))

    def exp2(self, x: Value) -> Value:
        with np.errstate(all="ignore"):
            return Value(np.exp2(x.a))

    def divide(self, x: Value, y: Value) -> Value:
        with np.errstate(all="ignore"):
            return Value(x.a / y.a)

    def log(self, x: Value) -> Value:
        with np.errstate(all="ignore"):
            return Value(np.log(x.a))

    def as_float(self, x: Value) -> Value:
        return Value(x.a.view(np.float32))

    def sort_key(self, x: Value) -> Value:
        bits = (x.a + np.float32(0)).view(np.int32)
        return self._word(np.where(bits < 0, bits ^ 0x7FFFFFFF, bits))

    def from_key(self, key: Value) -> Value:
        bits = key.a.view(np.int32)
        return Value(np.where(bits < 0, bits ^ 0x7FFFFFFF, bits).astype(np.int32).view(np.float32))

    def rotate_left(self, x: Value, distance: int) -> Value:
        return Value((x.a << np.uint32(distance)) | (x.a >> np.uint32(32 - distance)))

    def below(self, x: Value, y: Any) -> Value:
        return Value(x.a < x._other(y))

    def to_float(self, x: Value) -> Value:
        return Value(x.a.view(np.int32).astype(np.float32))

    def bit_length(self, x: Value) -> Value:
        return self._word([int(v).bit_length() for v in x.a])

    # warp: every lane takes part
    def _whole_warps(self) -> None:
        warps = self.active.reshape(-1, 32)
        assert (warps.all(1) | ~warps.any(1)).all(), "a lane misses its warp's exchange"

    def _over_warp(self, x: Value, op: Callable[..., Any]) -> Value:
        self._whole_warps()
        lanes = x.a.view(np.int32).reshape(-1, 32)
        return self._word(np.repeat(op(lanes.astype(np.int64), axis=1), 32))

    def warp_max(self, x: Value) -> Value:
        return self._over_warp(x, np.max)

    def warp_min(self, x: Value) -> Value:
        return self._over_warp(x, np.min)

    def warp_add(self, x: Value) -> Value:
        return self._over_warp(x, np.sum)

    def shuffle_xor(self, x: Value, distance: int) -> Value:
        self._whole_warps()
        return Value(x.a.reshape(-1, 32)[:, np.arange(32) ^ distance].reshape(-1))

    def shuffle_up(self, x: Value, distance: int) -> Value:
        self._whole_warps()
        lane = np.arange(32)
        return Value(x.a.reshape(-1, 32)[:, np.where(lane >= distance, lane - distance, lane)].reshape(-1))

    def ballot(self, condition: Value) -> Value:
        self._whole_warps()
        bits = condition.a.reshape(-1, 32).astype(np.int64) << np.arange(32)
        return self._word(np.repeat(bits.sum(1), 32))

    def same(self, condition: Value) -> Value:
        self._whole_warps()
        warps = condition.a.reshape(-1, 32)
        assert (warps == warps[:, :1])[self.active.reshape(-1, 32)].all(), "lanes do not agree"
        return condition

    # global memory: 32-bit elements, an address is (name, element)
    def pointer(self, name: str, index: Value, size: int) -> Any:
        assert size == 4
        return name, index.a.astype(np.int64)

    def _load(self, name: str, index: Any) -> Any:
        inside = np.where(self.active, index, 0)
        assert inside.min() >= 0 and inside.max() < len(self.buffers[name]), f"reads outside {name}"
        return self.buffers[name][inside]

    def load_word(self, name: str, index: Value) -> Value:
        return Value(self._load(name, index.a.astype(np.int64)).view(np.uint32))

    def load_float(self, name: str, index: Value) -> Value:
        return Value(self._load(name, index.a.astype(np.int64)).astype(np.float32))

    def load_floats(self, pointer: Any, offset: int, count: int) -> list[Value]:
        name, index = pointer
        assert ((index + offset // 4) % count)[self.active].max() == 0, "not aligned"
        return [Value(self._load(name, index + offset // 4 + i)) for i in range(count)]

    def store_word(self, name: str, index: Value, x: Value) -> None:
        buffer = self.buffers[name]
        at = index.a[self.active]
        assert len(np.unique(at)) == len(at), "two threads store to one place"
        buffer[at] = x.a[self.active].view(buffer.dtype)

    # shared memory
    def _places(self, address: Any, count: int, rank: Any) -> tuple[Any, Any, Any]:
        on = np.flatnonzero(self.active)
        at = address[on].astype(np.int64)
        assert (at % (4 * count) == 0).all(), "not aligned"
        assert (at // 4 + count <= self.shared.shape[1]).all(), "outside shared memory"
        return on, rank[on], at // 4

    def _ordered(self, on: Any, rank: Any, at: Any, who: Any, when: dict[str, Any]) -> None:
        """Whether a barrier is between the last access by another warp and this one."""
        last, here = who[rank, at], self.warp_of[on]
        other = (last != _NOBODY) & (last != here)
        same_block = (last != _MANY) & (last * 32 // self.threads == self.block[on])
        passed = self.epoch["cluster"] > when["cluster"][rank, at]
        passed |= same_block & (self.block[on] == rank) & (self.epoch["block"][rank] > when["block"][rank, at])
        passed |= (last == _MANY) & (self.block[on] == rank) & (self.epoch["block"][rank] > when["block"][rank, at])
        if (other & ~passed).any():
            raise Race(f"word {at[other & ~passed][:4]}")

    def _load_shared(self, address: Any, count: int) -> list[Any]:
        on, rank, at = self._places(address, count, self.block)
        out = []
        for i in range(count):
            self._ordered(on, rank, at + i, self.writer, self.written)
            before, here = self.reader[rank, at + i], self.warp_of[on]
            stale = (self.read["block"][rank, at + i] < self.epoch["block"][rank]) | (before == _NOBODY)
            shared = np.where(stale | (before == here), here, _MANY)
            self.reader[rank, at + i] = shared
            # two warps that read the same word in the same instruction
            self.reader[rank, at + i] = np.where(self.reader[rank, at + i] == here, shared, _MANY)
            self.read["block"][rank, at + i] = self.epoch["block"][rank]
            self.read["cluster"][rank, at + i] = self.epoch["cluster"]
            values = np.zeros(self.count, np.uint32)
            values[on] = self.shared[rank, at + i]
            out.append(values)
        return out

    def _store_shared(self, address: Any, rank: Any, values: Sequence[Any]) -> None:
        on, rank, at = self._places(address, len(values), rank)
        for i, value in enumerate(values):
            place = rank * self.shared.shape[1] + at + i
            assert len(np.unique(place)) == len(place), "two threads store to one place"
            self._ordered(on, rank, at + i, self.writer, self.written)
            self._ordered(on, rank, at + i, self.reader, self.read)
            self.shared[rank, at + i] = value[on].view(np.uint32)
            self.writer[rank, at + i] = self.warp_of[on]
            self.reader[rank, at + i] = _NOBODY
            self.written["block"][rank, at + i] = self.epoch["block"][rank]
            self.written["cluster"][rank, at + i] = self.epoch["cluster"]

    def load_shared_word(self, address: Value) -> Value:
        return Value(self._load_shared(address.a, 1)[0])

    def load_shared_words(self, address: Value) -> list[Value]:
        return [Value(v) for v in self._load_shared(address.a, 4)]

    def load_shared(self, address: Value) -> Value:
        return Value(self._load_shared(address.a, 1)[0].view(np.float32))

    def load_shared_floats(self, address: Value, count: int) -> list[Value]:
        return [Value(v.view(np.float32)) for v in self._load_shared(address.a, count)]

    def store_shared_word(self, address: Value, x: Value) -> None:
        self._store_shared(address.a, self.block, [x.a])

    def store_shared_floats(self, address: Value, x: Sequence[Value]) -> None:
        self._store_shared(address.a, self.block, [v.a for v in x])

    def peer_address(self, address: Value, rank: Value) -> Value:
        assert (rank.a[self.active] < self.blocks).all()
        return Value(rank.a.astype(np.uint32) * np.uint32(_PEER) + address.a)

    def store_peer(self, address: Value, words: Sequence[Value]) -> None:
        rank = np.where(self.active, address.a // _PEER, 0)
        self._store_shared(address.a % _PEER, rank, [w.a for w in words])

    # control
    def barrier(self) -> None:
        blocks = self.active.reshape(self.blocks, -1)
        assert (blocks.all(1) | ~blocks.any(1)).all(), "a thread misses its block's barrier"
        self.epoch["block"][blocks.all(1)] += 1

    def cluster_barrier(self) -> None:
        assert self.active.all(), "a thread misses the cluster's barrier"
        self.epoch["block"] += 1
        self.epoch["cluster"] += 1
        self.cluster_barriers += 1

    def when(self, condition: Value, body: Callable[[], None]) -> None:
        before = self.active
        self.active = before & condition.a
        if self.active.any():
            body()
        self.active = before

    def update(self, condition: Value, carry: list[Value], then: Callable[[], list[Value]]) -> list[Value]:
        out = carry

        def body() -> None:
            nonlocal out
            out = self._merge(then(), carry)

        self.when(condition, body)
        return out

    def _merge(self, new: list[Value], old: list[Value]) -> list[Value]:
        """New values in the active threads."""
        assert [v.a.dtype for v in new] == [v.a.dtype for v in old]
        return [Value(np.where(self.active, n.a, o.a)) for n, o in zip(new, old, strict=True)]

    def loop(self, count: Value, carry: list[Value], body: Callable[[Value, list[Value]], list[Value]]) -> list[Value]:
        counts = count.a.view(np.int32)
        assert len(np.unique(counts[self.active])) <= 1, "threads loop differently often"
        for i in range(int(counts[self.active][0]) if self.active.any() else 0):
            carry = self._merge(body(self._word(i), carry), carry)
        return carry

    def repeat(self, carry: list[Value], body: Callable[[list[Value]], list[Value]]) -> list[Value]:
        for _ in range(100):
            carry = self._merge(body(carry), carry)
            go = carry[0].a[self.active] != 0
            assert go.all() or not go.any(), "threads do not agree to go on"
            if not go.any():
                return carry
        raise AssertionError("no end after 100 passes")
