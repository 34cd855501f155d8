"""Runs the device code of an a16 kernel on numpy: a Python thread for every warp, 32-lane arrays for registers.

`run` replaces the instructions of `pallas_kernels.a16.ptx` (and the MLIR ones beside them) by what the PTX manual says
they do, and calls the kernel's emitting function once for each warp. Shared-memory barriers count arrivals and bytes
and have phases; a bulk copy lands at once, the earliest that it may. So a wrong index, a stage that is overwritten
while it is read, or a wait that never ends (Deadlock) show here. Not modelled: time, and rounding inside mma.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np

from pallas_kernels.a16 import ptx
from pallas_kernels.a16.ptx import Int

LANE = np.arange(32)
FLOAT = {"bf16": np.dtype(ml_dtypes.bfloat16), "f16": np.dtype(np.float16), "f32": np.dtype(np.float32)}
PATIENCE = 30.0  # seconds that nothing may happen before a wait counts as endless


class Deadlock(AssertionError):
    """A warp waits, and nothing will end it."""


class Barrier:
    def __init__(self, count: int):
        self.count = self.pending = count
        self.bytes, self.phase = 0, 0

    def settle(self) -> None:
        assert self.pending >= 0, "more arrivals than the barrier expects"
        if self.pending == 0 and self.bytes == 0:
            self.pending, self.phase = self.count, self.phase ^ 1


class Block:
    """One thread block: its shared memory, barriers, and the global arrays (name -> bytes, written in place)."""

    def __init__(self, index: int, warps: int, shared_bytes: int, arrays: Sequence[np.ndarray]):
        self.index, self.warps = index, warps
        self.shared = np.zeros(shared_bytes, np.uint8)
        self.arrays = [a.reshape(-1).view(np.uint8) for a in arrays]
        self.barriers: dict[int, Barrier] = {}
        self.changed = threading.Condition()
        self.everyone = threading.Barrier(warps)
        self.cluster = [self]
        self.failed: BaseException | None = None

    def wait(self, barrier: int, parity: int) -> None:
        with self.changed:
            while self.barriers[barrier].phase == parity:
                if not self.changed.wait(PATIENCE) or self.failed:
                    raise Deadlock(f"barrier at {barrier}, parity {parity}")


class Warp(threading.local):
    """What the current thread runs as."""

    block: Block
    number: int
    mask: np.ndarray


warp = Warp()


def lanes(value: Any, dtype: Any) -> np.ndarray:
    return np.broadcast_to(np.asarray(value, dtype), (32,))


def u32(value: Any) -> np.ndarray:
    return lanes(np.asarray(value, np.int64) & 0xFFFFFFFF, np.uint32)


def active() -> list[int]:
    return [int(i) for i in np.flatnonzero(warp.mask)]


def halves(word: Any, dtype: str) -> np.ndarray:
    """[32, 2] float32."""
    value = word.value if isinstance(word, Int) else word
    return np.ascontiguousarray(lanes(value, np.uint32)).view(FLOAT[dtype]).reshape(32, 2).astype(np.float32)


def words_of(pairs: np.ndarray, dtype: str) -> Int:
    return Int(np.ascontiguousarray(pairs.astype(FLOAT[dtype])).view(np.uint32).reshape(32))


def read(address: Int, size: int, dtype: Any) -> np.ndarray:
    """[32, size / itemsize]; lanes that are off read zeros."""
    out = np.zeros((32, size), np.uint8)
    for lane in active():
        at = int(address.value[lane])
        assert at % size == 0 and at + size <= len(warp.block.shared), (at, size)
        out[lane] = warp.block.shared[at : at + size]
    return out.view(dtype)


@contextlib.contextmanager
def when(condition: np.ndarray):
    before = warp.mask
    warp.mask = before & lanes(condition, bool)
    yield
    warp.mask = before


def loop(count: Int | int, carry: Sequence[Any], body: Callable[[Int, list[Any]], Sequence[Any]]) -> list[Any]:
    counts = {int(c) for c in u32(Int.of(count).value)[warp.mask]}
    assert len(counts) <= 1, "the lanes of a warp loop differently often"
    values = list(carry)
    for i in range(max(counts, default=0)):
        values = [v.value if isinstance(v, Int) else v for v in body(Int(u32(i)), values)]
    return values


def prmt(a: Int, b: Int, selector: int) -> Int:
    pool = np.stack([np.ascontiguousarray(v.value).view(np.uint8).reshape(32, 4) for v in (a, b)], 1).reshape(32, 8)
    picked = pool[:, [selector >> 4 * i & 7 for i in range(4)]]
    return Int(np.ascontiguousarray(picked).view(np.uint32).reshape(32))


def packed(op: str, dtype: str, a: Int, b: Int) -> Int:
    x, y = halves(a, dtype).astype(np.float64), halves(b, dtype).astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        return words_of({"sub": x - y, "mul": x * y}[op], dtype)


def ldmatrix_x4(address: Int) -> list[Int]:
    out: list[Int] = []
    if not warp.mask.any():
        return [Int(u32(0))] * 4
    assert warp.mask.all()
    for m in range(4):
        rows = [warp.block.shared[int(a) : int(a) + 16] for a in address.value[8 * m : 8 * m + 8]]
        assert (address.value % 16 == 0).all()
        out.append(Int(np.stack(rows).view(np.uint32)[LANE // 4, LANE % 4]))
    return out


def mma_m16n8k16(dtype: str, acc: Sequence[np.ndarray], a: Sequence[Int], b: Sequence[Int]) -> list[np.ndarray]:
    g, t = LANE // 4, LANE % 4
    left, right = np.zeros((16, 16)), np.zeros((16, 8))
    for i, (row, column) in enumerate(((0, 0), (8, 0), (0, 8), (8, 8))):
        for e in range(2):
            left[g + row, 2 * t + column + e] = halves(a[i], dtype)[:, e]
    for i in range(2):
        for e in range(2):
            right[2 * t + 8 * i + e, g] = halves(b[i], dtype)[:, e]
    with np.errstate(invalid="ignore", over="ignore"):
        product = left @ right
        return [(acc[i] + product[g + 8 * (i // 2), 2 * t + i % 2]).astype(np.float32) for i in range(4)]


def copy(destination: Int, source: np.ndarray, size: int, barrier: Int) -> None:
    block = warp.block
    for lane in active():
        array, start = divmod(int(source[lane]), 1 << 32)
        at = int(destination.value[lane])
        assert size % 16 == 0 and at % 16 == 0 and start % 16 == 0
        piece = block.arrays[array][start : start + size]
        assert len(piece) == size and at + size <= len(block.shared), "a copy past the end"
        with block.changed:
            block.shared[at : at + size] = piece
            target = block.barriers[int(barrier.value[lane])]
            target.bytes -= size
            target.settle()
            block.changed.notify_all()


def arrive(address: Int, more_bytes: int = 0) -> None:
    block = warp.block
    for lane in active():
        with block.changed:
            target = block.barriers[int(address.value[lane])]
            target.bytes += more_bytes
            target.pending -= 1
            target.settle()
            block.changed.notify_all()


def init(address: Int, count: int) -> None:
    for lane in active():
        warp.block.barriers[int(address.value[lane])] = Barrier(count)


def wait(address: Int, parity: Int) -> None:
    for lane in active()[:1]:
        warp.block.wait(int(address.value[lane]), int(parity.value[lane]))


def store_shared_f32(address: Int, value: np.ndarray) -> None:
    for lane in active():
        at = int(address.value[lane])
        warp.block.shared[at : at + 4] = np.float32(value[lane]).reshape(1).view(np.uint8)


def store_global(value: np.ndarray, address: np.ndarray) -> None:
    for lane in active():
        array, start = divmod(int(address[lane]), 1 << 32)
        data = np.ascontiguousarray(value[lane : lane + 1]).view(np.uint8)
        warp.block.arrays[array][start : start + len(data)] = data


def load_global(dtype: str, address: np.ndarray) -> np.ndarray:
    out = np.zeros(32, FLOAT[dtype])
    for lane in active():
        array, start = divmod(int(address[lane]), 1 << 32)
        out[lane] = warp.block.arrays[array][start : start + out.itemsize].view(FLOAT[dtype])[0]
    return out


def special(name: str) -> Int:
    rank = warp.block.cluster.index(warp.block)
    return Int(u32({"%tid.x": warp.number * 32 + LANE, "%ctaid.x": warp.block.index, "%cluster_ctarank": rank}[name]))


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", over="ignore"):
        return (a.astype(np.float64) * b + c).astype(np.float32)


def _float(op: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    def apply(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore", over="ignore"):
            return op(a, b)

    return apply


ARITH = SimpleNamespace(
    CmpIPredicate=SimpleNamespace(ult="ult", eq="eq"),
    addi=lambda a, b: a + b,
    subi=lambda a, b: a - b,
    muli=lambda a, b: a * b,
    divui=lambda a, b: a // b,
    remui=lambda a, b: a % b,
    andi=lambda a, b: a & b,
    ori=lambda a, b: a | b,
    xori=lambda a, b: a ^ b,
    shli=lambda a, b: a << b,
    shrui=lambda a, b: a >> b,
    minui=np.minimum,
    cmpi=lambda how, a, b: a < b if how == "ult" else a == b,
    select=np.where,
    extui=lambda _, a: a.astype(np.int64),
    constant=lambda kind, value: lanes(value, kind),
    bitcast=lambda _, a: np.ascontiguousarray(a).view(np.float32),
    extf=lambda _, a: a.astype(np.float32),
    truncf=lambda kind, a: a.astype(kind),
    addf=_float(lambda a, b: a + b),
    mulf=_float(lambda a, b: a * b),
)
_type = lambda value: SimpleNamespace(get=lambda: value)  # noqa: E731
IR = SimpleNamespace(
    BF16Type=_type(FLOAT["bf16"]),
    F16Type=_type(FLOAT["f16"]),
    F32Type=_type(FLOAT["f32"]),
    IntegerType=SimpleNamespace(get_signless=lambda bits: {1: bool, 32: np.uint32, 64: np.int64}[bits]),
)
LLVM = SimpleNamespace(
    PointerType=SimpleNamespace(get=lambda _: None),
    inttoptr=lambda _, address: address,
    store=store_global,
    load=lambda kind, address: load_global(next(n for n, d in FLOAT.items() if d == kind), address),
)
MGPU = SimpleNamespace(warp_idx=lambda sync: u32(warp.number))
_nothing = lambda *_, **__: None  # noqa: E731
PTX = {
    "arith": ARITH,
    "i32_type": lambda: np.uint32,
    "i64_type": lambda: np.int64,
    "f32_type": lambda: np.float32,
    "const": u32,
    "f32": lambda value: lanes(value, np.float32),
    "global_address": lambda ref: lanes(ref << 32, np.int64),
    "shared_address": lambda _: Int(u32(0)),
    "special": special,
    "lop3_and_or": lambda a, mask, bits: (a & mask) | bits,
    "prmt": prmt,
    "packed": packed,
    "load_shared": lambda at, n: [Int(np.ascontiguousarray(w)) for w in read(at, 4 * n, np.uint32).T],
    "load_shared_u16": lambda at: Int(read(at, 2, np.uint16)[:, 0].astype(np.uint32)),
    "load_shared_f32": lambda at: read(at, 4, np.float32)[:, 0],
    "store_shared_f32": store_shared_f32,
    "ldmatrix_x4": ldmatrix_x4,
    "mma_m16n8k16": mma_m16n8k16,
    "fma_f32": fma,
    "half_to_f32": lambda word, high: halves(word, "f16")[:, int(high)],
    "bulk_load": copy,
    "bulk_load_keep": copy,
    "mbarrier_init": init,
    "mbarrier_expect": arrive,
    "mbarrier_arrive": arrive,
    "mbarrier_wait": wait,
    "syncthreads": lambda: warp.block.everyone.wait(PATIENCE),
    "elect": lambda: LANE == 0,
    "when": when,
    "loop": loop,
    "asm": _nothing,
    "keep_alive": _nothing,
    "set_registers": _nothing,
    "syncwarp": _nothing,
    "fence_mbarrier_init": _nothing,
}


def run(monkeypatch: Any, modules: Sequence[Any], emit: Callable[..., None], *cluster: Block) -> None:
    """emit(*refs) on every warp of a cluster; refs are the arrays' numbers. `modules` use MLIR beside `ptx`."""
    for block in cluster:
        block.cluster = list(cluster)
    for name, value in PTX.items():
        monkeypatch.setattr(ptx, name, value)
    for module in modules:
        for name, value in (("arith", ARITH), ("ir", IR), ("llvm", LLVM), ("mgpu", MGPU)):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, value)
        for name in ("lop3_and_or", "packed", "prmt"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, PTX[name])

    def work(block: Block, number: int) -> None:
        warp.block, warp.number, warp.mask = block, number, np.ones(32, bool)
        try:
            emit(*range(len(block.arrays)))
        except BaseException as error:
            for one in cluster:
                with one.changed:
                    one.failed = one.failed or error
                    one.changed.notify_all()
                one.everyone.abort()

    threads = [threading.Thread(target=work, args=(block, i)) for block in cluster for i in range(block.warps)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if cluster[0].failed:
        raise cluster[0].failed
    for address, barrier in (pair for block in cluster for pair in block.barriers.items()):
        assert barrier.bytes == 0, f"a copy to the barrier at {address} was never expected, or not made"
