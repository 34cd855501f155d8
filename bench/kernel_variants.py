"""Structures worth timing beside the heuristics' choice, for `bench.kernel_scaled --variants`, safest first.

Each names what it is meant to show. By machine code and arithmetic (no device; see the docstrings of the kernels):
- fp8 per row at M = 4096 takes 0.69 us a K step of a 128 x 256 tile and 2.15 us more a tile (fit of K = 4096 against
  14336): the epilogue, during which nothing multiplies. `teams` (ping-pong), `out_slots`, `late_scales` are for that.
- One such step reads 48 KB through the L2: 9.4 TB/s over 132 multiprocessors, near what the L2 gives; so do the blocks'
  32 KB a 128 x 128 step (10.1 TB/s). `cluster` 2 reads 32 KB and 24 KB, ping-pong with 128 x 192 tiles 53 B a clock
  instead of 64.
- Block scales: ptxas puts both waits in front of all 128 FFMA of a 256-step, so that promotion hides behind nothing of
  its own warpgroup. `overlap` keeps a wgmma in flight under each.
- A row tile's 2.15 us: scaling and rounding are 320 instructions a warp, 0.4 us; the rest waits for eight copies out,
  each with two barriers, through two buffers. `deferred` stores them under the next tile's products; `one_commit` has
  one barrier for all.
- Two warpgroups that run in step promote at the same time, and no product runs meanwhile: a step of 256 takes 1024
  clocks of tensor core and a promotion some 250. `turns` makes one promote while the other multiplies.
- M = 256: a tile of 128 x 64 asks 96 bytes a clock of the L2; two blocks that split K and take 128 x 128 ask 64.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from pallas_kernels.scaled_matmul.cases import Case
from pallas_kernels.scaled_matmul.config import SMEM_BYTES, Config, fill_stages

MS = (64, 1, 256, 4096)


def risk(config: Config) -> int:
    """Which pass times it: one process loses what follows a kernel that hangs."""
    return 0 if config.cluster == 1 else 1 if config.split_k == 1 else 2


def _sketch(mode: str, m: int, shape: str, n: int) -> list[Config]:
    C = Config
    pair: dict[str, Any] = dict(cluster=2)
    if m == 4096 and mode != "block":
        wide = C(256, 2, epilogue_n=32, stripe=16)
        pp = C(128, m_groups=2, teams=2, epilogue_n=32, stripe=16)
        pp192 = C(192, m_groups=2, teams=2, epilogue_n=32, stripe=16)
        other = dataclasses.replace
        return [
            other(wide, deferred=True),
            other(wide, deferred=True, late_scales=True),
            other(wide, deferred=True, epilogue_n=64, out_slots=1),
            other(wide, late_scales=True),
            other(wide, late_scales=True, out_slots=3),
            other(wide, late_scales=True, epilogue_n=64, out_slots=4),  # 3 stages; all columns of a tile staged
            other(wide, late_scales=True, epilogue_n=64, out_slots=4, one_commit=True),
            other(wide, stripe=8, late_scales=True),
            other(wide, minor="n", stripe=8, late_scales=True),
            pp192,
            other(pp192, stripe=8),
            C(128, m_groups=3, teams=2, epilogue_n=32, stripe=11),  # 192 x 128
            pp,
            other(wide, deferred=True, late_scales=True, **pair),
            other(wide, late_scales=True, out_slots=3, **pair),
            other(wide, late_scales=True, out_slots=3, cluster_axis="n", **pair),
            other(pp192, **pair),
            other(pp192, cluster_axis="n", **pair),
            other(pp, **pair),
            C(256, teams=2, epilogue_n=32, stripe=32, **pair),  # 64 x 256, as CUTLASS's ping-pong
        ]
    if m == 4096:
        wide = C(128, 2, epilogue_n=32, stripe=16)
        other = dataclasses.replace
        return [
            other(wide, turns=True),
            other(wide, turns=True, tile_k=256),
            other(wide, turns=True, deferred=True, epilogue_n=64, out_slots=1),
            other(wide, deferred=True),
            other(wide, overlap=4),
            other(wide, overlap=2),
            other(wide, overlap=4, late_scales=True, out_slots=3),
            other(wide, overlap=4, out_slots=4, one_commit=True),
            C(112, 2, epilogue_n=16, stripe=16, overlap=8),
            C(192, 2, epilogue_n=32, stripe=16),
            C(160, 2, epilogue_n=32, stripe=16),
            C(128, 3, epilogue_n=32, stripe=11),
            other(wide, turns=True, deferred=True, epilogue_n=64, out_slots=1, **pair),
            other(wide, tile_k=256, **pair),
            other(wide, overlap=4, **pair),
            other(wide, overlap=4, cluster_axis="n", **pair),
            C(192, 2, epilogue_n=32, stripe=16, **pair),
            C(128, teams=2, tile_k=256, epilogue_n=32, stripe=32, **pair),
        ]
    if m == 256 and mode != "block":
        tile = {"qkv": 96, "o": 64, "down": 64, "gate_up": 224}[shape]
        split = C(128, 2, epilogue_n=32, cluster=2, cluster_axis="k")
        found = [
            C(tile, 2, epilogue_n=32, late_scales=True, stripe=16),
            C(tile, 2, epilogue_n=32, stripe=16, **pair),
            split,
            dataclasses.replace(split, wg_n=192 if shape == "qkv" else 256 if shape == "gate_up" else 128, m_groups=1),
        ]
        return found + ([C(224, m_groups=1, teams=2, epilogue_n=32)] if shape == "gate_up" else [])
    if m == 256:
        tile = {"qkv": 96, "o": 64, "down": 64, "gate_up": 112}[shape]
        narrow = C(tile, 2, epilogue_n=16 if tile == 112 else 32, stripe=16)
        split = C(128, 2, epilogue_n=32, cluster=2, cluster_axis="k")
        other = dataclasses.replace
        return [
            narrow,
            other(narrow, turns=True),
            other(narrow, turns=True, tile_k=256),
            C(128, 2, epilogue_n=32, stripe=16, turns=True, tile_k=256),
            *([C(128, 2, epilogue_n=64, out_slots=1, stripe=16, turns=True, deferred=True)] if tile == 112 else []),
            *([C(64, 4, epilogue_n=32, stripe=16)] if tile == 112 else []),
            other(narrow, overlap=4),
            *([other(narrow, overlap=8)] if tile == 112 else []),  # 64 and 96 wide it spills
            C(128, 2, epilogue_n=32, stripe=16, overlap=4),
            C(192, 2, epilogue_n=32, stripe=16),
            other(narrow, overlap=4, cluster_axis="n", **pair),
            other(narrow, overlap=4, **pair),
            split,  # with overlap 4 ptxas spills and serializes it
            other(split, turns=True),
            C(192, 2, epilogue_n=32, cluster=2, cluster_axis="k"),
        ]
    if mode == "block":  # M <= 64: promotion every 128 of long steps
        tile = 128 if n > 16384 else 64 if shape == "qkv" else 32
        return [C(tile // 2 if tile == 128 else tile, wgs_n=2 if tile == 128 else 1, epilogue_n=32, overlap=4)]
    return []


def matmul_variants(shape: str, n: int, k: int, mode: str, m: int) -> list[Config]:
    """Legal ones of the list above, with as many stages as fit, in the order of `risk`."""
    block, found = mode == "block", []
    for sketch in _sketch(mode, m, shape, n):
        config = fill_stages(sketch, m, k, 2, block)
        legal = config.refusal(m, n, k, block) is None and config.smem_bytes(m, k, 2, block) <= SMEM_BYTES
        if legal and config not in found:
            found.append(config)
    return sorted(found, key=risk)


# Small cases with tails and bias for every structure, checked on the device against float64.
CHECKS: tuple[tuple[Case, Config], ...] = (
    (Case(4100, 3072, 1152, bias=True), Config(256, 2, epilogue_n=32, deferred=True)),
    (Case(4100, 3072, 1152, bias=True), Config(256, 2, epilogue_n=64, out_slots=1, deferred=True, late_scales=True)),
    (Case(4100, 3072, 1152, scales="block"), Config(128, 2, epilogue_n=32, turns=True)),
    (Case(700, 2048, 1024, scales="block"), Config(128, 2, tile_k=256, epilogue_n=32, stages=3, turns=True)),
    (Case(4100, 2048, 1152, scales="block"), Config(128, 2, epilogue_n=64, out_slots=1, turns=True, deferred=True)),
    (Case(700, 4096, 640, bias=True), Config(256, 2, epilogue_n=64, stages=3, out_slots=4, one_commit=True)),
    (Case(700, 1536, 896, bias=True), Config(128, m_groups=2, teams=2, epilogue_n=32)),
    (Case(4100, 3072, 1152, bias=True), Config(192, m_groups=2, teams=2, epilogue_n=32, stages=3)),
    (Case(700, 1536, 896, scales="block", bias=True), Config(128, teams=2, tile_k=128, epilogue_n=32)),
    (Case(700, 4096, 640, bias=True), Config(256, 2, epilogue_n=32, late_scales=True, out_slots=3)),
    (Case(700, 1120, 1024, scales="block", bias=True), Config(112, 2, epilogue_n=16, overlap=4)),
    (Case(700, 2048, 1024, scales="block"), Config(128, 2, epilogue_n=32, overlap=4)),
    (Case(700, 2000, 896, scales="block", bias=True), Config(192, 2, epilogue_n=16)),
    (Case(700, 1600, 896, scales="block"), Config(160, 2, epilogue_n=32)),
    (Case(700, 1536, 896, bias=True), Config(128, m_groups=2, teams=2, epilogue_n=32, cluster=2)),
    (Case(700, 1536, 896, scales="block"), Config(128, teams=2, epilogue_n=32, cluster=2)),
    (Case(300, 5120, 1024, bias=True), Config(128, 2, epilogue_n=32, cluster=2, cluster_axis="k")),
    (Case(300, 5120, 2048, scales="block"), Config(128, 2, epilogue_n=32, cluster=2, cluster_axis="k")),
)


def quant_variants(op: str, m: int) -> list[Any]:
    """Splits of a row: over a cluster for few rows, two blocks or a prefetched row a multiprocessor for many.

    SiLU of one row of 14336: 408 instructions of 28 warps on one multiprocessor are 1.4 us of issue slots, half of the
    3.0 us measured. At M = 4096 its 51 registers let one block of 896 threads live on a multiprocessor: loads (2.06 us
    a row at 4.6 TB/s) and instructions (1.5 us) take turns.
    """
    from pallas_kernels.quantize.mosaic_sm90 import Split

    if op == "silu" and m <= 64:
        return [Split(7, 2, 1, 2), Split(2, 2, 1, 7), Split(1, 2, 2, 7), Split(7, 1, 1, 4), Split(4, 1, 1, 7)]
    if op == "silu":
        return [
            Split(7, 2, 2, persistent=True),
            Split(4, 1, 7, persistent=True),
            Split(2, 2, 7),
            Split(4, 1, 7),
            Split(7, 2, 1, 2),
            Split(2, 2, 1, 7),
        ]
    if m > 64:
        return [Split(1, 2, 4, persistent=False), Split(2, 2, 2), Split(4, 2, 1), Split(2, 1, 4), Split(4, 1, 2)]
    return []


def prefill_configs() -> list[Any]:
    """128 keys a block in turns is what serves; 160 has not been timed since P V takes all of its keys."""
    from pallas_kernels.paged_attention.config import PrefillConfig as P

    return [P(), P(160), P(144), P(112, 3), P(96, 3), P(128, 2, False), P(144, 2, False)]
