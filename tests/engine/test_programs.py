from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from jqserve.engine.buckets import make_buckets
from jqserve.engine.plan import Chunk, DecodeRow, Plan
from jqserve.engine.programs import Begin, Draw, Forward, Fused, Program, Programs, describe
from jqserve.engine.request import EngineRequest, SamplingParams
from jqserve.engine.sequence import Sequence
from jqserve.engine.variant import ORDER, Variant

TILE = 16
GPU = [
    make_buckets(256, 16, fine=True, steps=2, steps_rows=8),  # the defaults
    make_buckets(256, 16, fine=True, steps=4),
    make_buckets(3, 2, fine=True, steps=2, steps_rows=8),
    make_buckets(12, 2, fine=True),
]
CPU = [make_buckets(16, 4, fine=False), make_buckets(16, 4, fine=False, steps=5), make_buckets(2, 1, fine=False)]
ENGINES = [(b, ORDER, True) for b in GPU] + [(b, (Variant.SCORED,), False) for b in CPU]


def sequence(rid: int, *, grammar: Any = None, scores: dict | None = None, **sampling: Any) -> Sequence:
    request = EngineRequest(rid, (1, 2), SamplingParams(**({"temperature": 0.0, "max_new_tokens": 4} | sampling)))
    one = Sequence(request=request, arrival=rid, limit=6, tokens=[1, 2], stop_ids=frozenset(), scores=scores)
    one.grammar = grammar
    return one


KINDS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7},
    {"logprobs": 0},
    {"logprobs": 3, "temperature": 1.0},
    {"grammar": object()},
    {"grammar": object(), "logprobs": 2},
]


def plan_of(decodes: int, tiles: int, kind: dict[str, Any], steps: int = 1) -> Plan:
    rows = tuple(DecodeRow(sequence(i, **(kind if i == 0 else {})), i, 5, (1,)) for i in range(decodes))
    chunks = tuple(
        Chunk(sequence(1000 + i, **(kind if i == 0 and not decodes else {})), i, 0, TILE, (1,), True)
        for i in range(tiles)
    )
    return Plan(rows, chunks, steps=steps)


def taken(programs: Programs, plan: Plan) -> tuple[Program, ...]:
    fused = programs.fused(plan)
    if fused is not None:
        return (fused,)
    forward = programs.forward(plan)
    masked = any(s.grammar is not None for s in plan.sequences)
    first = (Begin(forward.bucket),) if forward.begun else ()
    return *first, forward, programs.draw(plan, forward, masked)


@pytest.mark.parametrize(("buckets", "variants", "cut"), ENGINES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_plan_has_its_programs_and_they_hold_it(
    buckets: Any, variants: Any, cut: bool, kind: dict[str, Any]
) -> None:
    programs = Programs(buckets, TILE, variants, cut_masked=cut)
    known = set(programs.always()) | (set(programs.on_demand()) if "grammar" in kind else set())
    most, tiles = buckets.decode[-1], max(b.tiles for b in buckets.mixed)
    shapes = [(n, t) for n in {0, 1, 2, most // 2, most} for t in {0, 1, tiles // 2, tiles} if n + t]
    for decodes, count in shapes:
        few = decodes <= (buckets.steps_rows or most)
        steps = buckets.steps if few and not count and "grammar" not in kind else 1
        for k in {1, steps}:
            plan = plan_of(decodes, count, kind, k)
            found = taken(programs, plan)
            assert set(found) <= known, (decodes, count, k)
            model = found[0]
            assert not isinstance(model, Draw)
            assert model.bucket.decode_rows >= decodes and model.bucket.tiles >= count and model.bucket.steps == k
            sampler = found[-1]
            assert isinstance(sampler, Fused | Draw)
            assert ORDER.index(sampler.variant) >= ORDER.index(programs_needed(kind))
            if isinstance(sampler, Draw):
                assert isinstance(found[-2], Forward) and sampler.rows == found[-2].asked >= model.bucket.sampled
                assert (len(found) == 3) == (cut and sampler.masked and not count)
                assert sampler.masked == ("grammar" in kind)


def programs_needed(kind: dict[str, Any]) -> Variant:
    from jqserve.engine.variant import needed

    return needed(sequence(0, **kind).sampling)


@pytest.mark.parametrize(("buckets", "variants", "cut"), ENGINES)
def test_prompts_are_scored_by_programs_made_on_demand(buckets: Any, variants: Any, cut: bool) -> None:
    programs = Programs(buckets, TILE, variants, cut_masked=cut)
    demanded = programs.on_demand()
    assert len(set(demanded)) == len(demanded) and not set(demanded) & set(programs.always())
    for tiles in range(1, max(b.tiles for b in buckets.mixed) + 1):
        plan = plan_of(0, tiles, {"scores": {}})
        forward = programs.forward(plan)
        assert forward.scored and forward in demanded and forward.bucket.tiles >= tiles


@pytest.mark.parametrize(("buckets", "variants", "cut"), ENGINES)
def test_names_are_of_one_program_each(buckets: Any, variants: Any, cut: bool) -> None:
    programs = Programs(buckets, TILE, variants, cut_masked=cut)
    everything = [*programs.always(), *programs.on_demand()]
    assert len({p.name for p in everything}) == len({describe(p) for p in everything}) == len(everything)


def test_a_start_traces_the_model_few_times() -> None:
    """At a GPU's defaults; each costs one to three seconds in which no other thread of the process gets far."""
    programs = Programs(GPU[0], TILE, ORDER)
    assert sum(not isinstance(p, Draw) for p in programs.always()) <= 29


def test_greedy_decoding_is_one_program_and_sampling_two() -> None:
    programs = Programs(GPU[0], TILE, ORDER)
    assert [type(p) for p in taken(programs, plan_of(64, 0, {}))] == [Fused]
    assert [type(p) for p in taken(programs, plan_of(64, 0, {"temperature": 1.0}))] == [Forward, Draw]
    several = dataclasses.replace(plan_of(64, 0, {"temperature": 1.0}), steps=4)
    assert [type(p) for p in taken(Programs(GPU[1], TILE, ORDER), several)] == [Fused]


def test_a_bench_with_one_sampler_alone_finds_its_programs() -> None:
    programs = Programs(GPU[0], TILE, (Variant.PLAIN,), cut_masked=True)
    for kind in ({"temperature": 1.0}, {"temperature": 1.0, "grammar": object()}):
        assert {p.variant for p in taken(programs, plan_of(64, 0, kind)) if isinstance(p, Draw)} == {Variant.PLAIN}
