"""`jqserve.Engine`: the engine for programs. Prompts in, completions out, a progress bar meanwhile; no server."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import numbers
import operator
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from jqserve.checkpoint.gguf_file import gguf_of
from jqserve.checkpoint.gguf_tokenizer import tokenizer_folder
from jqserve.checkpoint.hub import resolve
from jqserve.checkpoint.opening import dtype_name
from jqserve.engine.completion import Completion, Running
from jqserve.engine.config import EngineConfig
from jqserve.engine.engine import EngineCore
from jqserve.engine.load import load_engine
from jqserve.engine.request import EngineRequest, SamplingParams
from jqserve.engine.validate import check_request
from jqserve.errors import CheckpointError, RequestError
from jqserve.server.tokenizer import Tokenizer

Messages = Sequence[Mapping[str, Any]]  # [{"role": "user", "content": "..."}, ...]
Prompt = str | Messages | Sequence[int]


class Engine:
    """Continuous batching over a paged KV cache, offline.

        engine = jqserve.Engine("path/to/checkpoint")
        for completion in engine.generate(["Once upon a time"], SamplingParams(max_new_tokens=32)):
            print(completion.text)

    One thread may use it at a time.
    """

    def __init__(self, model_path: str | EngineConfig, *, tokenizer_path: str | None = None, **options: Any) -> None:
        """Loads a checkpoint directory, a Hub id, or what a `jqserve.EngineConfig` says; `options` are its fields:
        dtype, quantization, max_running_requests, context_length, num_pages, ...

        Shapes are compiled when they first come, unless disable_warmup=False is given. Raises TypeError for an unknown
        option, JqserveError for the rest.
        """
        known = {field.name for field in dataclasses.fields(EngineConfig)}
        if unknown := sorted(options.keys() - known):
            raise TypeError(f"unknown engine options {', '.join(unknown)}; known: {', '.join(sorted(known))}")
        if isinstance(model_path, EngineConfig):
            config = dataclasses.replace(model_path, **options)
        else:
            if "dtype" in options:
                options["dtype"] = dtype_name(options["dtype"])
            config = EngineConfig(model_path=str(model_path), **({"disable_warmup": True} | options))
        directory = resolve(config.model_path, config.revision, weights=config.load_format != "dummy")
        gguf, named = gguf_of(directory), tokenizer_path or config.tokenizer_path
        if gguf and not named:
            named = tokenizer_folder(gguf)
        # The engine needs it, too: for grammars, and to calibrate with.
        self.config = dataclasses.replace(config, tokenizer_path=named)
        self.core: EngineCore = load_engine(self.config)
        self.tokenizer = _tokenizer(resolve(named, weights=False) if named else directory)
        self._rids = itertools.count()

    @property
    def default_sampling(self) -> SamplingParams:
        """The checkpoint's defaults (generation_config.json)."""
        return SamplingParams(**self.core.model_info().get("sampling_defaults", {}))

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool = True,
    ) -> list[Completion]:
        """Completes every prompt (text, chat messages, or token ids); results in the order of the prompts.

        sampling   for all, or one for each; None: the checkpoint's defaults. A missing seed is drawn from
                   EngineConfig.random_seed and the prompt's place, so that a run can be repeated
        progress   shows a bar on stderr, where that is a terminal

        Raises RequestError, naming the prompt, before anything runs; JqserveError when the engine failed on one.
        """
        if not isinstance(prompts, Iterable):
            raise RequestError("prompts", f"found {prompts!r:.80}; expected text, token ids, or a list of them")
        several: list[Any] = list(prompts)
        if isinstance(prompts, str) or (several and isinstance(several[0], numbers.Integral | Mapping)):
            several = [prompts]
        each: list[Any] = [self.default_sampling if sampling is None else sampling] * len(several)
        if isinstance(sampling, Sequence):
            if len(sampling) != len(several):
                raise RequestError("sampling", f"{len(sampling)} for {len(several)} prompts; give one, or one for each")
            each = list(sampling)
        if wrong := [s for s in each if not isinstance(s, SamplingParams)]:
            raise RequestError("sampling", f"found a {type(wrong[0]).__name__}; expected SamplingParams")
        requests = [self._request(i, p, s) for i, (p, s) in enumerate(zip(several, each))]
        running = {request.rid: Running(request, self.tokenizer, i) for i, request in enumerate(requests)}
        queue = list(reversed(requests))
        try:
            with _bar(progress) as bar:
                task = bar.add_task("generate", total=len(requests), rate="")
                while queue or self.core.has_work():
                    while queue and not self.core.full:
                        self.core.add(queue.pop())
                    for event in self.core.step():
                        if running[event.rid].take(event, self.core):
                            bar.advance(task)
                    tokens = sum(len(r.ids) for r in running.values())
                    bar.update(task, rate=f"{tokens:,} tokens")
        finally:
            for rid in running:
                self.core.abort(rid)
        return [running[request.rid].completion() for request in requests]

    def _request(self, index: int, prompt: Prompt, sampling: SamplingParams) -> EngineRequest:
        try:
            if isinstance(prompt, str):
                ids = self.tokenizer.encode(prompt)
            elif not isinstance(prompt, Mapping) and len(prompt) and isinstance(prompt[0], Mapping):
                ids = self._chat(index, prompt)
            else:
                ids = prompt
            tokens = tuple(operator.index(token) for token in ids)  # of whatever integers; 1.5 is not taken for 1
        except TypeError:
            if isinstance(prompt, str):  # the tokenizer takes no such text, and calls it no text at all
                raise RequestError("prompt", f"holds half of a surrogate pair, no character (prompt {index})") from None
            raise RequestError(
                "prompt", f"found {prompt!r:.80}; expected text, chat messages or token ids (prompt {index})"
            ) from None
        if sampling.seed is None:
            sampling = dataclasses.replace(sampling, seed=((self.config.random_seed << 32) + index) % 2**64)
        request = EngineRequest(next(self._rids), tokens, sampling)
        try:
            return check_request(request, self.core.limits)
        except RequestError as error:
            raise RequestError(error.field, f"{str(error).removeprefix(error.field + ': ')} (prompt {index})") from None

    @functools.cached_property
    def _chats(self) -> Tokenizer:
        """The server's, so that messages become the same ids here and there."""
        return Tokenizer(self.tokenizer)

    def _chat(self, index: int, messages: Any) -> list[int]:
        """As the checkpoint's chat template has them, up to where the answer begins."""
        if self._chats.chat is None:
            raise RequestError("prompt", f"this model has no chat template; give text or token ids (prompt {index})")
        try:
            return self._chats.encode(self._chats.chat.render(messages), add_special_tokens=False)
        except RequestError as error:
            raise RequestError("prompt", f"{str(error).removeprefix('chat: ')} (prompt {index})") from error


def _tokenizer(directory: str) -> Any:
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that it found no torch
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{directory}: no tokenizer could be loaded ({error}); name another directory with tokenizer_path"
        ) from error


def _bar(shown: bool) -> Progress:
    from rich.console import Console

    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        console=console,
        disable=not shown or not console.is_terminal,
    )
