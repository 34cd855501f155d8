"""Decode attention as a warp program: every warp streams its own tokens, no barrier until the end.

A CTA serves one row and one kv head; a cluster of `split` CTAs shares the row. Tiles of 16 tokens are dealt to the
cluster's warps in turn. A warp copies a tile of keys and values with cp.async into its own ring in shared memory
(`stages` deep; the bytes in flight are what reaches HBM speed: 4.6 TB/s x ~1 us / 132 SMs = 35 KB an SM) and computes,
with tokens in the M role of mma.m16n8k16 so that the 8 columns hold the query heads of the group (no padding to 64):

    S^T [16 tokens, 8 heads] = K   [16, Dh] (ldmatrix)       @ Q^T [Dh, 8] (registers, loaded once)
    O^T [Dh, 8 heads]       += V^T [Dh, 16] (ldmatrix.trans) @ P^T [16, 8] (movmatrix of S^T's fragment)

fp8 pages are converted to f16 (exact) between ldmatrix and mma; the byte order that ldmatrix yields permutes Dh inside
groups of 16, which is undone in how Q is loaded and O is stored. At the end the warps merge through shared memory and
the CTAs of the cluster through distributed shared memory: one kernel, no workspace, no second launch.

Shared memory of a tile: blocks of [16 rows][128 bytes], 16-byte chunk c of row r at c ^ (r & 7), so that ldmatrix and
cp.async are free of bank conflicts.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

LOG2E = math.log2(math.e)
TILE = 16  # tokens: the M of mma.m16n8k16, and the smallest page
LOWEST = -1e30  # start of the running maximum: finite, so that empty warps and rows merge without NaN


@dataclasses.dataclass(frozen=True)
class Problem:
    """All that is static. Heads of one CTA: `heads` <= 16, the CTA's part of its kv head's group."""

    heads: int
    parts: int
    kv_heads: int
    head_dim: int
    page_size: int
    table_width: int
    kv_kind: str  # "bf16", "f16", "e4m3", "e5m2"
    q_kind: str  # "bf16", "f16"
    sm_scale: float
    window: int | None
    soft_cap: float | None
    k_scaled: bool
    v_scaled: bool
    warps: int
    stages: int
    split: int
    pdl: bool = False

    @property
    def fp8(self) -> bool:
        return self.kv_kind in ("e4m3", "e5m2")

    @property
    def mma_kind(self) -> str:
        return "f16" if self.fp8 else self.kv_kind

    @property
    def row_bytes(self) -> int:
        return self.head_dim * (1 if self.fp8 else 2)

    @property
    def columns(self) -> int:  # n-tiles of 8 heads
        return -(-self.heads // 8)

    @property
    def tile_bytes(self) -> int:  # in shared memory
        return -(-self.row_bytes // 128) * 128 * TILE

    @property
    def ring_bytes(self) -> int:
        """Of one warp: keys and values, and in their place at the end the partial output, which two stages of fp8
        pages under 16 heads of 128 or 256 elements would not hold."""
        return max(2 * self.stages * self.tile_bytes, self.partial_bytes)

    @property
    def o_stride(self) -> int:  # floats between heads of a partial output: 2 * stride = 8 mod 32 banks
        return self.head_dim + 4

    @property
    def partial_bytes(self) -> int:
        return 4 * 8 * self.columns * self.o_stride

    @property
    def stats_at(self) -> int:  # [warps + 1][8 * columns][max, sum] float32; the last is the CTA's
        return self.warps * self.ring_bytes

    def stats_of(self, warp: int) -> int:
        return self.stats_at + 64 * self.columns * warp

    @property
    def cta_partial_at(self) -> int:
        return self.stats_of(self.warps + 1)

    @property
    def smem_bytes(self) -> int:
        return self.cta_partial_at + (self.partial_bytes if self.split > 1 else 0)


def _swizzled(ops: Any, row: Any, chunk: Any) -> Any:
    """Byte of 16-byte `chunk` of `row` in a tile."""
    return ((chunk >> 3) << 11) + (row << 7) + (((chunk & 7) ^ (row & 7)) << 4)


def _fragment_offsets(ops: Any, p: Problem, lane: Any, *, values: bool) -> list[Any]:
    """This lane's ldmatrix.x4 row address, per pair of 16-byte chunks."""
    row8, quarter = lane & 7, lane >> 3
    # Which of (rows 8-15, second chunk) each of the four 8x8 matrices is. bf16 wants the A fragment's order: keys rows
    # then columns; values, transposed, columns then rows. fp8 converts one chunk into a whole A fragment.
    high_row, high_chunk = quarter & 1, quarter >> 1
    if values and not p.fp8:
        high_row, high_chunk = high_chunk, high_row
    row = row8 + (high_row << 3)
    return [_swizzled(ops, row, high_chunk + 2 * i) for i in range(p.row_bytes // 32)]


def _fragments(ops: Any, p: Problem, address: Any, *, values: bool) -> list[list[Any]]:
    """A fragments (16 rows x 16 k each) that one ldmatrix.x4 yields: one of 16-bit pages, two of fp8 pages."""
    r = ops.ldmatrix(address, transpose=values)
    if not p.fp8:
        return [r]
    out = []
    for low, high in ((r[0], r[1]), (r[2], r[3])):
        if values:  # bytes (t, d) (t, d+1) (t+1, d) (t+1, d+1) -> pairs of tokens
            (a0, a1), (a2, a3) = (ops.fp8_to_f16(ops.permute(x, 0x3120), p.kv_kind) for x in (low, high))
        else:
            (a0, a2), (a1, a3) = (ops.fp8_to_f16(x, p.kv_kind) for x in (low, high))
        out.append([a0, a1, a2, a3])
    return out


def _load_queries(ops: Any, p: Problem, lane: Any, first_head: Any) -> list[list[list[Any]]]:
    """B fragments [k step][column tile] of Q^T; heads past the group are zeros."""
    g, t = lane >> 2, lane & 3
    steps = p.head_dim // 16
    out: list[list[list[Any]]] = [[] for _ in range(steps)]
    for n in range(p.columns):
        head = ops.min_int(g + 8 * n, p.heads - 1)
        real = (g + 8 * n) < p.heads
        row = (first_head + head) * (2 * p.head_dim)
        for step in range(steps):
            fragment = []
            for half in range(2):
                column = (t << 2) + 2 * half if p.fp8 else (t << 1) + 8 * half
                x = ops.load_global("q", row + ((column + 16 * step) << 1))
                if p.q_kind == "bf16" and p.mma_kind == "f16":
                    x = ops.pack(*ops.unpack_bf16(x), "f16")
                fragment.append(ops.select(real, x, ops.const_i32(0)))
            out[step].append(fragment)
    return out


def stream(ops: Any, p: Problem, item: Any, rank: Any, warp: Any, lane: Any) -> None:
    """Attends over this warp's tiles; leaves maximum, sum and O (not normalized) in shared memory."""
    head = item % (p.kv_heads * p.parts)
    row, kv_head = item // (p.kv_heads * p.parts), head // p.parts
    g, t = lane >> 2, lane & 3
    stride = p.split * p.warps  # tiles between two of a warp
    length = ops.load_global("kv_len", row << 2)
    begin = ops.const_i32(0) if p.window is None else ops.max_int(length - p.window, 0)
    first = (begin >> 4) + rank * p.warps + warp
    tiles = ((length + (TILE - 1)) >> 4) - first  # of this warp and those after it
    count = ops.max_int(tiles + (stride - 1), 0) // stride

    tiles_per_page = p.page_size // TILE
    table_row = row * p.table_width

    def page_of(tile: Any) -> Any:
        return ops.load_global("page_table", (table_row + ops.min_int(tile // tiles_per_page, p.table_width - 1)) << 2)

    ring = ops.smem_base + warp * p.ring_bytes
    per_row, chunks = p.row_bytes // 16, p.row_bytes
    places = []  # (row, byte in the tile) of each chunk that this lane copies
    for j in range(chunks // 32):
        chunk = lane + 32 * j
        places.append((chunk // per_row, _swizzled(ops, chunk // per_row, chunk % per_row)))

    def copy(tile: Any, page: Any, slot: Any) -> None:
        index = (page * p.kv_heads + kv_head) * tiles_per_page + tile % tiles_per_page
        left, skipped = length - (tile << 4), begin - (tile << 4)
        address = ring + slot
        lane_bytes = lane << 4
        keys = ops.offset_pointer(ops.pointer("k_pages", index, TILE * p.row_bytes), lane_bytes)
        vals = ops.offset_pointer(ops.pointer("v_pages", index, TILE * p.row_bytes), lane_bytes)
        sizes = []
        for token, _ in places:
            seen = token < left
            if p.window is not None:
                seen = ops.both(seen, token >= skipped)
            sizes.append(ops.select(seen, ops.const_i32(16), ops.const_i32(0)))
        for j, (_, place) in enumerate(places):
            ops.copy_async(address + place, keys, 512 * j, sizes[j])
        for j, (_, place) in enumerate(places):
            ops.copy_async(address + place + p.tile_bytes, vals, 512 * j, sizes[j])

    def copy_if(i: Any, page: Any, slot: Any) -> None:
        ops.when(i < count, lambda: copy(first + i * stride, page, slot))
        ops.commit()

    pages = [page_of(first + i * stride) for i in range(p.stages)]
    for i in range(p.stages - 1):
        copy_if(ops.const_i32(i), pages[i], ops.const_i32(i * 2 * p.tile_bytes))

    q_head = row * (p.kv_heads * p.parts * p.heads) + head * p.heads
    queries = _load_queries(ops, p, lane, q_head)
    scale = ops.const_f32(p.sm_scale if p.soft_cap else p.sm_scale * LOG2E)
    if p.k_scaled:
        scale = scale * ops.load_global_f32("k_scale", kv_head << 2)
    key_at = _fragment_offsets(ops, p, lane, values=False)
    value_at = _fragment_offsets(ops, p, lane, values=True)
    m_tiles, n_tiles = p.head_dim // 16, p.columns
    zero = ops.const_f32(0.0)

    def score(x: Any) -> Any:
        """Scaled score in units of log2."""
        x = x * scale
        if p.soft_cap:  # c tanh(y) = c - 2c / (1 + exp(2y)); tanh.approx would err by 2^-11 of the cap
            e = ops.exp2(x * (2 * LOG2E / p.soft_cap))
            cap = p.soft_cap * LOG2E
            x = ops.fma(ops.reciprocal(e + 1.0), ops.const_f32(-2 * cap), ops.const_f32(cap))
        return x

    def body(i: Any, carry: list[Any]) -> list[Any]:
        slot, free, next_page = carry[:3]
        peak, total = carry[3 : 3 + 2 * n_tiles], carry[3 + 2 * n_tiles : 3 + 4 * n_tiles]
        flat = carry[3 + 4 * n_tiles :]
        out = [[flat[4 * (m * n_tiles + n) :][:4] for n in range(n_tiles)] for m in range(m_tiles)]
        ops.wait(p.stages - 2)
        ops.sync_warp()  # tile i has landed for all lanes, and all have read tile i - 1: its slot is free
        copy_if(i + (p.stages - 1), next_page, free)
        next_page = page_of(first + (i + p.stages) * stride)
        keys = ring + slot
        # Two chains of mma (33 cycles each) instead of one.
        sums = [[[zero] * 4 for _ in range(n_tiles)] for _ in range(2)]
        step = 0
        for offset in key_at:
            for a in _fragments(ops, p, keys + offset, values=False):
                for n in range(n_tiles):
                    sums[step & 1][n] = ops.mma(sums[step & 1][n], a, queries[step][n], p.mma_kind)
                step += 1
        token = ((first + i * stride) << 4) + g
        seen = []
        for at in (token, token + 8):
            seen.append(at < length if p.window is None else ops.both(at < length, at >= begin))
        alphas, weights = [], []
        for n in range(n_tiles):
            x = [score(u + v) for u, v in zip(sums[0][n], sums[1][n], strict=True)]
            x = [ops.select(seen[j >> 1], x[j], ops.const_f32(-math.inf)) for j in range(4)]
            for c in range(2):
                high = ops.max(x[c], x[2 + c])
                for distance in (4, 8, 16):
                    high = ops.max(high, ops.shuffle_xor(high, distance))
                new = ops.max(peak[2 * n + c], high)
                alphas.append(ops.exp2(peak[2 * n + c] - new))
                x[c], x[2 + c] = ops.exp2(x[c] - new), ops.exp2(x[2 + c] - new)
                total[2 * n + c] = ops.fma(total[2 * n + c], alphas[-1], x[c] + x[2 + c])
                peak[2 * n + c] = new
            weights.append([ops.movmatrix(ops.pack(x[j], x[j + 1], p.mma_kind)) for j in (0, 2)])
        m = 0
        for offset in value_at:
            for a in _fragments(ops, p, keys + offset + p.tile_bytes, values=True):
                for n in range(n_tiles):
                    scaled = [out[m][n][j] * alphas[2 * n + (j & 1)] for j in range(4)]
                    out[m][n] = ops.mma(scaled, a, weights[n], p.mma_kind)
                m += 1
        end = (p.stages - 1) * 2 * p.tile_bytes
        next_slot = ops.select(slot.equals(end), ops.const_i32(0), slot + 2 * p.tile_bytes)
        return [next_slot, slot, next_page, *peak, *total, *(r for row in out for tile in row for r in tile)]

    carry = [ops.const_i32(0), ops.const_i32((p.stages - 1) * 2 * p.tile_bytes), pages[-1]]
    carry += [ops.const_f32(LOWEST)] * (2 * n_tiles) + [zero] * (2 * n_tiles) + [zero] * (4 * m_tiles * n_tiles)
    carry = ops.loop(count, carry, body)
    ops.wait(0)
    ops.sync_warp()

    peak, total, flat = carry[3 : 3 + 2 * n_tiles], carry[3 + 2 * n_tiles : 3 + 4 * n_tiles], carry[3 + 4 * n_tiles :]
    stats = ops.smem_base + p.stats_at + warp * (64 * n_tiles)
    for n in range(n_tiles):
        for c in range(2):
            whole = total[2 * n + c]
            for distance in (4, 8, 16):
                whole = whole + ops.shuffle_xor(whole, distance)
            column = (t << 1) + (8 * n + c)
            ops.store_shared(stats + (column << 3), peak[2 * n + c], g.equals(0))
            ops.store_shared(stats + (column << 3) + 4, whole, g.equals(0))
    for m in range(m_tiles):
        for n in range(n_tiles):
            for j in range(4):
                d = (g << 1) + (16 * m + (j >> 1)) if p.fp8 else g + (16 * m + 8 * (j >> 1))
                at = ((t << 1) + (8 * n + (j & 1))) * p.o_stride + d
                ops.store_shared(ring + (at << 2), flat[4 * (m * n_tiles + n) + j])


def _merge(ops: Any, stats: list[tuple[Any, Any]], parts: list[list[Any]]) -> tuple[Any, Any, list[Any]]:
    """Sum of partial outputs with their (maximum, sum): (maximum, sum, O)."""
    peak = stats[0][0]
    for m, _ in stats[1:]:
        peak = ops.max(peak, m)
    factors = [ops.exp2(m - peak) for m, _ in stats]
    total, out = ops.const_f32(0.0), [ops.const_f32(0.0)] * 4
    for (_, s), f, x in zip(stats, factors, parts, strict=True):
        total = ops.fma(s, f, total)
        out = [ops.fma(v, f, o) for v, o in zip(x, out, strict=True)]
    return peak, total, out


def _store(ops: Any, p: Problem, item: Any, vector: Any, total: Any, out: list[Any]) -> None:
    inverse = ops.select(total.equals(0.0), ops.const_f32(0.0), ops.reciprocal(total))
    if p.v_scaled:
        kv_head = (item % (p.kv_heads * p.parts)) // p.parts
        inverse = inverse * ops.load_global_f32("v_scale", kv_head << 2)
    out = [x * inverse for x in out]
    low, high = ops.pack(out[0], out[1], p.q_kind), ops.pack(out[2], out[3], p.q_kind)
    ops.store_global2("out", (item * (p.heads * p.head_dim // 4) + vector) << 3, low, high)


def merge_warps(ops: Any, p: Problem, item: Any, thread: Any) -> None:
    """After a barrier: the CTA's sum over its warps, four elements a thread; the result, if no cluster follows."""
    vectors = p.heads * p.head_dim // 4
    for start in range(0, vectors, 32 * p.warps):
        vector = thread + start

        def one(vector: Any = vector) -> None:
            head = vector // (p.head_dim // 4)
            at = head * p.o_stride + ((vector % (p.head_dim // 4)) << 2)
            stats, parts = [], []
            for w in range(p.warps):
                s = ops.smem_base + p.stats_of(w) + (head << 3)
                stats.append((ops.load_shared(s), ops.load_shared(s + 4)))
                parts.append(ops.load_shared4(ops.smem_base + w * p.ring_bytes + (at << 2)))
            peak, total, out = _merge(ops, stats, parts)
            if p.split == 1:
                _store(ops, p, item, vector, total, out)
                return
            s = ops.smem_base + p.stats_of(p.warps) + (head << 3)
            leader = (vector % (p.head_dim // 4)).equals(0)
            ops.store_shared(s, peak, leader)
            ops.store_shared(s + 4, total, leader)
            ops.store_shared4(ops.smem_base + p.cta_partial_at + (at << 2), out)

        ops.when(vector < vectors, one)


def merge_cluster(ops: Any, p: Problem, item: Any, rank: Any, thread: Any) -> None:
    """After a cluster barrier: this CTA's share of the elements, summed over the cluster's shared memories."""
    vectors = p.heads * p.head_dim // 4
    threads = 32 * p.warps
    share = -(-vectors // p.split)
    for start in range(0, share, threads):
        mine = thread + start
        vector = rank * share + mine

        def one(vector: Any = vector) -> None:
            head = vector // (p.head_dim // 4)
            at = head * p.o_stride + ((vector % (p.head_dim // 4)) << 2)
            stats, parts = [], []
            for r in range(p.split):
                s = ops.peer_address(ops.smem_base + p.stats_of(p.warps) + (head << 3), ops.const_i32(r))
                stats.append((ops.load_peer(s), ops.load_peer(s + 4)))
                o = ops.peer_address(ops.smem_base + p.cta_partial_at + (at << 2), ops.const_i32(r))
                parts.append(ops.load_peer4(o))
            _, total, out = _merge(ops, stats, parts)
            _store(ops, p, item, vector, total, out)

        ops.when(ops.both(mine < share, vector < vectors), one)
