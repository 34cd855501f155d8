"""Constrained answers and scored prompts: the halves of a step, in company, with and without overlap."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jqserve.engine.grammar import Grammars
from jqserve.engine.programs import Begin, Forward
from jqserve.engine.request import FinishReason, SamplingParams, StepEvent
from jqserve.errors import RequestError
from tests.engine.conftest import CONTEXT, EOS, PAGE, VOCAB, prompt, request

CHARACTERS = 'abcdefghijklmnopqrstuvwxyz0123456789{}[]":,.-Ġ'


def write_tokenizer(folder: Path) -> list[str]:
    """A byte-level tokenizer.json with one character a token; the tokens by id."""
    words = ["<pad>", "<bos>", "<eos>", *CHARACTERS]
    words += [f"<{i}>" for i in range(VOCAB - len(words))]
    special = [i for i, word in enumerate(words) if len(word) > 1]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    tokenizer = {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": words[i], "special": True, **flags} for i in special],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        "model": {"type": "BPE", "vocab": {word: i for i, word in enumerate(words)}, "merges": []},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return words


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    folder = tmp_path_factory.mktemp("tokenizer")
    return folder, write_tokenizer(folder)


@pytest.fixture(scope="module")
def grammars(words: tuple[Path, list[str]]) -> Grammars:
    return Grammars(str(words[0]), VOCAB, (EOS,))


def run(core: Any, requests: list[Any], *, abort: int | None = None) -> dict[int, list[StepEvent]]:
    """Every event by request, until nothing is left to do."""
    events: dict[int, list[StepEvent]] = {one.rid: [] for one in requests}
    for one in requests:
        core.add(one)
    end = time.monotonic() + 120
    while core.has_work():
        assert time.monotonic() < end, "it hangs"
        for event in core.step():
            events[event.rid].append(event)
        if abort is not None:
            core.abort(abort)
    return events


def tokens(events: list[StepEvent]) -> list[int]:
    return [token for event in events for token in event.token_ids]


def text(events: list[StepEvent], words: list[str]) -> str:
    return "".join(words[token] for token in tokens(events) if token != EOS).replace("Ġ", " ")


def with_grammars(core: Any, grammars: Grammars) -> Any:
    core.preparing.grammars = grammars
    return core


REGEX = "[a-f]{3}-[0-9]{4}"
SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "yz"]}},
        "required": ["a", "b"],
        "additionalProperties": False,
    }
)


def constrained(rid: int, constraint: tuple[str, str], **sampling: Any) -> Any:
    return request(rid, 9 + rid, **({"max_new_tokens": 40, "constraint": constraint} | sampling))


@pytest.mark.parametrize("overlap", [True, False], ids=["overlap", "no overlap"])
def test_answers_fit_their_grammar_and_their_company_is_left_alone(
    make_core: Any, grammars: Grammars, words: tuple[Path, list[str]], overlap: bool
) -> None:
    plain = [request(i, 7 + i, temperature=0.8 * (i % 2), seed=i) for i in range(4)]
    alone = {one.rid: tokens(run(make_core(overlap=overlap), [one])[one.rid]) for one in plain}
    held = [
        constrained(4, ("regex", REGEX)),
        constrained(5, ("regex", REGEX), temperature=1.0, seed=5),
        constrained(6, ("choice", '["alpha", "beta.2"]'), temperature=5.0, seed=1),
        constrained(7, ("lark", 'start: "{" ("a" | "b")+ "}"'), temperature=1.0, seed=2),
        constrained(8, ("json_schema", SCHEMA), temperature=2.0, seed=3, max_new_tokens=90, logprobs=3),
    ]
    events = run(with_grammars(make_core(overlap=overlap), grammars), [*plain, *held])
    for one in plain:
        assert tokens(events[one.rid]) == alone[one.rid]
    texts = {one.rid: text(events[one.rid], words[1]) for one in held}
    assert re.fullmatch(REGEX, texts[4]) and re.fullmatch(REGEX, texts[5])
    assert texts[6] in ("alpha", "beta.2")
    assert re.fullmatch("{[ab]+}?", texts[7])
    assert events[4][-1].finish is events[6][-1].finish is FinishReason.STOP
    if events[8][-1].finish is FinishReason.STOP:
        value = json.loads(texts[8])
        assert set(value) == {"a", "b"} and isinstance(value["a"], int) and value["b"] in ("x", "yz")
    for event in events[8]:
        for entry in event.logprobs:
            assert np.isfinite([entry.token, *entry.top]).all() and entry.token <= 0


@pytest.mark.parametrize("overlap", [True, False], ids=["overlap", "no overlap"])
def test_steps_cut_between_layers_give_the_same_tokens(
    make_core: Any, grammars: Grammars, runner: Any, monkeypatch: pytest.MonkeyPatch, overlap: bool
) -> None:
    """As a GPU's are; a prompt comes when the others decode, so that whole and cut steps take turns."""
    requests = [
        constrained(0, ("regex", "[a-z]{30}"), temperature=1.0, seed=1),
        constrained(1, ("json_schema", SCHEMA), temperature=1.0, seed=2, repetition_penalty=1.2),
        request(2, 60, max_new_tokens=20, temperature=1.0, seed=3),
        request(3, 11, max_new_tokens=30),
    ]
    whole = run(with_grammars(make_core(overlap=overlap, slots=3), grammars), requests)
    monkeypatch.setattr(runner.programs, "cut_masked", True)
    monkeypatch.setattr(runner, "compilations_after_warmup", 0)  # which its other users want to stay as it is
    real, used = runner.program, []
    monkeypatch.setattr(runner, "program", lambda program: used.append(program) or real(program))
    cut = run(with_grammars(make_core(overlap=overlap, slots=3), grammars), requests)
    assert {i: tokens(events) for i, events in cut.items()} == {i: tokens(events) for i, events in whole.items()}
    begun = [p for p in used if isinstance(p, Begin)]
    assert len(begun) >= 20 and len(begun) == sum(isinstance(p, Forward) and p.begun for p in used)
    assert any(isinstance(p, Forward) and not p.begun for p in used)


def test_the_masks_come_before_anything_is_told(
    make_core: Any, grammars: Grammars, runner: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device waits for them; what its last tokens mean for everybody else can wait."""
    core, order = with_grammars(make_core(), grammars), []
    emit, sample = core._emit, runner.sample
    monkeypatch.setattr(core, "_emit", lambda *a: order.append("told") or emit(*a))
    monkeypatch.setattr(runner, "sample", lambda *a: order.append("masked" * (a[1] is not None)) or sample(*a))
    run(core, [constrained(0, ("regex", "[a-z]{20}"))])
    first = order.index("masked") + 1  # whose own step has nothing before it
    assert order[first : first + 20] == ["masked", "told"] * 10


def test_a_seed_gives_the_same_constrained_answer_whatever_runs_beside_it(make_core: Any, grammars: Grammars) -> None:
    one = constrained(1, ("regex", "[a-z]{20}"), temperature=1.0, seed=9)
    alone = tokens(run(with_grammars(make_core(), grammars), [one])[1])
    others = [request(i, 30, max_new_tokens=30) for i in range(2, 9)]
    few_pages = with_grammars(make_core(pages=24), grammars)  # 8 sequences of up to 60 tokens: some are preempted
    events = run(few_pages, [*others, one])
    assert tokens(events[1]) == alone and len(alone) == 20
    assert few_pages.scheduler.preemptions > 0


def test_the_model_chooses_among_what_is_allowed(
    make_core: Any, grammars: Grammars, words: tuple[Path, list[str]]
) -> None:
    """Greedy and held to its own unconstrained answer's alphabet, it gives that answer."""
    one = request(1, 12, max_new_tokens=12, ignore_eos=True)
    free = tokens(run(make_core(), [one])[1])
    printable = [words[1][token] for token in free]
    if not all(len(word) == 1 for word in printable):
        pytest.skip("the answer has special tokens, which no grammar allows")
    everything = '[a-z0-9{}\\[\\]":,. \\-]{12}'
    held = constrained(1, ("regex", everything), max_new_tokens=12)
    held_tokens = tokens(
        run(
            with_grammars(make_core(), grammars), [request(1, 12, constraint=("regex", everything), max_new_tokens=12)]
        )[1]
    )
    assert held_tokens == free and held.rid == 1


@pytest.mark.parametrize(
    ("constraint", "says"),
    [
        (("regex", "(a"), "regex"),
        (("json_schema", '{"type": "objekt"}'), "objekt"),
        (("json_schema", "{"), "not JSON"),
        (("json_schema", "[" * 100_000), "not JSON"),
        (("json_schema", "3"), "object"),
        (("json_schema", '{"type": "array", "uniqueItems": true}'), "uniqueItems"),
        (("lark", "start: nobody"), "nobody"),
        (("choice", "[]"), "none of them empty"),
        (("regex", "x" * 300_000), "at most"),
        (("no such kind", ""), "json_schema"),
    ],
)
def test_what_is_no_grammar_is_refused_and_nothing_else_is_hurt(
    make_core: Any, grammars: Grammars, constraint: tuple[str, str], says: str
) -> None:
    core = with_grammars(make_core(), grammars)
    events = run(core, [constrained(1, constraint), request(2, 5)])
    (refused,) = events[1]
    assert refused.finish is FinishReason.ERROR and refused.field == "constraint" and says in refused.error
    assert "\n" not in refused.error and len(refused.error) < 500
    assert events[2][-1].finish is not FinishReason.ERROR
    assert core.stats().waiting == core.stats().running == core.scheduler.pool.used == 0


def test_grammars_that_blow_up_end_with_a_reason_or_an_answer(make_core: Any, grammars: Grammars) -> None:
    began = time.monotonic()
    hostile = ["(a{1000}){1000}", "(a|aa)+" * 100, "((a|b)*c){400}", "(.*a){50}b"]
    events = run(
        with_grammars(make_core(), grammars),
        [*(constrained(i, ("regex", one), max_new_tokens=8) for i, one in enumerate(hostile)), request(9, 5)],
    )
    for i in range(len(hostile)):
        last = events[i][-1]
        assert last.finish is not None and (last.finish is not FinishReason.ERROR or last.field == "constraint"), last
    assert events[9][-1].finish is not None and time.monotonic() - began < 90


def test_requests_that_are_being_prepared_can_be_aborted(make_core: Any, grammars: Grammars) -> None:
    core = with_grammars(make_core(), grammars)
    events = run(core, [constrained(1, ("regex", "(a{1000}){1000}")), request(2, 5)], abort=1)
    assert events[1] == [] and events[2][-1].finish is not None and not core.has_work()


def test_without_a_tokenizer_constraints_are_refused(make_core: Any) -> None:
    core = make_core()
    with pytest.raises(RequestError, match="constraint"):
        core.add(constrained(1, ("regex", "a")))
    assert not core.has_work()
    with pytest.raises(RequestError, match="min_new_tokens"):
        core.add(constrained(1, ("regex", "a"), min_new_tokens=2))


Reference = Callable[[tuple[int, ...]], np.ndarray]


@pytest.fixture(scope="module")
def reference(model: Any, params: Any) -> Reference:
    """log_softmax of the whole sequence at once, without pages: [S, V]. Padding at the end changes nothing."""
    import jax

    from jqserve.models.build import build

    whole = jax.jit(lambda ids: jax.nn.log_softmax(build(model, params).full(ids), axis=-1))

    def of(ids: tuple[int, ...]) -> np.ndarray:
        padded = np.zeros(CONTEXT, np.int32)
        padded[: len(ids)] = ids
        return np.asarray(whole(padded))[: len(ids)]

    return of


@pytest.mark.parametrize("overlap", [True, False], ids=["overlap", "no overlap"])
def test_scores_are_those_of_the_whole_sequence(make_core: Any, reference: Reference, overlap: bool) -> None:
    """Prompts over several chunks, in company, one of them a cached prefix of another; some preempted."""
    long = prompt(100, 1)
    given = {1: (long, 1), 2: (long[:60], 20), 3: (prompt(2, 3), 1), 4: (prompt(33, 4), 32)}
    core = make_core(overlap=overlap, pages=40)
    run(core, [request(0, long[:64])])  # leaves a prefix in the cache
    scored = [
        request(rid, ids, max_new_tokens=0, prompt_logprobs=2, prompt_from=start) for rid, (ids, start) in given.items()
    ]
    both = request(5, prompt(20, 5), max_new_tokens=4, prompt_logprobs=0)
    events = run(core, [request(9, 20, max_new_tokens=40), *scored, both, request(10, 50, max_new_tokens=40)])
    assert core.scheduler.pool.used == 0
    for rid, (ids, start) in given.items():
        (event,) = events[rid]
        assert event.finish is FinishReason.LENGTH and event.token_ids == ()
        expected = reference(ids)
        assert len(event.prompt_logprobs) == len(ids) - start
        for place, entry in enumerate(event.prompt_logprobs, start):
            row = expected[place - 1]
            assert entry.token == pytest.approx(row[ids[place]], abs=2e-4)
            assert entry.top == pytest.approx(sorted(row, reverse=True)[:2], abs=2e-4)
            assert row[list(entry.top_ids)] == pytest.approx(entry.top, abs=2e-4)
    first, *rest = events[5]
    assert len(first.prompt_logprobs) == 19 and all(not event.prompt_logprobs for event in rest)
    assert len(tokens(events[5])) == 4 or tokens(events[5])[-1] == EOS


@pytest.mark.parametrize("overlap", [True, False], ids=["overlap", "no overlap"])
def test_a_prompt_of_the_whole_context_is_scored(make_core: Any, reference: Reference, overlap: bool) -> None:
    core, ids = make_core(overlap=overlap), prompt(CONTEXT, 2)
    (event,) = run(core, [request(1, ids, max_new_tokens=0, prompt_logprobs=0)])[1]
    told = [reference(ids)[i - 1][ids[i]] for i in range(1, CONTEXT)]
    assert [entry.token for entry in event.prompt_logprobs] == pytest.approx(told, abs=2e-4)
    for limit in (None, 1):
        with pytest.raises(RequestError, match=f"{CONTEXT} tokens"):
            core.add(request(2, ids, max_new_tokens=limit, prompt_logprobs=0))


def test_programs_that_did_not_compile_are_tried_again(
    make_core: Any, runner: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One failure, while memory was short, failed every constrained and scored request from then on."""
    real = runner.compile

    def fails(program: Any, elsewhere: Any) -> Any:
        raise MemoryError("made up")

    monkeypatch.setattr(
        runner, "_compiled", {p: c for p, c in runner._compiled.items() if p in runner.programs.always()}
    )
    monkeypatch.setattr(runner, "_prepared", None)
    monkeypatch.setattr(runner, "compile", fails)
    core, scored = make_core(), {"max_new_tokens": 0, "prompt_logprobs": 0}
    (failed,) = run(core, [request(1, 9, **scored)])[1]
    assert failed.finish is FinishReason.ERROR and "made up" in failed.error
    monkeypatch.setattr(runner, "compile", real)
    (told,) = run(core, [request(2, 9, **scored)])[2]
    assert told.finish is FinishReason.LENGTH and len(told.prompt_logprobs) == 8
    assert runner.prepare() is runner.prepare()


def test_scoring_survives_preemption(make_core: Any, reference: Reference) -> None:
    core = make_core(pages=18, conservativeness=0)
    ids = prompt(90, 7)
    growing = [request(i, 14, max_new_tokens=60, ignore_eos=True) for i in range(3)]
    scored = request(7, ids, max_new_tokens=20, prompt_logprobs=0, ignore_eos=True)
    events = run(core, [*growing, scored])
    assert core.scheduler.preemptions > 0
    found = [event.prompt_logprobs for event in events[7] if event.prompt_logprobs]
    assert len(found) == 1
    expected = reference(ids)
    told = [expected[i - 1][ids[i]] for i in range(1, len(ids))]
    assert [entry.token for entry in found[0]] == pytest.approx(told, abs=2e-4)
    assert len(tokens(events[7])) == 20


def test_nothing_of_this_is_run_for_ordinary_requests(
    make_core: Any, runner: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, used = runner.program, set()
    monkeypatch.setattr(runner, "program", lambda program: used.add(program) or real(program))
    run(make_core(), [request(i, 5, temperature=i % 2, seed=i, logprobs=i) for i in range(4)])
    assert used and used <= set(runner.programs.always())
    assert not used & set(runner.programs.on_demand())


def test_scores_take_no_prefix_from_the_cache_but_leave_one(make_core: Any) -> None:
    core = make_core()
    ids = prompt(4 * PAGE + 1, 3)
    run(core, [request(1, ids, max_new_tokens=0, prompt_logprobs=0)])
    cached = core.scheduler.cached_tokens
    run(core, [request(2, ids, max_new_tokens=0, prompt_logprobs=0)])
    assert core.scheduler.cached_tokens == cached
    run(core, [request(3, ids)])
    assert core.scheduler.cached_tokens == cached + 4 * PAGE
    assert core.flush_cache() > 0
    run(core, [request(4, ids)])
    assert core.scheduler.cached_tokens == cached + 4 * PAGE


def test_score_only_needs_prompt_logprobs() -> None:
    from jqserve.engine.validate import Limits, check_sampling

    limits = Limits(VOCAB, 100)
    with pytest.raises(RequestError, match="max_new_tokens"):
        check_sampling(SamplingParams(max_new_tokens=0), limits)
    check_sampling(SamplingParams(max_new_tokens=0, prompt_logprobs=0), limits)
    with pytest.raises(RequestError, match="prompt_logprobs"):
        check_sampling(SamplingParams(prompt_logprobs=21), limits)
