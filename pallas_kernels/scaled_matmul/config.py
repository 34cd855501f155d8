"""Tile configuration of the Hopper kernel: what can be tuned, what is legal, and the heuristic."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import Any

SMEM_BYTES = 227 * 1024  # per thread block on Hopper
EXCHANGE_PADDING = 8  # columns behind a row of partial sums, so that eight rows' pairs of columns hit different banks
SCALE_CHUNK = 4  # K blocks whose x scales travel in one copy: 16 bytes, the least that TMA moves


@dataclasses.dataclass(frozen=True)
class Config:
    """Tiles of one thread block and how its warpgroups share them.

    The x tile is [wgs_m * 64 * m_groups, tile_k], the weight tile [wgs_n * wg_n, tile_k]; consumer warpgroup (i, j)
    computes rows i and columns j of the output tile (of every wgs_k-th stage). One more warpgroup feeds `stages`
    buffers of both by TMA.
    """

    wg_n: int  # output columns of one warpgroup: multiple of 16, at most 256
    wgs_m: int = 1
    wgs_n: int = 1
    wgs_k: int = 1  # groups of warpgroups that take the stages in turn and add their sums at the end
    m_groups: int = 1  # 64-row wgmma tiles per warpgroup; with block scales multiplied one after the other
    tile_k: int = 128  # multiple of 128
    stages: int = 4
    promote: bool = False  # add each tile_k partial sum in float32; block scales always do, every 128
    epilogue_n: int = 64  # columns staged at a time for the copy out: 16, 32 or 64, dividing wg_n; two buffers each
    cluster: int = 1  # thread blocks that share a multicast tile
    cluster_axis: str = "m"  # "m": they differ in m and share the weight tile; "n": share the x tile; "k": split K
    early_launch: bool = False  # fetch the first weights while the kernel before still runs; see `mosaic_sm90`
    teams: int = 1  # 2: ping-pong; teams of warpgroups take output tiles in turn, one stores while the other multiplies
    overlap: int = 1  # block scales: K steps in a row of which each is promoted while the next is multiplied
    out_slots: int = 2  # staging buffers of `epilogue_n` columns
    one_commit: bool = False  # all columns are staged, then copied out: one barrier a tile; as many slots as pieces
    deferred: bool = False  # a tile is rounded, and stored piece by piece during the first K steps of the next
    turns: bool = False  # block scales: two warpgroups issue their products in turn, one promotes meanwhile
    overwrite: bool = False  # block scales of fp8: `product`'s multiplication; needed for several m_groups
    late_release: bool = False  # block scales: a stage is given back under the next one's products
    one_arrival: bool = False  # a stage is given back by one thread of a warpgroup, behind a barrier of its own
    late_scales: bool = False  # a tile's vectors follow its last K step, so that operands need not wait for a store
    minor: str = "m"  # tile order: "m" walks m fastest inside stripes of `stripe` tiles
    stripe: int = 8

    @property
    def tile_m(self) -> int:
        return 64 * self.m_groups * self.wgs_m

    @property
    def tile_n(self) -> int:
        return self.wg_n * self.wgs_n

    @property
    def consumers(self) -> int:
        return self.wgs_m * self.wgs_n * self.wgs_k * self.teams

    @property
    def split_k(self) -> int:
        """Thread blocks that each sum a part of K of one output tile; block i finishes the rows of its warpgroup i."""
        return self.cluster if self.cluster_axis == "k" else 1

    @property
    def registers(self) -> int:
        """Registers of a consumer thread once the producer has given up all but 40 of its own (setmaxnreg)."""
        if self.consumers == 1:  # nobody gives or takes any
            return 255
        at_launch = 65536 // (128 * (self.consumers + 1)) // 8 * 8
        return min(240, (at_launch * (self.consumers + 1) - 40) // self.consumers // 8 * 8)

    def load_m(self, m: int) -> int:
        """Rows of x that are copied: a small M leaves the rest of the 64-row wgmma tile alone."""
        return min(self.tile_m, -(-m // 8) * 8)

    def operand_rows(self, m: int) -> int:
        """Rows of tile_k bytes that hold all stages: every x tile, then every weight tile.

        wgmma reads 64 rows of x whatever M is; behind a short x tile it finds other tiles. What it makes of them
        stays in output rows that are never stored.
        """
        return max(self.stages * (self.load_m(m) + self.tile_n), (self.stages - 1) * self.load_m(m) + self.tile_m)

    def smem_bytes(self, m: int, k: int, out_bytes: int = 2, block: bool = False) -> int:
        operands = self.tile_k * self.operand_rows(m)
        owners = self.wgs_m * self.wgs_n * self.teams  # warpgroups that hold a finished sum
        staging = owners * min(self.out_slots, self.wg_n // self.epilogue_n) * 64 * self.m_groups * self.epilogue_n
        exchange = 4 * (self.wgs_k - 1) * self.tile_m * self.tile_n
        if self.split_k > 1:
            exchange = 4 * self.wgs_n * 64 * self.m_groups * (self.wg_n + EXCHANGE_PADDING)
        scales = 4 * (self.tile_m + 2 * (self.tile_n + 128)) * self.teams
        if block:
            scales += 4 * SCALE_CHUNK * self.scale_slots(k) * self.tile_m
        return operands + staging * out_bytes + exchange + scales + 4096  # barriers, alignment

    @property
    def pieces(self) -> int:
        """Copies out of a warpgroup's part of a tile."""
        return self.wg_n // self.epilogue_n

    @property
    def steps_per_chunk(self) -> int:
        """K steps that one copy of x's block scales serves."""
        return max(1, 128 * SCALE_CHUNK // self.tile_k)

    def k_steps(self, k: int) -> int:
        """K steps of one thread block for one output tile."""
        return -(-k // (self.tile_k * self.split_k))

    def chunks(self, k: int) -> int:
        """Copies of x's block scales that one thread block takes for one output tile."""
        return -(-self.k_steps(k) // self.steps_per_chunk)

    def scale_columns(self) -> int:
        """128-columns of the weight whose scale is one number: all of a warpgroup's, or the widest part of them."""
        return math.gcd(self.wg_n, 128)

    def refusal(self, m: int, n: int, k: int, block: bool) -> str | None:
        """Why the kernel does not take this config for these shapes, or None."""
        steps = -(-k // self.tile_k)
        if block and self.wg_n > 128 + self.scale_columns():
            return f"a warpgroup's columns may touch two scale blocks, wg_n {self.wg_n} touches more"
        if block and self.wg_n % 128 and self.scale_columns() % self.epilogue_n:
            return f"epilogue_n {self.epilogue_n} must divide the {self.scale_columns()} columns of one scale"
        if self.stages % self.wgs_k or steps % self.wgs_k:
            return f"wgs_k {self.wgs_k} must divide the stages and K steps of {self}"
        if self.teams > 1 and self.wgs_k > 1:
            return f"teams of warpgroups that split K: not both in {self}"
        if self.overlap > 1 and block and (self.tile_k != 128 or self.k_steps(k) % self.overlap or self.wgs_k > 1):
            return f"overlap takes tile_k 128, a multiple of itself of K steps and wgs_k 1, got {self} for K = {k}"
        if self.late_release and (not block or self.wgs_k > 1 or self.overlap > 1 or self.stages < 2):
            return f"late_release is for block scales, two stages, wgs_k and overlap of 1: {self}"
        if self.overwrite and (not block or self.overlap > 1):
            return f"overwrite is for block scales without overlap: {self}"
        if block and self.m_groups > 1 and not self.overwrite:
            return f"block scales take several m_groups with overwrite only: {self}"
        if block and self.m_groups > 1 and (self.wgs_k * self.split_k * self.overlap > 1 or self.deferred):
            return f"block scales take several m_groups without parts of K, overlap or deferred stores: {self}"
        if self.one_commit and (self.out_slots < self.pieces or self.deferred):
            return f"one_commit takes out_slots for {self.pieces} pieces and no deferred stores: {self}"
        if self.deferred and (self.teams * self.wgs_k * self.split_k > 1 or self.overlap > 1 or self.promote):
            return f"deferred stores take neither teams, parts of K nor promotion of row scales: {self}"
        if self.deferred and self.k_steps(k) < self.pieces:
            return f"deferred stores need a K step for each of {self.pieces} pieces, K = {k} has {self.k_steps(k)}"
        if self.turns and (not block or self.wgs_m * self.wgs_n != 2 or self.consumers != 2 or self.overlap > 1):
            return f"turns are for block scales and two warpgroups without overlap: {self}"
        if self.split_k > 1:
            if self.wgs_m != 2 or self.cluster != 2 or self.teams > 1 or self.wgs_k > 1 or self.early_launch:
                return f"a cluster that splits K takes two blocks of wgs_m 2 and teams, wgs_k of 1: {self}"
            if steps % self.cluster or (block and self.k_steps(k) * self.tile_k % (128 * SCALE_CHUNK)):
                return f"parts of K must be equal and whole chunks of scales: {self} for K = {k}"
        return None

    def scale_slots(self, k: int) -> int:
        """x-scale chunks in flight: a slot may be refilled only when the stages that used it are free again.

        The stages in flight are consecutive K steps; each end of a tile among them may cut a chunk short.
        """
        steps = self.k_steps(k)
        cuts = -(-self.stages // steps) if steps % self.steps_per_chunk else 0
        return -(-(self.stages + self.steps_per_chunk - 1) // self.steps_per_chunk) + 1 + cuts


def fill_stages(config: Config, m: int, k: int, out_bytes: int = 2, block: bool = False) -> Config:
    """The same config with as many stages as shared memory holds and the K loop can use."""
    steps = config.k_steps(k) * config.teams  # a team's first steps may be fetched during the other's last
    least = -(-2 // config.wgs_k) * config.wgs_k
    best = dataclasses.replace(config, stages=least)
    for stages in range(least, min(steps, 16) + 1, config.wgs_k):
        deeper = dataclasses.replace(config, stages=stages)
        if deeper.smem_bytes(m, k, out_bytes, block) > SMEM_BYTES:
            break
        best = deeper
    return best


def _epilogue(wg_n: int, n: int, most: int = 32) -> int:
    """Columns staged at a time. 64 would cost wide tiles a stage and was no faster in narrow ones (H200)."""
    return next((e for e in (64, 32) if e <= most and wg_n % e == 0 and n % e == 0), 16)


def _round_up(x: int, to: int) -> int:
    return -(-x // to) * to


# Time of one 128 x t tile per K step, in columns: t + 52. From M = 256, K = 4096 and 14336 on an H200, all tiles in one
# round: t = 64 took 9.5 and 24.9 us, t = 128 took 13.1 and 36.8 us, some 3 us of each for the launch.
_TILE_OVERHEAD = 52


def heuristic(m: int, n: int, k: int, *, block: bool, sms: int = 132, fp8: bool = True) -> Config:
    """A config for any shape, by the rules that the H200's measurements left standing.

    M <= 64 reads weights and waits: one column of tiles, as wide as makes the fewest rounds over all multiprocessors,
    each fed by the deepest pipeline that fits, with long K steps (few barriers, few promotions): 512 where a tile is
    at most 32 wide (down, M = 16: 16.9 us against 17.4 at 256 and 24 at 128), 256 to 64.
    Above, 128-row tiles of two warpgroups, as wide as makes rounds * (width + _TILE_OVERHEAD) least; steps of 128
    (256 costs half the stages: o at M = 256 took 9.5 us against 10.4), but 256 for block scales, which wait half as
    often (qkv at M = 256: 15.2 us against 16.9; ptxas awaits both partial sums before it promotes the first).
    Three rounds of tiles and more (M = 4096, an H100: bench/results/scaled_variants_h100.json): 256-wide tiles are
    stored under the next one's products (gate_up 681 -> 648 us, o 98.6 -> 93.6; int8 with a long K, down, without
    waiting for its scales: 319 -> 314). With block scales 192-wide tiles in clusters of two where they make fewer
    rounds (gate_up 914 -> 782 us), else two warpgroups take turns (down 450 -> 429, o 124 -> 119).
    fp8 on an H200 (bench/results/scaled_variants.json): scales late for a long K too (down 333 -> 319 us), pairs of
    blocks share the weight tile where there are many rounds (gate_up 643 -> 633, in a chain 680 -> 655; not qkv).
    """
    if m <= 64:
        if block:  # a 128-column scale block of its own for each warpgroup, or a whole part of one
            tile_n = next((t for t in (32, 64, 128) if -(-n // t) <= sms), 256)
        else:
            rounds = -(-n // (sms * 256))
            tile_n = min(256, _round_up(-(-n // (sms * rounds)), 16))
        wgs_n = 2 if tile_n > 64 and tile_n % 32 == 0 else 1
        tile_k = 512 if tile_n <= 32 or (block and tile_n <= 64) else 256 if tile_n <= 64 else 128
        wg_n = tile_n // wgs_n
        config = Config(wg_n, wgs_n=wgs_n, tile_k=tile_k, promote=True, epilogue_n=_epilogue(wg_n, n))
    else:
        m_tiles = -(-m // 128)
        if fp8 and block and m_tiles == 2:
            return _block_scales_256(m, n, k, sms)
        widths = (192, 128, 64, 32) if block and m_tiles > 2 and m_tiles % 2 == 0 else (128, 64, 32)
        rounds_of = {t: -(-m_tiles * -(-n // t) // sms) for t in (widths if block else range(256, 16, -16))}
        tile_n = min(rounds_of, key=lambda t: rounds_of[t] * (t + _TILE_OVERHEAD))
        config = Config(tile_n, wgs_m=2, tile_k=256 if block else 128, stripe=16, epilogue_n=_epilogue(tile_n, n))
        if block and tile_n == 192:
            config = dataclasses.replace(config, tile_k=128, cluster=2)
        elif block and tile_n == 128 and rounds_of[tile_n] > 2 and m_tiles > 2:
            config = dataclasses.replace(config, turns=True)
        elif tile_n == 256 and rounds_of[tile_n] > 2 and config.k_steps(k) >= config.pieces:
            config = dataclasses.replace(config, deferred=True, late_scales=fp8 or k <= 8192)
            if fp8 and rounds_of[tile_n] > 8 and m_tiles % 2 == 0:
                config = dataclasses.replace(config, cluster=2, stripe=8)
    return config if k >= config.tile_k else dataclasses.replace(config, tile_k=_round_up(k, 128))


def _block_scales_256(m: int, n: int, k: int, sms: int) -> Config:
    """fp8 with block scales, M of 129 to 256 (bench/results/scaled_variants.json: CUPTI, an H200, M = 256).

    Tiles of all 256 rows where 128-wide ones of 128 rows make more than one round (gate_up 59.8 -> 56.3 us). In one
    round: a long K in two halves by a cluster (down 36.3 -> 31.4), else the narrowest that fit, 64 in steps of 256 by
    turns (o 12.0 -> 11.4), 96 with the deepest pipeline (qkv 16.2 -> 14.7).
    """
    lean: dict[str, Any] = dict(wgs_m=2, overwrite=True, late_release=True)
    tiles = {width: 2 * -(-n // width) for width in (32, 64, 96, 128)}
    if tiles[128] > sms:
        epilogue_n = _epilogue(128, n, most=64)
        slots = max(2, 128 // epilogue_n)
        return Config(128, m_groups=2, epilogue_n=epilogue_n, out_slots=slots, one_commit=True, **lean)
    halves = Config(128, epilogue_n=_epilogue(128, n), cluster=2, cluster_axis="k", **lean)
    if k >= 8192 and 2 * tiles[128] <= sms and halves.refusal(m, n, k, True) is None:
        return halves
    width = next(width for width in tiles if tiles[width] <= sms)
    if width <= 64 and k % 256 == 0:
        return Config(width, tile_k=256, epilogue_n=_epilogue(width, n), turns=True, stripe=16, **lean)
    return Config(width, epilogue_n=_epilogue(width, n), stripe=16, **lean)


def search_space(m: int, n: int, k: int, *, block: bool, sms: int = 132) -> Iterator[Config]:
    """Legal configs worth timing for one shape, some 20 to 40: the heuristic's width and its neighbours."""
    first = heuristic(m, n, k, block=block, sms=sms)
    widths = {w for w in (first.tile_n - 16, first.tile_n, first.tile_n + 16, 2 * first.tile_n, 128) if 16 <= w <= 256}
    grids: list[dict[str, Any]]
    if m <= 64:
        grids = [
            dict(wgs_n=wgs_n, wgs_k=wgs_k, tile_k=tile_k, promote=True)
            for wgs_n, wgs_k in ((1, 1), (2, 1), (1, 2))
            for tile_k in (128, 256, 512)
        ]
    else:
        shared: list[dict[str, Any]] = [{}, dict(cluster=2), dict(cluster=2, cluster_axis="n")]
        grids = [dict(wgs_m=2, tile_k=tile_k, stripe=16, **more) for tile_k in (128, 256) for more in shared]
        rows256 = dict(wgs_m=2, m_groups=2, stripe=8, **(dict(overwrite=True, late_release=True) if block else {}))
        grids += [rows256, dict(wgs_m=2, wgs_k=2, stripe=16), dict(wgs_m=2, stripe=4)]
    for width, grid in itertools.product(sorted(widths), grids):
        shape: dict[str, Any] = dict(grid)
        wgs_n = shape.get("wgs_n", 1)
        if width % (16 * wgs_n):
            continue
        wg_n = width // wgs_n
        config = fill_stages(Config(wg_n, **shape, epilogue_n=_epilogue(wg_n, n)), m, k, 2, block)
        # Sums that a consumer holds, of 64 rows each: block scales have one of products beside the promoted ones.
        sums = config.m_groups + 1 if block else 2 * config.m_groups if config.promote else config.m_groups
        if wg_n // 2 * sums > config.registers - 40 or (block and wg_n > 128):
            continue
        if config.smem_bytes(m, k, 2, block) <= SMEM_BYTES and -(-k // config.tile_k) % config.wgs_k == 0:
            yield config
