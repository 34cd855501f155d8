"""Which items, and which of their blocks of keys, each CTA of the prefill kernel walks over.

Items (a head of 128 queries) are dealt in rounds, one to a CTA. 1,024 of them over 132 CTAs take 8 rounds, of which the
last has 100: 3 % of the time a quarter of the GPU waits. With `split_last` the last round's items lie side by side on a
line that all CTAs share equally ("stream-K"): each has the head of one item, the tail of the one before, both, or a
piece within one. Whoever has an item's last block combines the parts (prefill_combine); it waits only for CTAs before
its own, which wait for nobody before they have told their part, so that no order of starting locks up.
"""

from __future__ import annotations

import dataclasses

from pallas_kernels.paged_attention.prefill_problem import CONSUMERS, ROWS, Problem
from pallas_kernels.paged_attention.simt import Mlir, Reg


@dataclasses.dataclass(frozen=True)
class Item:
    """One entry of this CTA's list: a head of 128 queries, and its own of the blocks of keys that they see."""

    tile: Reg
    first: Reg  # query of the tile
    head: Reg
    start: Reg  # position of the first query
    left: Reg  # live queries from there on, if positive
    end: Reg  # keys at end and beyond are seen by nobody here
    begin: Reg  # nor those before
    first_block: Reg
    count: Reg  # of blocks; 0 for padding
    ends: Reg  # 1 where these are the item's last blocks: the result is stored here
    before: Reg  # CTAs in front of this one that have the item's earlier blocks
    blocks: Reg  # of the whole item


@dataclasses.dataclass(frozen=True)
class Share:
    """Entry n of a CTA's list: of `item` the share from `begin` to `end`, in units of 1 / p.blocks of its blocks."""

    item: Reg
    begin: Reg
    end: Reg
    before: Reg


def items_of_cta(ops: Mlir, p: Problem) -> Reg:
    """How many entries this CTA's list has."""
    rounds, rest = divmod(p.items, p.blocks)
    if not rest:
        return ops.const_i32(rounds)
    if p.rest:
        first, last = _ends_of_range(ops, p)
        return ops.const_i32(rounds + 1) + (last - first)
    mine = _place(ops, p, ops.const_i32(rounds)) < rest
    return ops.select(mine, ops.const_i32(rounds + 1), ops.const_i32(rounds))


def _cta(ops: Mlir, p: Problem) -> Reg:
    return ops.special("ctaid.x", again=p.rest > 0)


def _place(ops: Mlir, p: Problem, n: Reg) -> Reg:
    """Items are dealt in rounds, every other one backwards: the first of a round see the most keys.

    A split round goes forwards, so that the last one in front of it has to go backwards.
    """
    cta = _cta(ops, p)
    forwards = p.items // p.blocks & 1 if p.rest else 0
    return ops.select((n & 1).equals(forwards), cta, ops.const_i32(p.blocks - 1) - cta)


def _ends_of_range(ops: Mlir, p: Problem) -> tuple[Reg, Reg]:
    """First and last of the split items that this CTA has a share of; they are the same or neighbours."""
    begin = _cta(ops, p) * p.rest
    return begin // p.blocks, (begin + (p.rest - 1)) // p.blocks


def share(ops: Mlir, p: Problem, n: Reg) -> Share:
    """The head of an item, for which another CTA may wait, comes in front of the tail of the item before."""
    zero, one = ops.const_i32(0), ops.const_i32(p.blocks)
    whole = ops.min_int(n * p.blocks + _place(ops, p, n), p.items - 1)
    if not p.rest:
        return Share(whole, zero, one, zero)
    rounds = p.items // p.blocks
    cta = _cta(ops, p)
    first, last = _ends_of_range(ops, p)
    two = first < last
    head = ops.both(n.equals(rounds), two)
    begin = cta * p.rest - first * p.blocks
    tail_end = ops.select(two, one, begin + p.rest)
    head_end = (cta + 1) * p.rest - last * p.blocks
    dealt = n < rounds

    def pick(whole: Reg, of_head: Reg, of_tail: Reg) -> Reg:
        return ops.select(dealt, whole, ops.select(head, of_head, of_tail))

    return Share(
        pick(whole, last + rounds * p.blocks, first + rounds * p.blocks),
        pick(zero, zero, begin),
        pick(one, head_end, tail_end),
        pick(zero, zero, cta - first * p.blocks // p.rest),
    )


def part_before(ops: Mlir, p: Problem, work: Item, i: Reg) -> tuple[Reg, Reg]:
    """(CTA, whether it has blocks at all) of the i-th of the `work.before` parts in front of this CTA's."""
    cta = _cta(ops, p)
    first, _ = _ends_of_range(ops, p)
    other = cta - work.before + i
    begin = ops.max_int(other * p.rest - first * p.blocks, 0)
    end = (other + 1) * p.rest - first * p.blocks
    return other, begin * work.blocks // p.blocks < end * work.blocks // p.blocks


def place(ops: Mlir, p: Problem, n: Reg) -> tuple[Reg, Reg, Reg]:
    """(tile, first query, head) of this CTA's entry n; later ones of a sequence, which see more keys, go first.

    Heads are adjacent in time and share keys and values in L2.
    """
    return _coordinates(ops, p, share(ops, p, n).item)


def _coordinates(ops: Mlir, p: Problem, item: Reg) -> tuple[Reg, Reg, Reg]:
    head, rest = item % p.heads, item // p.heads
    tile = ops.const_i32(p.tiles - 1) - rest // p.blocks_per_tile
    q_block = ops.const_i32(p.blocks_per_tile - 1) - rest % p.blocks_per_tile
    return tile, q_block * (ROWS * CONSUMERS), head


def lengths(ops: Mlir, p: Problem, n: Reg) -> list[Reg]:
    """q_start and q_len of entry n's tile: asked for one entry ahead, since they come from far."""
    tile, _, _ = place(ops, p, n)
    return [ops.load_global("q_start", tile << 2), ops.load_global("q_len", tile << 2)]


def item(ops: Mlir, p: Problem, n: Reg, q_start: Reg, q_len: Reg) -> Item:
    mine = share(ops, p, n)
    tile, first, head = _coordinates(ops, p, mine.item)
    block = p.config.block_kv
    start, left = q_start + first, q_len - first
    end = start + ops.min_int(left, ROWS * CONSUMERS)
    begin = ops.const_i32(0) if p.window is None else ops.max_int(start - (p.window - 1), 0)
    first_block = begin // block
    count = blocks = ops.select(left >= 1, (end + (block - 1)) // block - first_block, ops.const_i32(0))
    ends = ops.const_i32(1)
    if p.rest:
        low, high = mine.begin * blocks // p.blocks, mine.end * blocks // p.blocks
        first_block, count = first_block + low, high - low
        ends = ops.select(mine.end.equals(p.blocks), ops.const_i32(1), ops.const_i32(0))
    return Item(tile, first, head, start, left, end, begin, first_block, count, ends, mine.before, blocks)
