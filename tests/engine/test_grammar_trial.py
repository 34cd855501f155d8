"""Grammars whose compilation would take the engine with it are refused, and others are served as before."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from jqserve.engine import grammar_trial
from jqserve.engine.grammar import Grammars
from jqserve.errors import RequestError


def chain(n: int) -> str:
    """A schema of n references, one after the other."""
    names = {f"a{i}": {"$ref": f"#/$defs/a{i + 1}"} for i in range(n)}
    return json.dumps({"$defs": {**names, f"a{n}": {"type": "string"}}, "$ref": "#/$defs/a0"})


#: the first two take 2^40 of something, the others deeper than a stack
HOSTILE = {
    "patterns that all hold": ("lark", "start: A\nA: " + " & ".join(f"/.*a{i}.*/" for i in range(40))),
    "the same in a schema": (
        "json_schema",
        json.dumps({"allOf": [{"type": "string", "pattern": f"a{i}"} for i in range(40)]}),
    ),
    "references": ("json_schema", chain(6000)),
    "rules": ("lark", "start: a0\n" + "\n".join(f"a{i}: a{i + 1}" for i in range(18000)) + '\na18000: "x"'),
}


@pytest.fixture(scope="module")
def grammars(demo_dir: Path) -> Grammars:
    return Grammars(str(demo_dir), 4096, (2,))


@pytest.mark.parametrize("name", HOSTILE)
def test_what_takes_too_much_is_refused_and_the_next_one_served(grammars: Grammars, name: str) -> None:
    for _ in range(2):
        with pytest.raises(RequestError, match="make it smaller"):
            grammars.compile(HOSTILE[name]).result(60)
    assert grammars.compile(("regex", f"after {name}")).result(60).state.validate_tokens([]) == 0


def test_the_second_time_it_is_refused_at_once(grammars: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
    constraint = HOSTILE["references"]
    with pytest.raises(RequestError):
        grammars.compile(constraint).result(60)
    monkeypatch.setattr(grammar_trial.Trial, "survives", lambda *_: pytest.fail("it is tried again"))
    with pytest.raises(RequestError, match="make it smaller"):
        grammars.compile(constraint).result(60)


def test_a_deep_one_that_passes_the_trial_compiles_here(grammars: Grammars) -> None:
    grammars.compile(("json_schema", chain(500))).result(60)


def test_a_trial_that_somebody_ended_is_begun_again_and_ends_with_its_owner(demo_dir: Path) -> None:
    trial = grammar_trial.Trial(demo_dir / "tokenizer.json", 4096, (2,))
    assert trial.survives(("regex", "a+")) and trial.survives(("regex", "("))
    first = trial._process
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    assert trial.survives(("regex", "a+"))
    second = trial._process
    del trial
    assert second.poll() is not None


def test_a_trial_that_does_not_start_says_so(tmp_path: Path) -> None:
    trial = grammar_trial.Trial(tmp_path / "absent.json", 4096, (2,))
    with pytest.raises(RuntimeError, match="ended with status"):
        trial.survives(("regex", "a+"))
