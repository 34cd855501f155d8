"""Generation for an evaluation, through the engine that serves; and, where there is a GPU, its speed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import jax

from jqserve.checkpoint.gguf_file import gguf_of
from jqserve.checkpoint.gguf_tokenizer import tokenizer_folder
from jqserve.engine.api import Engine
from jqserve.engine.request import SamplingParams
from jqserve.server.tokenizer import Tokenizer, load_tokenizer

#: What speed is measured on: prompts at once, tokens of each, new tokens of each.
SPEED = (64, 128, 128)


def tokenizer_of(path: str) -> Tokenizer:
    """The tokenizer of a checkpoint, also of a .gguf file."""
    gguf = gguf_of(path)
    return load_tokenizer(tokenizer_folder(gguf) if gguf else path)


class Generator:
    """Greedy generation with an engine that is built when it is first needed, and given up at `close`. Its context
    grows with what is asked."""

    def __init__(self, path: str, dtype: str | None, context: int = 1024, activations: Any = "config") -> None:
        self._options: dict[str, Any] = {
            "dtype": dtype,
            "activations": activations,
            "context_length": context,
            "max_running_requests": 64,
        }
        self._path = path
        self._engine: Engine | None = None

    @property
    def engine(self) -> Engine:
        if self._engine is None:
            self._engine = Engine(self._path, **self._options)
        return self._engine

    def __call__(self, prompts: Sequence[Sequence[int]], limits: Sequence[int]) -> list[str]:
        needed = max((len(prompt) + limit for prompt, limit in zip(prompts, limits)), default=0)
        if needed > self._options["context_length"]:
            self.close()
            self._options["context_length"] = needed
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
