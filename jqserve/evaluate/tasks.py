"""Tasks with one right answer: {"prompt", "answer"} a line, asked through the chat template, decoded greedily, judged
by exact match.

A model that predicts every token of an answer, and then its end, given the prompt and the answer so far, is one whose
greedy decoding gives that answer: one forward pass shows it. Only tasks where that fails are generated, since the same
text may come in other tokens.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jqserve.errors import RequestError
from jqserve.library import Model, Params

FLAG = "--tasks"
#: Sequences in one forward pass.
BATCH = 64
#: Logits on the device at a time: tokens x vocabulary.
LOGITS = 1 << 27
#: Tokens beyond the answer's own that a generated answer may take.
SLACK = 16


@dataclasses.dataclass(frozen=True)
class Task:
    prompt: str
    answer: str
    kind: str = "all"


def read_tasks(path: Path, limit: int | None = None) -> list[Task]:
    """Raises RequestError naming the line."""
    if limit is not None and limit < 1:
        raise RequestError("--limit", f"must be at least 1, found {limit}")
    if not path.is_file():
        raise RequestError(FLAG, f"no such file: {path}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(FLAG, f"{path}: cannot be read as text: {error}") from None
    tasks = []
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: U+2028 may stand inside a JSON string
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            tasks.append(Task(str(row["prompt"]), str(row["answer"]), str(row.get("kind", "all"))))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise RequestError(FLAG, f'{path}, line {number}: expected {{"prompt": ..., "answer": ...}}') from None
    if not tasks:
        raise RequestError(FLAG, f"{path}: holds no tasks")
    return tasks[:limit]


@dataclasses.dataclass(frozen=True)
class Scores:
    """by_kind  right and all, by kind in order of appearance: {"add": (93, 100), ...}
    right    whether each task is, in their order
    """

    by_kind: dict[str, tuple[int, int]]
    right: tuple[bool, ...]

    @property
    def accuracy(self) -> float:
        return sum(r for r, _ in self.by_kind.values()) / sum(n for _, n in self.by_kind.values())


#: (prompts as ids, most new tokens of each) -> the texts that follow
Generate = Callable[[Sequence[Sequence[int]], Sequence[int]], list[str]]


def score(
    model: Model,
    params: Params,
    tokenizer: Any,
    tasks: Sequence[Task],
    generate: Generate,
    progress: Callable[[int, int], None] | None = None,
) -> Scores:
    """tokenizer: jqserve.server.tokenizer.Tokenizer of the model. Raises RequestError for a task that the model has no
    positions for."""
    prompts, answers = [], []
    ends = model.config.eos_token_ids
    for task in tasks:
        ids = ask(tokenizer, task.prompt)
        prompts.append(ids)
        answers.append([*tokenizer.encode(task.answer, add_special_tokens=False), *ends[:1]])
        needed = len(ids) + len(answers[-1]) + SLACK
        if needed > model.config.max_position:
            raise RequestError(
                FLAG,
                f"task {len(prompts)} takes {needed} tokens with its answer, more than the model's "
                f"{model.config.max_position} positions: shorten it or leave it out",
            )
    right = np.zeros(len(tasks), bool)
    order = sorted(range(len(tasks)), key=lambda i: len(prompts[i]) + len(answers[i]))  # little padding
    waiting = order if ends else []
    while waiting:  # the longest first: what fits their width fits all
        width = -(-(len(prompts[waiting[-1]]) + len(answers[waiting[-1]])) // 32) * 32  # few programs
        size = max(1, min(BATCH, LOGITS // (width * model.config.vocab_size)))
        waiting, chosen = waiting[:-size], waiting[-size:]
        shape = size, width
        right[chosen] = _forced(model, params, [prompts[i] for i in chosen], [answers[i] for i in chosen], shape)
        if progress:
            progress(len(tasks) - len(waiting), len(tasks))
    left = [i for i in range(len(tasks)) if not right[i]]
    if left:
        texts = generate([prompts[i] for i in left], [len(answers[i]) + SLACK for i in left])
        for i, text in zip(left, texts):
            right[i] = text.strip() == tasks[i].answer.strip()
    by_kind: dict[str, tuple[int, int]] = {}
    for task, good in zip(tasks, right):
        got, of = by_kind.get(task.kind, (0, 0))
        by_kind[task.kind] = (got + int(good), of + 1)
    return Scores(by_kind, tuple(right.tolist()))


def ask(tokenizer: Any, prompt: str) -> list[int]:
    """The prompt as a user's message, in the model's chat template; as plain text for a model without one."""
    if tokenizer.chat is None:
        return list(tokenizer.encode(prompt))
    text = tokenizer.chat.render([{"role": "user", "content": prompt}])
    return list(tokenizer.encode(text, add_special_tokens=False))


def _forced(
    model: Model, params: Params, prompts: list[list[int]], answers: list[list[int]], shape: tuple[int, int]
) -> np.ndarray:
    """bool [B]: whether each token of the answer is the most likely one after those before it. shape: of the ids."""
    ids = np.zeros(shape, np.int32)
    for row, (prompt, answer) in enumerate(zip(prompts, answers)):
        ids[row, : len(prompt) + len(answer)] = [*prompt, *answer]
    best = np.asarray(jnp.argmax(model(params, jnp.asarray(ids)), axis=-1))
    return np.array(
        [
            best[row, len(prompt) - 1 : len(prompt) + len(answer) - 1].tolist() == answer
            for row, (prompt, answer) in enumerate(zip(prompts, answers))
        ]
    )
