"""Generation for an evaluation, through the engine that serves; and, where there is a GPU, its speed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import jax

from jqserve.engine.api import Engine
from jqserve.engine.request import SamplingParams

#: What speed is measured on: prompts at once, tokens of each, new tokens of each.
SPEED = (64, 128, 128)


class Generator:
    """Greedy generation with an engine that is built when it is first needed, and given up at `close`."""

    def __init__(self, path: str, dtype: str | None, context: int = 1024) -> None:
        self._options: dict[str, Any] = {"dtype": dtype, "context_length": context, "max_running_requests": 64}
        self._path = path
        self._engine: Engine | None = None

    @property
    def engine(self) -> Engine:
        if self._engine is None:
            self._engine = Engine(self._path, **self._options)
        return self._engine

    def __call__(self, prompts: Sequence[Sequence[int]], limits: Sequence[int]) -> list[str]:
        sampling = [SamplingParams(max_new_tokens=limit, temperature=0.0) for limit in limits]
        return [done.text for done in self.engine.generate(list(prompts), sampling)]

    def close(self) -> None:
        self._engine = None


def tokens_per_second(path: str, dtype: str | None, vocab_size: int) -> float | None:
    """Generated tokens a second, SPEED's batch at once, the second time it runs; None where there is no GPU."""
    if jax.default_backend() == "cpu":
        return None
    batch, prompt, new = SPEED
    engine = Engine(path, dtype=dtype, context_length=prompt + new, max_running_requests=batch)
    prompts = [[(7 * i + 13 * j) % vocab_size for j in range(prompt)] for i in range(batch)]
    sampling = SamplingParams(max_new_tokens=new, temperature=0.0, ignore_eos=True)
    seconds = 0.0
    for _ in range(2):
        begin = time.perf_counter()
        engine.generate(prompts, sampling, progress=False)
        seconds = time.perf_counter() - begin
    return batch * new / seconds
