"""The wgmma kernel's device code on numpy against float64: stages, swizzle, fragments, warpgroups along K.

Not modelled: that products run on while the warps convert, and the copies by the tensor memory accelerator, in whose
place stands what they are to do.
"""

from __future__ import annotations

import functools
import threading

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.a16 import dequant, row_scale, wgmma_produce, wgmma_sm90
from pallas_kernels.a16.cases import Case, worst
from pallas_kernels.a16.problem import DTYPES
from pallas_kernels.a16.ptx import Int
from pallas_kernels.a16.stored import BLOCK_BYTES, KIND_OF, KINDS, ROWS
from pallas_kernels.a16.wgmma_sm90 import Config, Plan
from tests.pallas_kernels import warps
from tests.pallas_kernels.test_a16 import FLOAT, pack
from tests.pallas_kernels.warps import LANE, PATIENCE, Block, halves, run, u32, warp


def plan_of(case: Case, config: Config, sms: int) -> Plan:
    kind = KINDS["u4" if case.qtype == "uint4" else KIND_OF[case.qtype]]
    rows = case.scales != "group"
    x, scale, group = DTYPES[case.x_dtype], DTYPES[case.scale_dtype], case.k if rows else case.group
    one, zero, offset = case.scales == "one", case.zero == "int", case.zero == "offset"
    return Plan(case.m, case.n, case.k, kind, x, scale, group, rows, one, zero, offset, sms, config)


def swizzled(address: np.ndarray) -> np.ndarray:
    """Bits 4 to 6 of an address in a box of 128-byte rows by bits 7 to 9."""
    return address ^ (address >> 7 & 7) << 4


def wgmma_rs(dtype: str, n: int, acc, a, at: Int) -> list[np.ndarray]:
    """A warp's 16 rows of the product: A in the fragments of mma.m16n8k16, B [n, 16] in shared memory."""
    g, t = LANE // 4, LANE % 4
    left = np.zeros((16, 16))
    for i, word in enumerate(a):
        for half, values in enumerate(halves(word, dtype).astype(float).T):
            left[g + 8 * (i % 2), 2 * t + 8 * (i // 2) + half] = values
    where = swizzled(int(at.value[0]) + np.arange(n)[:, None] * 128 + np.arange(32)[None])
    right = warp.block.shared[where].view(FLOAT[dtype]).astype(float)  # [n, 16]
    with np.errstate(invalid="ignore", over="ignore"):
        product = left @ right.T
        return [
            (v + product[g + 8 * (j // 2 % 2), 8 * (j // 4) + 2 * t + j % 2]).astype(np.float32)
            for j, v in enumerate(acc)
        ]


class Barriers:
    """Each block's named barriers."""

    def __init__(self) -> None:
        self.found: dict[tuple[int, int, int], threading.Barrier] = {}
        self.lock = threading.Lock()

    def __call__(self, index: Int | int, threads: int) -> None:
        number = index if isinstance(index, int) else int(index.value[0])
        with self.lock:
            barrier = self.found.setdefault((warp.block.index, number, threads), threading.Barrier(threads // 32))
        barrier.wait(PATIENCE)


class Copies:
    """Stands for `wgmma_produce._Copies`: the same boxes, copied at once."""

    def __init__(self, plan: Plan, ctx, b) -> None:
        self.plan, self.b = plan, b

    def _land(self, where: np.ndarray, data: np.ndarray, barrier: Int) -> None:
        block = warp.block
        with block.changed:
            block.shared[where] = data
            target = block.barriers[int(barrier.value[0])]
            target.bytes -= data.size
            target.settle()
            block.changed.notify_all()

    def x(self, ref: int, at: Int, row: Int, k0: Int, barrier: Int) -> None:
        c, p = self.plan.config, self.plan
        first, k, start = int(row.value[0]), int(k0.value[0]), int(at.value[0])
        rows = warp.block.arrays[ref].reshape(p.m, p.k * 2)[first : first + c.m_tile, 2 * k : 2 * (k + c.k_step)]
        box = np.zeros((c.m_tile, c.k_step * 2), np.uint8)
        box[: len(rows)] = rows  # rows past M arrive as zeros
        part, byte = np.divmod(np.arange(c.k_step * 2)[None], 128)
        self._land(swizzled(start + part * c.m_tile * 128 + np.arange(c.m_tile)[:, None] * 128 + byte), box, barrier)

    def weights(self, ref: int, at: Int, row: Int, column: Int, barrier: Int) -> Int:
        p = self.plan
        return self._rows(ref, at, row, int(column.value[0]), p.piece, p.k // p.kind.block_k * BLOCK_BYTES, barrier)

    def table(self, ref: int, at: Int, row: Int, group: Int, barrier: Int) -> None:
        p = self.plan
        bytes_of = len(warp.block.arrays[ref]) // (p.n // ROWS) // p.groups  # of a group's entries
        self._rows(ref, at, row, int(group.value[0]) * bytes_of, bytes_of * p.step_groups, bytes_of * p.groups, barrier)

    def _rows(self, ref: int, at: Int, row: Int, column: int, size: int, row_bytes: int, barrier: Int) -> Int:
        first, start = int(row.value[0]), int(at.value[0])
        rows = warp.block.arrays[ref].reshape(-1, row_bytes)[first : first + self.plan.row_tiles]
        data = rows[:, column : column + size]
        assert data.shape == (self.plan.row_tiles, size), "a copy past the end"
        self._land(start + np.arange(data.size).reshape(data.shape), data, barrier)
        return at + data.size


def write(plan: Plan, ctx, b, n_tile: Int, m_tile: Int, acc, s_ref, y_ref: int) -> None:
    """Stands for `wgmma_sm90._write`: the sums of a tile to y."""
    c = plan.config
    acc = wgmma_sm90._scaled(plan, b, n_tile, acc, s_ref)
    dtype = FLOAT[plan.x_dtype]
    y = warp.block.arrays[y_ref].view(dtype).reshape(plan.m, plan.n)
    for j, value in enumerate(acc):
        m = m_tile.value * c.m_tile + 8 * (j // 4) + 2 * (LANE % 4) + j % 2
        n = n_tile.value * c.rows + b.row_warp.value * ROWS + LANE // 4 + 8 * (j // 2 % 2)
        for lane in warps.active():
            if m[lane] < plan.m:
                assert y[m[lane], n[lane]] == 0, "written twice"
                y[m[lane], n[lane]] = value[lane].astype(dtype)


RANK = 1 << 24  # addresses of a cluster's shared memory: the block's rank above its own


def arrive_remote(address: Int) -> None:
    for lane in warps.active():
        rank, at = divmod(int(address.value[lane]), RANK)
        block = warp.block.cluster[rank]
        with block.changed:
            block.barriers[at].pending -= 1
            block.barriers[at].settle()
            block.changed.notify_all()


def load_remote(address: Int, cluster: bool) -> list[np.ndarray]:
    out = np.zeros((32, 4), np.float32)
    for lane in warps.active():
        rank, at = divmod(int(address.value[lane]), RANK)
        assert cluster and at % 16 == 0
        out[lane] = warp.block.cluster[rank].shared[at : at + 16].view(np.float32)
    return list(out.T)


def store_words(address: np.ndarray, words) -> None:
    for i, word in enumerate(words):
        warps.store_global(word.value, address + 4 * i)


def pack16(dtype: str, low: np.ndarray, high: np.ndarray) -> Int:
    return warps.words_of(np.stack([low, high], -1), dtype)


def either(condition: np.ndarray, then, other) -> None:
    assert condition.all() or not condition.any(), "a warp in two branches"
    (then if condition.all() else other)()


# k_groups of 1, 2, 4; clusters that split K; groups of scales over and under a warpgroup's columns; several tiles a
# block; rings that wrap.
CASES = [
    (Case("uint4", 16, 128, 512), Config(2, 16, 128), 1),
    (Case("uint4", 40, 128, 1024), Config(2, 48, 64, stages=3), 2),
    (Case("int8", 20, 64, 512), Config(1, 32, 128, stages=2), 1),
    (Case("uint4", 16, 64, 1024), Config(4, 16, 256, stages=2, k_groups=4), 1),
    (Case("uint4", 9, 128, 1024, 64, "int"), Config(4, 16, 256, k_groups=2), 1),
    (Case("uint4", 16, 64, 1024, 256), Config(4, 16, 256, k_groups=4), 1),
    (Case("uint4", 16, 64, 1024, 512, "int"), Config(2, 16, 256, k_groups=2), 1),
    (Case("int8", 30, 128, 512, 128), Config(2, 32, 128, k_groups=2), 2),
    (Case("int8", 64, 64, 512, scales="row"), Config(2, 64, 128, stages=2, k_groups=2), 1),
    (Case("uint8", 5, 64, 1024, 32, "int"), Config(4, 16, 256, stages=3, k_groups=4), 1),
    (Case("float8_e4m3fn", 16, 64, 512, scales="one"), Config(2, 16, 256, k_groups=2), 1),
    (Case("uint4", 20, 128, 512), Config(2, 32, 64, 2), 2),
    (Case("uint4", 16, 128, 1024), Config(4, 16, 256, 2, k_groups=2), 2),
    (Case("uint4", 11, 64, 1024, 64), Config(4, 16, 256, 2, k_groups=4), 2),
    (Case("int8", 64, 64, 1024), Config(4, 64, 256, 2, k_groups=4), 2),
    (Case("uint8", 40, 128, 512, zero="int", scales="row"), Config(2, 48, 128, 2, k_groups=2), 4),
]


@pytest.mark.parametrize(("case", "config", "sms"), CASES, ids=str)
def test_device_code_on_numpy(monkeypatch, case: Case, config: Config, sms: int) -> None:
    data, _, packed, _, _ = pack(case)
    plan = plan_of(case, config, sms)
    plan.check()
    q, scale, zero, *_ = packed
    y = np.zeros((case.m, case.n), FLOAT[plan.x_dtype])
    arrays = [data.x, q, scale, *([] if zero is None else [zero]), y]
    arrays = [np.ascontiguousarray(np.asarray(a)) for a in arrays]
    instructions = {
        "wgmma_rs": wgmma_rs,
        "b_descriptor": lambda address: address,
        "wgmma_wait": lambda pending, acc=(): list(acc),
        "either": either,
        "opaque": lambda value: Int(u32(value)),
        "cluster_map": lambda at, rank: at + Int.of(rank) * RANK,
        "mbarrier_arrive_remote": arrive_remote,
        "mbarrier_wait_cluster": warps.wait,
        "load_shared_f32x4": load_remote,
        "store_global": store_words,
        "pack16": pack16,
        **dict.fromkeys(("wgmma_fence", "wgmma_commit", "bulk_store_read"), lambda: None),
    }
    for first in range(0, plan.clusters * config.split, config.split):
        size, count = plan.data_bytes + 16 * plan.stages + 24, 4 * config.warpgroups + 4
        cluster = [Block(first + rank, count, size, arrays) for rank in range(config.split)]
        meet = functools.partial(threading.Barrier(count * config.split).wait, PATIENCE)
        named = {"named_barrier": Barriers(), "cluster_sync": meet, "cluster_leave": meet}
        with monkeypatch.context() as patched:
            for name, value in (instructions | named).items():
                patched.setattr(wgmma_sm90.ptx, name, value)
            patched.setattr(wgmma_produce, "_Copies", Copies)
            patched.setattr(wgmma_sm90, "_write", write)
            modules = (wgmma_sm90, wgmma_produce, row_scale, dequant)
            run(patched, modules, lambda *r: wgmma_sm90._emit(plan, None, *r, None), *cluster)
    got = arrays[-1].astype(np.float32)
    assert worst(case, data, got) <= 1 and jnp.isfinite(got).all()
