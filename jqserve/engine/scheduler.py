"""Who runs in the next step, how many tokens of each, in which pages. Plain Python: no arrays, no device.

Continuous batching in the order of arrival. Each step holds one decode row for every running sequence that has a
token to extend, and chunks of prompts in what is left of the tile budget. When pages run out, the youngest running
sequence is preempted: its pages go back, it waits at its old place in the queue, and its tokens are recomputed later
(a seeded draw depends on the position only, so nothing changes but time). The oldest is never preempted for another's
sake, so it always ends, and so does everybody after it.

A plan may be made before the tokens of the previous one are known (the engine overlaps steps): a sequence advances
when it is planned, and `Sequence.pending` counts what has to be read. Pages that a sequence gives back while a step
that writes them is under way may be handed out at once, because the device runs the steps in order.
"""

from __future__ import annotations

import bisect
import dataclasses

from jqserve.engine.pages import PagePool
from jqserve.engine.sequence import Sequence


@dataclasses.dataclass(frozen=True)
class DecodeRow:
    """The newest token of `sequence`, taken from the device, stands at `position` and writes its KV into `page`."""

    sequence: Sequence
    slot: int
    position: int
    page: int


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Tokens [start, start + length) of `sequence`; `pages` cover them. `sample`: the last gives the next token."""

    sequence: Sequence
    slot: int
    start: int
    length: int
    pages: tuple[int, ...]
    sample: bool


@dataclasses.dataclass(frozen=True)
class Plan:
    """One step. `admitted`: sequences that got their slot with it. Falsy when there is nothing to run."""

    decodes: tuple[DecodeRow, ...] = ()
    chunks: tuple[Chunk, ...] = ()
    admitted: tuple[Sequence, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.decodes or self.chunks)

    @property
    def sequences(self) -> list[Sequence]:
        return [row.sequence for row in self.decodes] + [chunk.sequence for chunk in self.chunks]


class Scheduler:
    """Owns the queues, the slots and the pages.

    slots      most sequences that run at once
    tile_size  tokens a tile; `tiles`: most tiles a step (the chunked-prefill budget)
    reserve    pages that admission leaves free for the running sequences to grow
    """

    def __init__(self, pool: PagePool, *, page_size: int, slots: int, tile_size: int, tiles: int) -> None:
        self.pool = pool
        self.page_size = page_size
        self.tile_size = tile_size
        self.tiles = tiles
        self.reserve = max(1, pool.total // 100)
        self.waiting: list[Sequence] = []  # in the order of arrival
        self.running: list[Sequence] = []  # in the order of arrival
        self.free_slots = list(range(slots - 1, -1, -1))
        self.suspects: set[Sequence] = set()
        self.preemptions = 0

    def add(self, sequence: Sequence) -> None:
        bisect.insort(self.waiting, sequence, key=lambda s: s.arrival)

    def schedule(self) -> Plan:
        """The next step. The sequences in it count as advanced when this returns."""
        only: Sequence | None = None
        admitted: list[Sequence] = []
        if self.suspects:
            only = self._suspect()
            if only.slot is None:
                self._admit_alone(only)
                admitted.append(only)
        preemptions = self.preemptions
        candidates = list(self.running) if only is None else [only]
        decodes = self._decode_rows(candidates)
        chunks: list[Chunk] = []
        tiles = self.tiles
        for sequence in candidates:
            if tiles and sequence.slot is not None and sequence.remaining > 0 and not sequence.decodes:
                tiles -= self._add_chunk(sequence, tiles, chunks)
        # Who was preempted just now is not admitted again at once: those pages are wanted.
        while only is None and tiles and self.preemptions == preemptions and self._admissible():
            sequence = self.waiting.pop(0)
            self._admit(sequence)
            admitted.append(sequence)
            tiles -= self._add_chunk(sequence, tiles, chunks)
        # A chunk may have preempted a younger sequence whose decode row was planned before it.
        rows = tuple(row for row in decodes if row.sequence.slot is not None)
        return self._advance(Plan(rows, tuple(chunks), tuple(admitted)))

    def _suspect(self) -> Sequence:
        """After a failed step its sequences run one at a time, so that the next failure names its cause."""
        running = [s for s in self.running if s in self.suspects]
        return running[0] if running else min(self.suspects, key=lambda s: s.arrival)

    def _admit_alone(self, sequence: Sequence) -> None:
        while self.running and (not self.free_slots or self._pages_needed(sequence) > self.pool.free):
            self.preempt(self.running[-1])
        self.waiting.remove(sequence)
        self._admit(sequence)

    def _decode_rows(self, candidates: list[Sequence]) -> list[DecodeRow]:
        rows = []
        for sequence in candidates:
            if sequence.slot is None or not sequence.decodes or sequence.at_limit:
                continue
            if not self._grow(sequence, sequence.computed + 1):
                continue  # it was the youngest, and had to give its pages back itself
            page = sequence.pages[sequence.computed // self.page_size]
            rows.append(DecodeRow(sequence, sequence.slot, sequence.computed, page))
        return rows

    def _add_chunk(self, sequence: Sequence, tiles: int, chunks: list[Chunk]) -> int:
        """Plans the next tokens of a prompt; the tiles it takes, 0 when there are no pages for it now."""
        start = sequence.computed
        length = min(sequence.remaining, tiles * self.tile_size)
        if not self._grow(sequence, start + length) or sequence.slot is None:
            return 0
        first, last = start // self.page_size, (start + length - 1) // self.page_size
        pages = tuple(sequence.pages[first : last + 1])
        sample = start + length == sequence.length
        chunks.append(Chunk(sequence, sequence.slot, start, length, pages, sample))
        return -(-length // self.tile_size)

    def _grow(self, sequence: Sequence, tokens: int) -> bool:
        """Pages for `tokens` positions. Preempts the youngest others for it; False when it is the youngest itself."""
        missing = -(-tokens // self.page_size) - len(sequence.pages)
        while missing > self.pool.free:
            youngest = self.running[-1]
            self.preempt(youngest)
            if youngest is sequence:
                return False
        if missing > 0:
            sequence.pages += self.pool.allocate(missing)
        return True

    def _pages_needed(self, sequence: Sequence) -> int:
        """Pages for everything that it has now, and for its next token."""
        return -(-min(sequence.length + 1, sequence.limit) // self.page_size)

    def _admissible(self) -> bool:
        """The head of the queue may start: first come, first served, so nobody overtakes it."""
        if not self.waiting or not self.free_slots or self.waiting[0].pending:
            return False
        reserve = self.reserve if self.running else 0
        promised = sum(max(0, self._pages_needed(s) - len(s.pages)) for s in self.running)
        return self._pages_needed(self.waiting[0]) + promised + reserve <= self.pool.free

    def _admit(self, sequence: Sequence) -> None:
        sequence.slot = self.free_slots.pop()
        bisect.insort(self.running, sequence, key=lambda s: s.arrival)

    def _advance(self, plan: Plan) -> Plan:
        for row in plan.decodes:
            row.sequence.computed += 1
            row.sequence.pending += 1
        for chunk in plan.chunks:
            sequence = chunk.sequence
            sequence.computed += chunk.length
            if chunk.sample:
                sequence.pending += 1
                sequence.on_device = True
        return plan

    def preempt(self, sequence: Sequence) -> None:
        """Takes back slot and pages; the sequence waits to be recomputed. A token under way still counts."""
        self._vacate(sequence)
        sequence.preemptions += 1
        self.preemptions += 1
        self.add(sequence)

    def remove(self, sequence: Sequence) -> None:
        """The sequence is over (or was aborted), wherever it is."""
        self.suspects.discard(sequence)
        if sequence.slot is None:
            self.waiting.remove(sequence)
        else:
            self._vacate(sequence)

    def _vacate(self, sequence: Sequence) -> None:
        assert sequence.slot is not None
        self.running.remove(sequence)
        self.free_slots.append(sequence.slot)
        self.pool.release(sequence.pages)
        sequence.slot, sequence.pages = None, []
        sequence.computed, sequence.on_device = 0, False

    def requeue(self, failed: list[Sequence]) -> None:
        """After a step with `failed` raised: the device's state is gone, everybody waits, nothing under way arrives."""
        for sequence in failed:
            if sequence.finish is None:
                sequence.probation = max(1, sequence.computed, sequence.probation)
                self.suspects.add(sequence)
        for sequence in list(self.running):
            self._vacate(sequence)
            self.add(sequence)
        for sequence in self.waiting:
            sequence.pending = 0

    def passed(self, sequence: Sequence, computed: int) -> None:
        """A step that brought `sequence` to `computed` positions has run well."""
        if sequence.probation and computed >= sequence.probation:
            sequence.probation = 0
            self.suspects.discard(sequence)
