"""Programs that other processes lower: the same programs, and no start fails for want of such a process."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from jqserve.engine import lowering, traceable
from jqserve.engine.batch import StepShape
from jqserve.engine.buckets import Bucket, Buckets
from jqserve.engine.cache import cache_shape
from jqserve.engine.lowering import Job, Lowerers
from jqserve.engine.programs import Begin, Draw, Forward
from jqserve.engine.runner import Runner
from jqserve.engine.variant import Variant
from jqserve.models.build import build, split
from pallas_kernels.dispatch import KNOWN_DEVICES
from tests.engine.conftest import CONTEXT, PAGE, SLOTS, STEPS, TILE, TILES, VOCAB, complete, request

pytestmark = pytest.mark.integration


@pytest.fixture
def several(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowering, "PROGRAMS_EACH", 1)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)


@pytest.fixture
def make_runner(model: Any, params: Any) -> Any:
    def make(**options: Any) -> Runner:
        structure, leaves = split(build(model, params))
        shape = StepShape(SLOTS, PAGE, CONTEXT // PAGE, TILE, VOCAB)
        cache = cache_shape(model, page_size=PAGE, pages=SLOTS * CONTEXT // PAGE, dtype="float32")
        job = Job.of(model, params, shape, cache, KNOWN_DEVICES["cpu"])
        buckets = Buckets((SLOTS,), (Bucket(SLOTS, TILES),), STEPS)
        return Runner(structure, leaves, shape, cache, buckets, variants=(Variant.SCORED,), job=job, **options)

    return make


def answers(make_core: Any, **options: Any) -> list[list[int]]:
    kinds: list[dict[str, Any]] = [{}, {"temperature": 0.8}, {"temperature": 1.0, "top_p": 0.7}, {"logprobs": 1}]
    requests = [request(i, 5 + 9 * i, seed=i, ignore_eos=True, **kind) for i, kind in enumerate(kinds)]
    return [outcome.tokens for _, outcome in sorted(complete(make_core(steps=STEPS, **options), requests).items())]


@pytest.mark.usefixtures("several")
def test_they_compute_the_same_tokens(
    make_runner: Any, make_core: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def here(_: Any) -> None:
        raise AssertionError("lowered in this process")

    expected = answers(make_core)
    runner = make_runner()
    with monkeypatch.context() as patch:
        patch.setattr("jqserve.engine.runner.alone", here)
        runner.warm_up()
        runner.prepare().result()
    assert answers(make_core, runner=runner) == expected
    assert not caplog.records and runner.compilations_after_warmup == 0


@pytest.mark.usefixtures("several")
def test_arguments_that_are_not_used_are_not_handed_over(make_runner: Any) -> None:
    """Half of a model takes all its weights and reads half of them."""
    runner = make_runner()
    programs = [
        Begin(Bucket(SLOTS, 0)),
        Forward(Bucket(SLOTS, 0), SLOTS, begun=True),
        Draw(SLOTS, Variant.SCORED, True),
    ]
    with Lowerers(runner.job, 1) as elsewhere:
        for program in programs:
            here, there = runner.compile(program), runner.compile(program, elsewhere)
            entries = [c.as_text()[c.as_text().index("\nENTRY") :] for c in (here, there)]
            assert entries[0].count(" parameter(") == entries[1].count(" parameter(")
            assert here.memory_analysis().alias_size_in_bytes == there.memory_analysis().alias_size_in_bytes


@pytest.mark.usefixtures("several")
def test_a_process_that_cannot_start_is_done_without(
    make_runner: Any, make_core: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    runner = make_runner()
    runner.warm_up()
    assert "lowers programs is gone" in caplog.text
    monkeypatch.setattr(sys, "executable", str(tmp_path / "absent"))
    runner.prepare().result()
    assert "No such file" in caplog.text
    assert len(answers(make_core, runner=runner)) == 4


@pytest.mark.usefixtures("several")
def test_a_process_that_does_not_answer_is_done_without(
    make_runner: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sleeper = tmp_path / "sleeper"
    sleeper.write_text("#!/bin/sh\nexec sleep 60\n")
    sleeper.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(sleeper))
    monkeypatch.setattr(lowering, "PATIENCE", 0.2)
    runner = make_runner()
    program = Draw(SLOTS, Variant.SCORED)
    with Lowerers(runner.job, 1) as elsewhere:
        assert runner.compile(program, elsewhere) is not None
        assert runner.compile(program, elsewhere) is not None  # nobody is asked any more
    assert caplog.text.count("no answer in 0 seconds") == 1


@pytest.mark.usefixtures("several")
def test_what_cannot_be_traced_there_is_traced_here(make_runner: Any, caplog: pytest.LogCaptureFixture) -> None:
    """A job with another model than the runner's stands for whatever may be different there."""
    import dataclasses

    runner = make_runner()
    runner.job = dataclasses.replace(runner.job, shape=dataclasses.replace(runner.job.shape, vocab_size=-1))
    runner.warm_up()
    assert "another process could not lower it" in caplog.text or "is gone" in caplog.text


def test_few_programs_and_few_cores_have_none(make_runner: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    job = make_runner().job
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    for given, programs in ((None, 56), (job, 5)):
        with Lowerers.for_programs(given, programs) as elsewhere:
            assert elsewhere is None
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    with Lowerers.for_programs(job, 56) as elsewhere:
        assert elsewhere is None


def test_one_after_the_other_here(monkeypatch: pytest.MonkeyPatch) -> None:
    assert traceable.alone(lambda: traceable._lowering.locked())
    assert not traceable._lowering.locked()
