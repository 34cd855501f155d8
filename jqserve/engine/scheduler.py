"""Who runs in the next step, how many tokens of each, in which pages. Plain Python: no arrays, no device.

Continuous batching in the order of priority, then of arrival. Each step holds one decode row for every running sequence
that has a token to extend, and chunks of prompts in what is left of the tile budget, which is smaller while somebody
decodes, because those wait for the whole step. When nobody has a prompt to compute, a dispatch may hold several decode
steps. When pages run out, the last running sequence in the order is preempted: its pages go back, it waits at its old
place in the queue, and its tokens are recomputed later, as far as they are not in the prefix cache still (a seeded draw
depends on the position only, so nothing changes but time). The first is never preempted for another's sake, so it
always ends, and so does everybody after it.

A plan may be made before the tokens of the previous one are known (the engine overlaps steps): a sequence advances
when it is planned, and `Sequence.pending` counts what has to be read. Pages that a sequence gives back while a step
that writes them is under way may be handed out at once, because the device runs the steps in order. For the same reason
a page may be found by others as soon as the step that fills it is planned.
"""

from __future__ import annotations

import bisect
from collections import deque
from collections.abc import Callable

from jqserve.engine.forecast import Forecast
from jqserve.engine.pages import PagePool
from jqserve.engine.plan import Adopted, Chunk, DecodeRow, Plan
from jqserve.engine.prefix import extend
from jqserve.engine.request import FinishReason
from jqserve.engine.sequence import Sequence


class Scheduler:
    """Owns the queues, the slots and the pages.

    slots         most sequences that run at once
    tile_size     tokens a tile; `tiles`: most tiles a step (the chunked-prefill budget)
    decode_tiles  most tiles of a step in which somebody decodes; `tiles_behind`: the same for prompts of which so many
                  tokens are computed
    steps         most decode steps of a dispatch; `steps_rows`: where it has at most so many decode rows (None: always)
    mixed         whether a step may hold decode rows and chunks; else prompts go first, and answers wait
    prefix_cache  whether full pages are found again
    fill          of the tiles that could be taken beside so many decode rows, how many should be (`Buckets.fill`)
    conservativeness  of the forecast by which a request is admitted; 0: admitted as soon as its prompt fits
    reserve       pages that admission leaves free for the running sequences to grow
    """

    def __init__(
        self,
        pool: PagePool,
        *,
        page_size: int,
        slots: int,
        tile_size: int,
        tiles: int,
        decode_tiles: int | None = None,
        steps: int = 1,
        steps_rows: int | None = None,
        mixed: bool = True,
        prefix_cache: bool = True,
        conservativeness: float = 0.0,
        fill: Callable[[int, int], int] = lambda decode_rows, tiles: tiles,
    ) -> None:
        self.pool = pool
        self.page_size = page_size
        self.tile_size = tile_size
        self.tiles = tiles
        self.decode_tiles = tiles if decode_tiles is None else decode_tiles
        self.tiles_behind: Callable[[int], int] = lambda tokens: self.decode_tiles
        self.steps = steps
        self.steps_rows = slots if steps_rows is None else steps_rows
        self.mixed = mixed
        self.prefix_cache = prefix_cache
        self.fill = fill
        self.forecast = Forecast(page_size, conservativeness)
        self.reserve = max(1, pool.total // 100)
        self.waiting: list[Sequence] = []  # in order
        self.running: list[Sequence] = []  # in order
        self.free_slots = list(range(slots - 1, -1, -1))
        self.suspects: set[Sequence] = set()
        self.preemptions = 0
        self.at_limits = 0  # pages that the running sequences would have if all grew to their limits
        self.cached_tokens = self.admitted_tokens = 0  # since the start, over all admissions

    def add(self, sequence: Sequence) -> None:
        bisect.insort(self.waiting, sequence, key=_order)

    def schedule(self) -> Plan:
        """The next step. The sequences in it count as advanced when this returns."""
        only: Sequence | None = None
        admitted: list[Sequence] = []
        adopted: list[Adopted] = []
        if self.suspects:
            only = self._suspect()
            if only.slot is None:
                self._admit_alone(only, adopted)
                admitted.append(only)
        preemptions = self.preemptions
        candidates = list(self.running) if only is None else [only]
        steps = self._steps(candidates) if only is None else 1
        prompts_only = not self.mixed and self._prompts_wait(candidates, only)
        decodes = [] if prompts_only else self._decode_rows(candidates, steps)
        chunks: list[Chunk] = []
        prompts = [s for s in candidates if not s.on_device and s.slot is not None]
        tiles = self.tiles
        if decodes:
            most = min(self.decode_tiles, self.tiles_behind(self._deepest(prompts)))
            tiles = self.fill(len(decodes), self._tiles_wanted(prompts, most, only is None))
        left = deque(prompts)
        at = 0  # in `waiting`: those before it wait for a prompt that this step computes
        admitting = only is None
        while tiles:
            # Who was preempted just now is not admitted again at once: those pages are wanted.
            admitting = (
                admitting and self.preemptions == preemptions and bool(self.free_slots) and at < len(self.waiting)
            )
            if left and not (admitting and _order(self.waiting[at]) < _order(left[0])):
                sequence = left.popleft()
                if sequence.slot is not None and sequence.remaining > 0:
                    tiles -= self._add_chunk(sequence, tiles, chunks)
                continue
            if not admitting:
                break
            if self._comes_cheaper(self.waiting[at], [*prompts, *admitted]):
                at += 1
            elif self._admissible(at):
                sequence = self.waiting.pop(at)
                self._admit(sequence, adopted)
                admitted.append(sequence)
                tiles -= self._add_chunk(sequence, tiles, chunks)
            else:
                admitting = False
        if prompts_only and not chunks:
            decodes = self._decode_rows(candidates, 1)
        # A chunk may have preempted a sequence whose decode row was planned before it, or that was just admitted.
        rows = tuple(row for row in decodes if row.sequence.slot is not None)
        kept = tuple(one for one in adopted if one.sequence.slot is not None)
        return self._advance(Plan(rows, tuple(chunks), tuple(admitted), kept, steps))

    def _deepest(self, prompts: list[Sequence]) -> int:
        """How many tokens are computed of the prompt that most are of, among those that a full step reaches."""
        deepest, left = 0, self.decode_tiles
        for sequence in prompts:
            if left <= 0:
                break
            deepest = max(deepest, sequence.computed)
            left -= -(-sequence.remaining // self.tile_size)
        return deepest

    def _tiles_wanted(self, prompts: list[Sequence], most: int, waiting: bool) -> int:
        """How many tiles the prompts are worth that could be computed now, up to `most`; of those in the prefix cache
        more than will be taken. waiting: those without a slot count, too."""
        tokens = [sequence.remaining for sequence in prompts]
        if waiting:
            tokens += [sequence.length for sequence in self.waiting[: min(most, len(self.free_slots))]]
        return min(most, sum(-(-count // self.tile_size) for count in tokens))

    def _prompts_wait(self, candidates: list[Sequence], only: Sequence | None) -> bool:
        return any(s.remaining > 0 and not s.decodes for s in candidates) or (only is None and self._admissible())

    def _steps(self, candidates: list[Sequence]) -> int:
        """Decode steps of this dispatch: 1 where somebody has, or waits to have, a prompt computed."""
        if self.steps == 1 or self.waiting or len(candidates) > self.steps_rows:
            return 1
        counts, missing = [0], 0
        for sequence in candidates:
            if sequence.grammar is not None:
                return 1  # each token's mask follows from the one before it
            if sequence.decodes:
                counts.append(min(self.steps, max(0, sequence.limit - sequence.length)))
                missing += max(0, -(-(sequence.computed + counts[-1]) // self.page_size) - len(sequence.pages))
            elif sequence.remaining > 0:
                return 1
        # Nobody is preempted for steps that could come later, and a program of which nobody uses half is a waste.
        return self.steps if missing <= self.pool.free and max(counts) > self.steps // 2 else 1

    def _suspect(self) -> Sequence:
        """After a failed step its sequences run one at a time, so that the next failure names its cause."""
        running = [s for s in self.running if s in self.suspects]
        return running[0] if running else min(self.suspects, key=_order)

    def _admit_alone(self, sequence: Sequence, adopted: list[Adopted]) -> None:
        while self.running and (not self.free_slots or self._pages_needed(sequence) > self.pool.free):
            self.preempt(self.running[-1])
        self.waiting.remove(sequence)
        self._admit(sequence, adopted)

    def _decode_rows(self, candidates: list[Sequence], steps: int) -> list[DecodeRow]:
        rows, size = [], self.page_size
        for sequence in candidates:
            # `Sequence.decodes`, spelled out: this loop runs for every row of every step.
            if not sequence.on_device or sequence.slot is None:
                continue
            first, length = sequence.computed, len(sequence.tokens) + sequence.pending
            if length - first != 1 or length >= sequence.limit:
                continue
            count = min(steps, sequence.limit - length)
            page, last = first // size, (first + count - 1) // size
            if last >= len(sequence.pages) and not self._grow(sequence, first + count):
                continue  # it was the last one, and had to give its pages back itself
            rows.append(DecodeRow(sequence, sequence.slot, first, tuple(sequence.pages[page : last + 1]), count))
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
        """Pages for `tokens` positions. Preempts the last others for it; False when it is the last itself."""
        missing = -(-tokens // self.page_size) - len(sequence.pages)
        while missing > self.pool.free:
            last = self.running[-1]
            self.preempt(last)
            if last is sequence:
                return False
        if missing > 0:
            sequence.pages += self.pool.allocate(missing)
        return True

    def _pages_needed(self, sequence: Sequence) -> int:
        """Pages for everything that it has now, and for its next token."""
        return -(-min(len(sequence.tokens) + sequence.pending + 1, sequence.limit) // self.page_size)

    def _pages_at_limit(self, sequence: Sequence) -> int:
        return -(-sequence.limit // self.page_size)

    def _comes_cheaper(self, sequence: Sequence, filling: list[Sequence]) -> bool:
        """Whether somebody before it is having half or more of what it has to compute computed, so that it will find
        that in the prefix cache: the copies of a prompt (n > 1) wait for the first. That goes on with every step, and
        takes all of its tiles but in its last one, so this is for one step, in which others may overtake it."""
        if not filling or not self.prefix_cache or sequence.wants_scores:
            return False
        found, size = len(self._find(sequence)), self.page_size
        half = found - (found * size - len(sequence.tokens)) // (2 * size)  # pages, with those found, rounded up
        if half > (len(sequence.tokens) - 1) // size:
            return False
        name = sequence.names[half - 1]  # which says what stands in all pages before it, too
        return any(
            len(one.names) >= half > one.named_pages and one.names[half - 1] == name and _order(one) < _order(sequence)
            for one in filling
            if one.slot is not None
        )

    def _admissible(self, at: int = 0) -> bool:
        """The head of the queue, or the one at `at`, may start: first come, first served, so nobody overtakes it."""
        if len(self.waiting) <= at or not self.free_slots or self.waiting[at].pending:
            return False
        head = self.waiting[at]
        if self.at_limits + self._pages_at_limit(head) + self.reserve <= self.pool.total:
            return True  # whatever comes; what follows takes a millisecond for 400 running sequences
        found = self._find(head)
        taken = self.pool.idle(found)
        needed = self._pages_needed(head) - len(found) + taken
        if not self.running:
            return needed <= self.pool.free
        promised = sum(max(0, self._pages_needed(s) - len(s.pages)) for s in self.running)
        if needed + promised + self.reserve > self.pool.free:
            return False
        if not self.forecast.conservativeness:
            return True
        everybody = [(s, min(s.cached_tokens, s.length)) for s in self.running]
        shared = self.pool.used - sum(len(s.pages) - cached // self.page_size for s, cached in everybody)
        peak = self.forecast.peak([*everybody, (head, len(found) * self.page_size)])
        return max(0, shared) + taken + peak + self.reserve <= self.pool.total

    def _find(self, sequence: Sequence) -> list[int]:
        """Pages of its first tokens that are in the prefix cache; the last token is always computed."""
        if not self.prefix_cache:
            return []
        pages = (len(sequence.tokens) - 1) // self.page_size
        extend(sequence.names, sequence.tokens, self.page_size, pages)
        return [] if sequence.wants_scores else self.pool.find(sequence.names[:pages])

    def _admit(self, sequence: Sequence, adopted: list[Adopted]) -> None:
        sequence.slot = self.free_slots.pop()
        self.at_limits += self._pages_at_limit(sequence)
        bisect.insort(self.running, sequence, key=_order)
        found = self._find(sequence)
        self.pool.take(found)
        sequence.pages = list(found)
        sequence.computed = sequence.cached_tokens = len(found) * self.page_size
        sequence.named_pages = len(found)
        self.cached_tokens += sequence.computed
        self.admitted_tokens += sequence.length
        if not sequence.preemptions:
            sequence.first_cached = sequence.computed
        if found:
            adopted.append(Adopted(sequence, sequence.slot, tuple(found), sequence.computed))

    def _advance(self, plan: Plan) -> Plan:
        for row in plan.decodes:
            row.sequence.computed += row.steps
            row.sequence.pending += row.steps
        for chunk in plan.chunks:
            sequence = chunk.sequence
            sequence.computed += chunk.length
            self.publish(sequence)
            if chunk.sample:
                sequence.pending += 1
                sequence.on_device = True
        return plan

    def publish(self, sequence: Sequence) -> None:
        """Lets others find its pages that are full of tokens the host knows."""
        if not self.prefix_cache or sequence.slot is None:
            return
        full = min(sequence.computed, len(sequence.tokens)) // self.page_size
        if full <= sequence.named_pages:
            return
        extend(sequence.names, sequence.tokens, self.page_size, full)
        for i in range(sequence.named_pages, full):
            self.pool.name(sequence.pages[i], sequence.names[i])
        sequence.named_pages = full

    def preempt(self, sequence: Sequence) -> None:
        """Takes back slot and pages; the sequence waits to be recomputed. A token under way still counts."""
        self._vacate(sequence)
        sequence.preemptions += 1
        self.preemptions += 1
        self.forecast.preempted()
        self.add(sequence)

    def remove(self, sequence: Sequence) -> None:
        """The sequence is over (or was aborted), wherever it is."""
        self.suspects.discard(sequence)
        if sequence.finish in (FinishReason.STOP, FinishReason.LENGTH):
            self.forecast.finished(sequence)
        elif sequence.finish is FinishReason.ERROR:
            self.pool.forget(sequence.pages)  # what it wrote is not to be trusted
        if sequence.slot is None:
            self.waiting.remove(sequence)
        else:
            self._vacate(sequence)

    def _vacate(self, sequence: Sequence) -> None:
        assert sequence.slot is not None
        self.running.remove(sequence)
        self.at_limits -= self._pages_at_limit(sequence)
        self.free_slots.append(sequence.slot)
        self.pool.release(sequence.pages)
        sequence.slot, sequence.pages = None, []
        sequence.computed = sequence.cached_tokens = sequence.named_pages = 0
        sequence.on_device = False

    def requeue(self, failed: list[Sequence]) -> None:
        """After a step with `failed` raised: the device's state is gone, everybody waits, nothing under way arrives."""
        self.pool.forget()
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


def _order(sequence: Sequence) -> tuple[int, int]:
    """First come, first served, within a priority."""
    return -sequence.request.priority, sequence.arrival
