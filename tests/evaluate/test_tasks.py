"""Exact match by one forward pass and by generation must agree; here the model's logits are written by hand."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jqserve.errors import RequestError
from jqserve.evaluate import engines, tasks
from jqserve.evaluate.tasks import Task, read_tasks, score

END = 1


class Letters:
    """A character an id; "#" stands for the text "ab" too."""

    chat = None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [ord(letter) for letter in text]


@dataclasses.dataclass
class Counting:
    """A model that answers with the prompt's last letter's successor, then ends."""

    class config:
        eos_token_ids = (END,)
        vocab_size = 128
        max_position = 256

    calls: int = 0

    def __call__(self, params: Any, ids: Any) -> Any:
        self.calls += 1
        ids = np.asarray(ids)
        following = np.where(np.roll(ids, 1, 1) == ord("?"), END, ids + 1)
        following = np.where(ids == ord("?"), np.roll(ids, 1, 1) + 1, following)
        return jnp.asarray(np.eye(128, dtype=np.float32)[np.clip(following, 0, 127)])


def test_what_is_right_is_seen_in_one_pass_and_the_rest_is_generated() -> None:
    asking = [Task("a?", "b", "x"), Task("c?", "d", "x"), Task("a?", "z", "y"), Task("k?", "yes", "y")]
    asked: list[tuple[list[list[int]], list[int]]] = []

    def generate(prompts: Sequence[Sequence[int]], limits: Sequence[int]) -> list[str]:
        asked.append(([list(p) for p in prompts], list(limits)))
        return [" b ", " yes\n"]

    model = Counting()
    scores = score(model, {}, Letters(), asking, generate)  # type: ignore[arg-type]
    assert model.calls == 1
    assert asked == [([[97, 63], [107, 63]], [18, 20])]
    assert scores.by_kind == {"x": (2, 2), "y": (1, 2)}
    assert scores.accuracy == 0.75


def test_an_answer_that_does_not_end_is_generated() -> None:
    """ "b" alone would be right by its tokens; the model has to end there as well."""

    class Endless(Counting):
        def __call__(self, params: Any, ids: Any) -> Any:
            return super().__call__(params, ids).at[..., END].set(-1)

    generated: list[int] = []

    def generate(prompts: Sequence[Sequence[int]], limits: Sequence[int]) -> list[str]:
        generated.extend(limits)
        return ["bcdef"]

    scores = score(Endless(), {}, Letters(), [Task("a?", "b")], generate)  # type: ignore[arg-type]
    assert generated and scores.accuracy == 0


def test_reading(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"prompt": "p", "answer": 3}\n\n{"prompt": "q", "answer": "b", "kind": "k"}\n')
    assert read_tasks(path) == [Task("p", "3"), Task("q", "b", "k")]
    assert len(read_tasks(path, 1)) == 1
    path.write_text('{"prompt": "p", "answer": 3}', encoding="utf-8-sig")
    assert read_tasks(path) == [Task("p", "3")]
    for second in ("[1]", "[" * 100_000):
        path.write_text('{"prompt": "p", "answer": 3}\n' + second)
        with pytest.raises(RequestError, match="line 2: expected"):
            read_tasks(path)
    path.write_text("\n")
    with pytest.raises(RequestError, match="holds no tasks"):
        read_tasks(path)
    with pytest.raises(RequestError, match="--limit: must be at least 1, found 0"):
        read_tasks(path, 0)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(RequestError, match="cannot be read as text"):
        read_tasks(path)


def test_a_line_ends_with_a_newline_alone(tmp_path: Path) -> None:
    """json.dumps(..., ensure_ascii=False) leaves U+2028 and U+0085 as they are inside strings."""
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps({"prompt": "a\u2028b\x85c", "answer": "d"}, ensure_ascii=False), encoding="utf-8")
    assert read_tasks(path) == [Task("a\u2028b\x85c", "d")]


def test_logits_in_flight_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "LOGITS", 2 * 32 * 128)  # two rows of 32 tokens
    seen: list[tuple[int, ...]] = []

    class Watched(Counting):
        def __call__(self, params: Any, ids: Any) -> Any:
            seen.append(np.asarray(ids).shape)
            return super().__call__(params, ids)

    asked = [Task(f"{letter}?", chr(ord(letter) + 1)) for letter in "acegi"] + [Task("x" * 40 + "a?", "b")]
    scores = score(Watched(), {}, Letters(), asked, lambda *_: [])  # type: ignore[arg-type]
    assert scores.accuracy == 1
    assert seen == [(1, 64), (2, 32), (2, 32), (2, 32)]


def test_a_task_beyond_the_models_positions_is_named() -> None:
    with pytest.raises(RequestError, match="task 2 takes 320 tokens with its answer, more than the model's 256"):
        score(Counting(), {}, Letters(), [Task("a?", "b"), Task("x" * 302, "b")], lambda *_: [])  # type: ignore[arg-type]


def test_the_generators_context_grows_and_its_activations_are_those_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[dict[str, Any]] = []

    class Fake:
        def __init__(self, path: str, **options: Any) -> None:
            built.append(options)

        def generate(self, prompts: Any, sampling: Any) -> list[Any]:
            return []

    monkeypatch.setattr(engines, "Engine", Fake)
    generator = engines.Generator("m", None, activations="none")
    for length in (10, 2000, 20):
        generator([[1] * length], [24])
    assert [options["context_length"] for options in built] == [1024, 2024]
    assert {options["activations"] for options in built} == {"none"}
