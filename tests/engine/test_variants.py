"""Programs of their own for greedy, sampling and scored steps, as a GPU has them: the same tokens as one for all."""

from __future__ import annotations

from typing import Any

import pytest

from jqserve.engine.programs import Draw, Forward, Fused
from jqserve.engine.variant import ORDER, Variant
from tests.engine.conftest import CONTEXT, PAGE, SLOTS, TILE, TILES, VOCAB, complete, request

STEPS = 3


@pytest.fixture(scope="module")
def several(model: Any, params: dict[str, Any]) -> Any:
    from jqserve.engine.batch import StepShape
    from jqserve.engine.buckets import Bucket, Buckets
    from jqserve.engine.cache import cache_shape
    from jqserve.engine.runner import Runner
    from jqserve.models.build import build, split

    structure, leaves = split(build(model, params))
    shape = StepShape(SLOTS, PAGE, CONTEXT // PAGE, TILE, VOCAB)
    cache = cache_shape(model, page_size=PAGE, pages=SLOTS * CONTEXT // PAGE, dtype="float32")
    buckets = Buckets((SLOTS,), (Bucket(0, 1), Bucket(0, TILES), Bucket(SLOTS, 1), Bucket(SLOTS, TILES)), STEPS)
    runner = Runner(structure, leaves, shape, cache, buckets, variants=ORDER)
    runner.warm_up()
    return runner


def core_of(runner: Any, steps: int) -> Any:
    from jqserve.engine.engine import EngineCore
    from jqserve.engine.pages import PagePool
    from jqserve.engine.scheduler import Scheduler
    from jqserve.engine.validate import Limits

    runner.reset()
    scheduler = Scheduler(PagePool(200), page_size=PAGE, slots=SLOTS, tile_size=TILE, tiles=TILES, steps=steps)
    return EngineCore(runner, scheduler, Limits(VOCAB, CONTEXT, (1,)), max_queued=100)


KINDS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "plain": {"temperature": 0.8},
    "sampled": {"temperature": 0.9, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.2},
    "logprob": {"logprobs": 0},
    "scored": {"temperature": 1.0, "logprobs": 5},
}


@pytest.mark.integration
@pytest.mark.parametrize("steps", [1, STEPS])
@pytest.mark.parametrize(
    "kinds",
    [["greedy"], ["plain"], ["plain", "logprob", "greedy"], ["sampled"], ["scored"],
     ["greedy", "sampled", "plain", "logprob", "scored"]],
)  # fmt: skip
def test_the_tokens_of_one_program_for_all(
    several: Any, runner: Any, kinds: list[str], steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [
        request(i, 7 + 9 * i, max_new_tokens=11, ignore_eos=True, seed=i, **KINDS[kinds[i % len(kinds)]])
        for i in range(8)
    ]
    real, used = several.program, set()
    monkeypatch.setattr(several, "program", lambda program: used.add(program) or real(program))
    found = complete(core_of(several, steps), requests)
    expected = complete(core_of(runner, 1), requests)
    assert {i: o.tokens for i, o in found.items()} == {i: o.tokens for i, o in expected.items()}
    assert {i: o.logprobs is None for i, o in found.items()} == {i: o.logprobs is None for i, o in expected.items()}
    assert several.compilations_after_warmup == 0
    decoding = {p for p in used if isinstance(p, Fused)}
    if steps > 1 or kinds == ["greedy"]:
        assert decoding and all(p.bucket.steps <= steps for p in decoding)
    if kinds == ["greedy"]:
        assert {p.variant for p in decoding} == {Variant.GREEDY}
        assert {p.variant for p in used if isinstance(p, Draw)} == {Variant.GREEDY}, "prompts' steps"
    if kinds[0] == "plain":
        assert Variant.PLAIN in {p.variant for p in used if isinstance(p, Draw)}
        assert {p.variant for p in used if isinstance(p, Draw)} <= {Variant.GREEDY, Variant.PLAIN} or steps > 1
    assert {p.bucket.decode_rows for p in used if isinstance(p, Forward) and p.bucket.tiles} == {0, SLOTS}
