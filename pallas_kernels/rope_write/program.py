"""The kernel as a program of one thread, over the instructions of `paged_attention/simt` (numpy can run it too).

A block takes one token. A thread takes units of eight elements of a head, four of its first half and the four that turn
with them, one unit after the other: loads of 8 and 16 bytes, and every byte of qkv read once.
"""

from __future__ import annotations

import dataclasses
from typing import Any

UNIT = 4  # elements of each half


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is known when the kernel is built."""

    heads: int
    kv_heads: int
    head_dim: int
    page_size: int
    pages: int
    kind: str  # "bf16" | "f16", of qkv, and of the pages unless they are fp8
    threads: int
    fp8: bool = False  # pages are float8_e4m3fn and hold x / scale
    scale_per_head: bool = False  # k_scale, v_scale have one entry a key/value head; else one

    @property
    def units(self) -> int:
        """Of a token: per head, half the head dim by UNIT."""
        return (self.heads + 2 * self.kv_heads) * self.units_per_head

    @property
    def units_per_head(self) -> int:
        return self.head_dim // 2 // UNIT


def turn_and_write(ops: Any, p: Problem, token: Any, thread: Any) -> None:
    """All units of this thread; what `ops` has beside simt's instructions stands in `mosaic_sm90.Ops`."""
    slot = ops.load_slot(token)
    inside = ops.both(slot >= p.page_size, slot < p.pages * p.page_size)  # page 0 is the padding's: nobody reads it
    for start in range(0, p.units, p.threads):
        unit = thread + start
        if start + p.threads <= p.units:
            _unit(ops, p, token, slot, inside, unit)
        else:
            ops.when(unit < p.units, lambda unit=unit: _unit(ops, p, token, slot, inside, unit))


def _unit(ops: Any, p: Problem, token: Any, slot: Any, inside: Any, unit: Any) -> None:
    half = p.head_dim // 2
    head, at = unit // p.units_per_head, (unit % p.units_per_head) * UNIT
    row = token * (p.heads + 2 * p.kv_heads) + head
    source = ops.pointer("qkv", row * p.head_dim + at, 2)
    first, second = (_floats(ops, ops.load_words(source, offset, 2)) for offset in (0, half * 2))
    angle = token * half + at
    cos, sin = (ops.load_floats(ops.pointer(name, angle, 4)) for name in ("cos", "sin"))
    is_value = head >= p.heads + p.kv_heads
    turned_first, turned_second = [], []
    for x, y, c, s in zip(first, second, cos, sin):
        turned_first.append(ops.select(is_value, x, x * c - y * s))
        turned_second.append(ops.select(is_value, y, y * c + x * s))
    words = [_words(ops, turned, p.kind) for turned in (turned_first, turned_second)]

    def store(name: str, row: Any) -> None:
        target = ops.pointer_at(name, row, p.head_dim * 2, at * 2)
        ops.store_words(target, 0, words[0])
        ops.store_words(target, half * 2, words[1])

    def store_page(pages: str, scales: str, head: Any) -> None:
        row = ((slot // p.page_size) * p.kv_heads + head) * p.page_size + slot % p.page_size
        if not p.fp8:
            return store(pages, row)
        target = ops.pointer_at(pages, row, p.head_dim, at)
        scale = ops.load_scale(scales, head if p.scale_per_head else head * 0)
        for i, part in enumerate(words):  # rounded to 16 bits first, as where the pages have 16
            ops.store_byte_quad(target, i * half, [ops.divide(x, scale) for x in _floats(ops, part)])

    ops.when(head < p.heads, lambda: store("q", token * p.heads + head))
    is_key = ops.both(head >= p.heads, head < p.heads + p.kv_heads)
    ops.when(ops.both(inside, is_key), lambda: store_page("k_pages", "k_scale", head - p.heads))
    ops.when(ops.both(inside, is_value), lambda: store_page("v_pages", "v_scale", head - p.heads - p.kv_heads))


def _floats(ops: Any, words: list[Any]) -> list[Any]:
    return [value for word in words for value in ops.unpack(word)]


def _words(ops: Any, values: list[Any], kind: str) -> list[Any]:
    return [ops.pack(low, high, kind) for low, high in zip(values[::2], values[1::2])]
