"""Executes warp programs on numpy: one warp = arrays of 32 lanes, shared memory = bytes (see simt.py).

Every instruction follows the PTX manual's description of its fragment layout, so a program that is right here
indexes right on the GPU; what is not modelled is time (an asynchronous copy lands at once) and rounding inside mma.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np

_TYPES = {"bf16": ml_dtypes.bfloat16, "f16": np.float16, "e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}
_LANE = np.arange(32)
_PEER = 1 << 24  # peer_address = rank * _PEER + address


class Lanes(np.ndarray):
    """A register of the 32 lanes."""

    def equals(self, x: Any) -> Any:
        return self == x


def _lanes(x: Any, dtype: Any = None) -> Any:
    return np.broadcast_to(np.asarray(x, dtype), (32,)).copy().view(Lanes)


class Numpy:
    """One warp. `buffers`: name -> contiguous array (written in place for the output); `shared`: bytes of each CTA."""

    smem_base = _lanes(0, np.int64)

    def __init__(self, buffers: dict[str, np.ndarray], shared: list[np.ndarray], rank: int):
        self.buffers = {n: b.reshape(-1).view(np.uint8) for n, b in buffers.items() if b is not None}
        self.shared, self.rank = shared, rank

    def const_i32(self, x: int) -> Any:
        return _lanes(x, np.int64)

    def const_f32(self, x: float) -> Any:
        return _lanes(x, np.float32)

    def select(self, condition: Any, x: Any, y: Any) -> Any:
        return _lanes(np.where(condition, x, y))

    def both(self, x: Any, y: Any) -> Any:
        return x & y

    def min_int(self, x: Any, y: int) -> Any:
        return _lanes(np.minimum(x, y))

    def max_int(self, x: Any, y: int) -> Any:
        return _lanes(np.maximum(x, y))

    def max(self, x: Any, y: Any) -> Any:
        return _lanes(np.fmax(x, y))

    def fma(self, x: Any, y: Any, z: Any) -> Any:
        return _lanes(x * y + z, np.float32)

    def exp2(self, x: Any) -> Any:
        return _lanes(np.exp2(x), np.float32)

    def reciprocal(self, x: Any) -> Any:
        return _lanes(1 / x, np.float32)

    def pack(self, low: Any, high: Any, kind: str) -> Any:
        pair = np.stack([low, high], -1).astype(_TYPES[kind])
        return _lanes(pair.view(np.uint32)[:, 0])

    def unpack_bf16(self, x: Any) -> tuple[Any, Any]:
        pair = _lanes(x, np.uint32).reshape(32, 1).view(ml_dtypes.bfloat16).astype(np.float32)
        return _lanes(pair[:, 0]), _lanes(pair[:, 1])

    def fp8_to_f16(self, x: Any, kind: str) -> tuple[Any, Any]:
        pair = _lanes(x, np.uint32).view(np.uint8).reshape(32, 4).view(_TYPES[kind]).astype(np.float16).view(np.uint32)
        return _lanes(pair[:, 0]), _lanes(pair[:, 1])

    def permute(self, x: Any, selector: int) -> Any:
        source = _lanes(x, np.uint32).view(np.uint8).reshape(32, 4)
        order = [(selector >> (4 * i)) & 3 for i in range(4)]
        return _lanes(np.ascontiguousarray(source[:, order]).view(np.uint32)[:, 0])

    def shuffle_xor(self, x: Any, distance: int) -> Any:
        return _lanes(x[_LANE ^ distance])

    def sync_warp(self) -> None:
        pass

    def ldmatrix(self, address: Any, *, transpose: bool) -> list[Any]:
        out = []
        for m in range(4):
            assert (address[8 * m : 8 * m + 8] % 16 == 0).all()
            rows = np.stack([self.shared[self.rank][a : a + 16].view(np.uint16) for a in address[8 * m : 8 * m + 8]])
            if transpose:
                rows = rows.T
            out.append(_lanes(np.ascontiguousarray(rows).view(np.uint32)[_LANE // 4, _LANE % 4]))
        return out

    def movmatrix(self, x: Any) -> Any:
        matrix = _lanes(x, np.uint32).reshape(8, 4).view(np.uint16)
        return _lanes(np.ascontiguousarray(matrix.T).view(np.uint32).reshape(-1))

    def mma(self, c: Sequence[Any], a: Sequence[Any], b: Sequence[Any], kind: str) -> list[Any]:
        g, t = _LANE // 4, _LANE % 4
        left, right = np.zeros((16, 16), np.float32), np.zeros((16, 8), np.float32)
        halves = lambda r: _lanes(r, np.uint32).reshape(32, 1).view(_TYPES[kind]).astype(np.float32)  # noqa: E731
        for i, (row, column) in enumerate(((0, 0), (8, 0), (0, 8), (8, 8))):
            for e in range(2):
                left[g + row, 2 * t + column + e] = halves(a[i])[:, e]
        for i in range(2):
            for e in range(2):
                right[2 * t + 8 * i + e, g] = halves(b[i])[:, e]
        product = left @ right
        return [_lanes(c[i] + product[g + 8 * (i // 2), 2 * t + i % 2], np.float32) for i in range(4)]

    def load_global(self, name: str, offset: Any) -> Any:
        data = self.buffers[name]
        words = np.array([data[o : o + 4].view(np.uint32)[0] for o in offset], np.uint32)
        return _lanes(words.view(np.int32), np.int64)

    def load_global_f32(self, name: str, offset: Any) -> Any:
        return _lanes(self.load_global(name, offset).astype(np.int32).view(np.float32))

    def pointer(self, name: str, index: Any, size: int) -> Any:
        return (name, index * size)

    def offset_pointer(self, pointer: Any, offset: Any) -> Any:
        return pointer[0], pointer[1] + offset

    def copy_async(self, address: Any, pointer: Any, offset: int, size: Any) -> None:
        for lane in range(32):
            chunk = np.zeros(16, np.uint8)
            if size[lane]:
                start = pointer[1][lane] + offset
                chunk = self.buffers[pointer[0]][start : start + 16]
                assert len(chunk) == 16
            self.shared[self.rank][address[lane] : address[lane] + 16] = chunk

    def commit(self) -> None:
        pass

    def wait(self, pending: int) -> None:
        pass

    def store_shared(self, address: Any, x: Any, where: Any = None) -> None:
        for lane in range(32):
            if where is None or where[lane]:
                self.shared[self.rank][address[lane] : address[lane] + 4] = (
                    np.float32(x[lane]).reshape(1).view(np.uint8)
                )

    def store_shared4(self, address: Any, x: Sequence[Any]) -> None:
        for i in range(4):
            self.store_shared(address + 4 * i, x[i])

    def _read(self, rank: int, address: int) -> Any:
        return self.shared[rank][address : address + 4].view(np.float32)[0]

    def load_shared(self, address: Any) -> Any:
        return _lanes([self._read(self.rank, a) for a in address], np.float32)

    def load_shared4(self, address: Any) -> list[Any]:
        return [self.load_shared(address + 4 * i) for i in range(4)]

    def peer_address(self, address: Any, rank: Any) -> Any:
        return address + rank * _PEER

    def load_peer(self, address: Any) -> Any:
        return _lanes([self._read(a // _PEER, a % _PEER) for a in address], np.float32)

    def load_peer4(self, address: Any) -> list[Any]:
        return [self.load_peer(address + 4 * i) for i in range(4)]

    def store_global2(self, name: str, offset: Any, x: Any, y: Any) -> None:
        for lane in np.flatnonzero(self.active):
            self.buffers[name][offset[lane] : offset[lane] + 8] = np.array([x[lane], y[lane]], np.uint32).view(np.uint8)

    active = np.ones(32, bool)

    def when(self, condition: Any, body: Callable[[], None]) -> None:
        """Lanes that disagree are allowed where the body only stores results."""
        if np.any(condition):
            self.active, before = np.broadcast_to(condition, (32,)), self.active
            body()
            self.active = before

    def loop(self, count: Any, carry: list[Any], body: Callable[[Any, list[Any]], list[Any]]) -> list[Any]:
        assert (count == count[0]).all()
        for i in range(int(count[0])):
            carry = body(self.const_i32(i), carry)
        return carry
