"""Structures worth timing beside the heuristics' choice, for `bench.kernel_scaled --variants`, safest first.

What an H100 said of teams, one_commit, late_scales, three warpgroups, 160-wide tiles and split K is on record
(bench/results/scaled_variants_h100.json); here stand those that it left open, and later ones. By machine code, in
clocks of a K block of 128 (of a warpgroup's 64 x n tile, which takes the tensor cores 2 n), with block scales:
- A 128 x 192 tile of a cluster: 384 of products; between a warpgroup's last one and its next 96 FFMA and some 250 more
  (x's scales read after the wait, a fence and a barrier to give the stage back, 27 instructions for descriptors). Two
  warpgroups in step leave the tensor cores idle meanwhile. x's scales are now always read under the products,
  `late_release` gives the stage back there, `overwrite` needs 17 instructions: 96 FFMA and some 60.
- A 256 x 128 tile (`m_groups` 2: each warpgroup multiplies 64 rows and then 64 more): 4 x 256 of products, 80 and 130
  between two of a warpgroup. It reads 48 KB a 1024 clocks through the L2, 128 x 192 reads 40 KB a 768; every shape
  takes whole rounds (o: 4, 97 % full; 192 wide 6, 89 %). With one commit the epilogue has two barriers.
- M = 256: gate_up's 256 tiles of 256 x 112 are two rounds, 97 % full, each W read once; 128 x 128 took four, 85 %.
- A stage is now given back behind the last wait for products, not behind the next step's first (`late_release`) nor
  behind the promotion: 256 x 128 tiles have three stages, of which the copies had less than two.
- `turns` makes one warpgroup promote while the other multiplies; `cluster` 2 on "m" shares w, on "n" shares x.
- fp8 per row at M = 4096 is limited by the power: a tile that two blocks share costs the L2 less of it.
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


def _block_many(shape: str) -> list[Config]:
    """M = 4096: 256 x 128 tiles. With less room for the output a fourth stage fits, in which copies have a step more
    to come. Alone a block reads 48 KB a K step through the L2, 8 TB/s of all; of two that share w 40 each, x 32."""
    del shape
    other = dataclasses.replace
    tall = Config(128, 2, m_groups=2, epilogue_n=64, one_commit=True, stripe=8, overwrite=True)
    deep = dict(epilogue_n=32, out_slots=1, one_commit=False)
    share_w: dict[str, Any] = dict(cluster=2, stripe=4, one_arrival=True)
    share_x: dict[str, Any] = dict(cluster=2, cluster_axis="n", stripe=4, one_arrival=True)
    return [
        tall,
        other(tall, **deep),
        other(tall, **share_w),
        other(tall, **deep, **share_w),
        other(tall, **share_x),
        other(tall, **deep, **share_x),
        other(tall, **share_x | dict(stripe=2)),
        other(tall, **share_x | dict(stripe=8, minor="n")),
    ]


def _block_256(shape: str) -> list[Config]:
    """M = 256: 256-row tiles for gate_up, with a fourth stage; elsewhere the heuristic's, giving stages back early."""
    other = dataclasses.replace
    lean: dict[str, Any] = dict(overwrite=True)
    if shape == "gate_up":
        tall = Config(128, 2, m_groups=2, epilogue_n=64, one_commit=True, **lean)
        deep = other(tall, epilogue_n=32, out_slots=1, one_commit=False)
        narrow = other(deep, wg_n=112, epilogue_n=16, out_slots=1)
        return [
            tall,
            deep,
            other(deep, late_release=True),
            other(deep, epilogue_n=16, out_slots=2),
            narrow,
            other(narrow, out_slots=2),
            other(deep, one_arrival=True),
            other(deep, cluster=2, cluster_axis="n"),
        ]
    tile = 96 if shape == "qkv" else 64
    narrow = Config(tile, 2, tile_k=128 if shape == "qkv" else 256, epilogue_n=32, stripe=16, **lean)
    found = [narrow, other(narrow, turns=True), other(narrow, one_arrival=True), other(narrow, out_slots=1)]
    if shape == "qkv":
        return [*found, other(narrow, late_release=True, out_slots=1)]
    split = Config(128, 2, epilogue_n=32, cluster=2, cluster_axis="k", **lean)
    return [*found, split, other(split, out_slots=1), other(split, out_slots=1, late_release=True)]


def _sketch(mode: str, m: int, shape: str, n: int) -> list[Config]:
    other = dataclasses.replace
    if m == 4096 and mode != "block":
        stored = Config(256, 2, epilogue_n=32, stripe=16, deferred=True, late_scales=True)
        return [
            stored,
            other(stored, late_scales=False),
            other(stored, cluster=2, stripe=8),
            other(stored, cluster=2, cluster_axis="n"),
        ]
    if mode != "block":
        return []
    if m > 64:
        return _block_many(shape) if m > 256 else _block_256(shape)
    # M <= 64: promotion every 128 of long steps
    tile = 128 if n > 16384 else 64 if shape == "qkv" else 32
    return [Config(tile // 2 if tile == 128 else tile, wgs_n=2 if tile == 128 else 1, epilogue_n=32, overlap=4)]


def matmul_variants(shape: str, n: int, k: int, mode: str, m: int) -> list[Config]:
    """Legal ones of the list above, with as many stages as fit, in the order of `risk`."""
    block, found = mode == "block", []
    for sketch in _sketch(mode, m, shape, n):
        config = fill_stages(sketch, m, k, 2, block)
        legal = config.refusal(m, n, k, block) is None and config.smem_bytes(m, k, 2, block) <= SMEM_BYTES
        if legal and config not in found:
            found.append(config)
    return sorted(found, key=risk)


_LEAN: dict[str, Any] = dict(overwrite=True, late_release=True)
_TALL = Config(128, 2, m_groups=2, stages=3, epilogue_n=64, one_commit=True)
_DEEP = Config(128, 2, m_groups=2, stages=3, epilogue_n=32, out_slots=1, overwrite=True)
_LEAN_CHECKS = (
    (Case(4100, 2048, 1152, scales="block", bias=True), dataclasses.replace(_TALL, stages=2)),
    (Case(4100, 4096, 1536, scales="x block"), dataclasses.replace(_TALL, turns=True)),
    (Case(700, 4096, 1024, scales="w block"), dataclasses.replace(_TALL, cluster=2, turns=True)),
    (Case(700, 4096, 1024, scales="block"), dataclasses.replace(_TALL, cluster=2, cluster_axis="n")),
    (Case(300, 2240, 640, scales="block"), dataclasses.replace(_TALL, wg_n=112, epilogue_n=16, out_slots=7)),
    (Case(700, 2000, 1024, scales="block"), Config(96, 2, tile_k=256, epilogue_n=16, stages=3, turns=True)),
    (Case(700, 2000, 896, scales="block", bias=True), Config(192, 2, epilogue_n=16, cluster=2, turns=True)),
    (Case(300, 5120, 2048, scales="block"), Config(128, 2, epilogue_n=32, cluster=2, cluster_axis="k")),
)

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
    *((case, dataclasses.replace(config, **_LEAN)) for case, config in _LEAN_CHECKS),
    *((case, dataclasses.replace(config, overwrite=True)) for case, config in _LEAN_CHECKS),
    (Case(4100, 2048, 1152, scales="block", bias=True), dataclasses.replace(_DEEP, epilogue_n=16)),
    (Case(700, 4096, 1024, scales="block"), dataclasses.replace(_DEEP, stages=4, epilogue_n=16, one_arrival=True)),
    (
        Case(4100, 4096, 1536, scales="block"),
        dataclasses.replace(_DEEP, stages=4, epilogue_n=16, cluster=2, one_arrival=True),
    ),
    (Case(300, 2240, 640, scales="block"), dataclasses.replace(_DEEP, wg_n=112, epilogue_n=16)),
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
