"""The front end's core, under any RPC surface: admission, tokens in, sequences out, and the state of the server."""

from __future__ import annotations

import asyncio
import dataclasses
import enum
import itertools
import logging
import random
import time
import uuid
from typing import Any

from jqserve.engine import wire
from jqserve.engine.request import EngineRequest, SamplingParams
from jqserve.errors import EngineUnavailableError, JqserveError, ModelNotFoundError, QueueFullError, RequestError
from jqserve.server.config import ServerConfig
from jqserve.server.detokenize import Detokenizer
from jqserve.server.generation import FLUSH_SECONDS, FLUSH_TOKENS, Generation
from jqserve.server.link import EngineLink
from jqserve.server.tokenizer import Tokenizer

log = logging.getLogger("jqserve.server")

MAX_N = 128
MAX_REQUEST_ID = 256  # bytes
LONG_TEXT = 4096  # characters; a longer one is tokenized on a thread, which takes more than a millisecond


class State(enum.IntEnum):
    """As in the proto's ServerState."""

    STARTING = 1
    READY = 2
    DRAINING = 3
    FAILED = 4


@dataclasses.dataclass
class Frontend:
    """Joins the tokenizer and the link. Everything runs on one event loop."""

    config: ServerConfig
    state: State = State.STARTING
    status_text: str = "starting"
    info: dict[str, Any] = dataclasses.field(default_factory=dict)  # wire.Ready.info
    engine_pid: int = 0
    link: EngineLink | None = None
    tokenizer: Tokenizer | None = None
    defaults: SamplingParams = dataclasses.field(default_factory=SamplingParams)

    def __post_init__(self) -> None:
        self.began = time.monotonic()
        self.generations: dict[str, Generation] = {}
        self.idle = asyncio.Event()
        self.idle.set()
        self._rids = itertools.count(1)
        seed = self.config.random_seed
        self._seeds = random.SystemRandom() if seed is None else random.Random(seed)

    def ready(self, info: dict[str, Any]) -> None:
        """The engine serves from now on."""
        self.info = info
        self.defaults = wire.sampling_from_json(info.get("sampling_defaults") or {})
        if self.state is State.STARTING:
            self.state, self.status_text = State.READY, "ready"

    def need_ready(self) -> EngineLink:
        """Raises `EngineUnavailableError` unless requests are served now."""
        if self.state is State.READY and self.link is not None and self.link.up:
            return self.link
        raise EngineUnavailableError(
            {
                State.STARTING: f"the server is starting ({self.status_text}); try again later",
                State.DRAINING: "the server is shutting down and takes no new requests",
            }.get(self.state, f"the engine is gone: {self.status_text}")
        )

    def need_tokenizer(self, field: str) -> Tokenizer:
        if self.tokenizer is None:
            if not self.config.ids_only:
                self.need_ready()
                raise EngineUnavailableError("the tokenizer is still loading; try again later")
            raise RequestError(field, "this server has no tokenizer (see --tokenizer-path); send token_ids")
        return self.tokenizer

    def check_model(self, name: str) -> None:
        if name and name != self.config.name:
            raise ModelNotFoundError(f"model: {name!r} is not served here; this server has {self.config.name!r}")

    async def encode(self, field: str, text: str, add_special_tokens: bool) -> list[int]:
        tokenizer = self.need_tokenizer(field)
        if len(text) <= LONG_TEXT:
            return tokenizer.encode(text, add_special_tokens)
        return await asyncio.to_thread(tokenizer.encode, text, add_special_tokens)

    def submit(
        self,
        prompt: list[int],
        sampling: SamplingParams,
        *,
        n: int = 1,
        request_id: str = "",
        text: bool = True,
        flush_tokens: int = FLUSH_TOKENS,
        flush_seconds: float = FLUSH_SECONDS,
    ) -> Generation:
        """Starts n sequences. The caller iterates the result and then calls `finish` with it, whatever happens.

        Raises `RequestError`, `QueueFullError`, `EngineUnavailableError`. What only the engine can judge is raised by
        the iteration, before its first item.
        """
        link = self.need_ready()
        request_id = request_id or uuid.uuid4().hex
        if len(request_id.encode()) > MAX_REQUEST_ID:
            raise RequestError("request_id", f"is longer than {MAX_REQUEST_ID} bytes")
        if request_id in self.generations:
            raise RequestError("request_id", f"{request_id!r} is already running; ids must be unique")
        if not 1 <= n <= MAX_N:
            raise RequestError("sampling.n", f"is {n}; expected 1 to {MAX_N}")
        sampling = self._resolve(prompt, sampling)
        self._admit(link, n)
        with_text = self.tokenizer is not None and (text or bool(sampling.stop))
        skip = sampling.skip_special_tokens
        generation = Generation(
            request_id,
            [
                EngineRequest(
                    next(self._rids), tuple(prompt), dataclasses.replace(sampling, seed=copy_seed(sampling, i))
                )
                for i in range(n)
            ],
            link,
            lambda: (
                Detokenizer(lambda ids: self.need_tokenizer("text").decode(ids, skip), prompt) if with_text else None
            ),
            flush_tokens=flush_tokens,
            flush_seconds=flush_seconds,
        )
        generation.start()
        self.generations[request_id] = generation
        self.idle.clear()
        return generation

    def finish(self, generation: Generation) -> None:
        """Ends the generation's life here; frees its slots if it still runs."""
        generation.close()
        self.generations.pop(generation.request_id, None)
        if not self.generations:
            self.idle.set()

    def abort(self, request_id: str) -> bool:
        """False when no running request has this id."""
        generation = self.generations.get(request_id)
        if generation is not None:
            generation.abort()
        return generation is not None

    def fail_all(self, error: JqserveError) -> None:
        for generation in list(self.generations.values()):
            generation.fail(error)

    def _admit(self, link: EngineLink, n: int) -> None:
        """The cheap refusal of a full server; the engine has the last word."""
        running, queued = self.info.get("max_running_requests"), self.info.get("max_queued")
        if running is None or queued is None:
            return
        if n > running + queued:
            raise RequestError("sampling.n", f"is {n}; this server holds {running + queued} sequences at most")
        if link.live + n > running + queued:
            raise QueueFullError(f"the server is full ({running} running, {queued} queued); try again later")

    def _resolve(self, prompt: list[int], sampling: SamplingParams) -> SamplingParams:
        """Fills in max_new_tokens and seed; refuses a prompt that cannot run."""
        if not prompt:
            raise RequestError("prompt", "is empty; at least one token is needed")
        vocabulary, context = self.info.get("vocab_size"), self.info.get("context_length")
        if vocabulary is not None and (worst := max(prompt)) >= vocabulary:
            raise RequestError("token_ids", f"holds {worst}; the vocabulary has {vocabulary} tokens")
        if context is not None and len(prompt) >= context:
            raise RequestError(
                "prompt",
                f"has {len(prompt)} tokens; the context length is {context}, and the answer needs at least one",
            )
        if any(not stop for stop in sampling.stop):
            raise RequestError("sampling.stop", "holds an empty string")
        if sampling.stop and self.config.ids_only:
            raise RequestError("sampling.stop", "this server has no tokenizer, so it cannot match stop strings")
        if sampling.max_new_tokens is None:
            sampling = dataclasses.replace(sampling, max_new_tokens=(context or 2**31) - len(prompt))
        if sampling.seed is None:
            sampling = dataclasses.replace(sampling, seed=self._seeds.getrandbits(31))
        return sampling


def copy_seed(sampling: SamplingParams, index: int) -> int:
    """The seed of copy `index` of a request: its own for copy 0, well-spread 31-bit ones for the others."""
    assert sampling.seed is not None
    return sampling.seed if index == 0 else random.Random(f"{sampling.seed}/{index}").getrandbits(31)
