"""Step times of a warm engine, measured with steps as it serves them: everybody decodes, behind answers of some length.

The sequences are made up and their pages hold nothing of use: nothing of it is ever told, and what it leaves in pages
and slots is what any request leaves there.
"""

from __future__ import annotations

import math
import time

from jqserve.engine.plan import Adopted, Chunk, DecodeRow, Plan
from jqserve.engine.request import EngineRequest, SamplingParams
from jqserve.engine.runner import Runner
from jqserve.engine.sequence import Sequence

TYPICAL = 1024  # tokens before a decode row: a long question with half of its answer
FAR = 32768  # most tokens before the tiles by which the growth of their time is measured: some 50 ms of it on an H200


def typical_context(runner: Runner) -> int:
    """Tokens: TYPICAL, or half of the context length, or what the pool holds for everybody, whichever is least."""
    shape, rows = runner.shape, runner.buckets.decode[-1]
    longest = shape.pages_per_sequence * shape.page_size
    return max(0, min(TYPICAL, longest // 2, runner.cache_shape.tokens // rows - 1))


def far(runner: Runner, tiles: int) -> int:
    """Tokens that so many tiles of one prompt can stand behind, in whole pages and tiles; at most FAR."""
    shape = runner.shape
    longest = min(shape.pages_per_sequence * shape.page_size, runner.cache_shape.tokens)
    unit = math.lcm(shape.page_size, shape.tile_size)
    return max(0, min(FAR, longest - tiles * shape.tile_size) // unit * unit)


def step_plan(
    runner: Runner, tiles: int, context: int, *, before: int = 0, alone: bool = False, adopt: bool = False
) -> Plan:
    """A step in which every slot is in use: prompts of so many tiles, each as long as it may be, have the last ones,
    and greedy decode rows behind `context` tokens the others. `alone`: without those. `adopt`: their pages are not in
    the slots yet. `before`: the tiles are of one prompt, of which so many tokens (see `far`) are computed."""
    shape, slots = runner.shape, runner.buckets.decode[-1]
    size, tile = shape.page_size, shape.tile_size
    longest = max(1, shape.pages_per_sequence * size // tile)  # tiles of a prompt
    lengths = [min(longest, tiles - at) * tile for at in range(0, tiles, longest)]
    lengths = [min(length, shape.pages_per_sequence * size) for length in lengths][:slots]
    if before:
        lengths = [tiles * tile]
    each, usable = context // size + 1, runner.cache_shape.pages - 1

    def pages(first: int, count: int) -> tuple[int, ...]:
        return tuple(1 + (first + i) % usable for i in range(count))

    decodes: list[DecodeRow] = []
    adopted: list[Adopted] = []
    for slot in range(0 if alone else slots - len(lengths)):
        sequence, own = _sequence(slot, context + 1), pages(slot * each, each)
        decodes.append(DecodeRow(sequence, slot, context, own[-1:]))
        adopted.append(Adopted(sequence, slot, own, context))
    adopted = adopted if adopt else []
    chunks = []
    for slot, length in enumerate(lengths, slots - len(lengths)):
        sequence, own = _sequence(slot, before + length), pages(slot * each, -(-(before + length) // size))
        chunks.append(Chunk(sequence, slot, before, length, own[before // size :], True))
        if before:
            adopted.append(Adopted(sequence, slot, own[: before // size], before))
    return Plan(tuple(decodes), tuple(chunks), adopted=tuple(adopted))


def step_seconds(runner: Runner, tiles: int, context: int, before: int = 0, alone: bool = False) -> float:
    """Of one such step right behind another, as the engine dispatches them: the host's work is beside it."""
    plan = step_plan(runner, tiles, context, before=before, alone=alone)
    if not alone:
        runner.read(runner.launch(step_plan(runner, 0, context, adopt=True)))
    first, step = runner.launch(plan), runner.launch(plan)
    runner.read(first)
    began = time.perf_counter()
    runner.read(step)
    return time.perf_counter() - began


def _sequence(slot: int, length: int) -> Sequence:
    request = EngineRequest(slot, (0,) * length, SamplingParams(temperature=0.0))
    return Sequence(request, slot, length + 1, list(request.prompt), frozenset(), slot=slot)
