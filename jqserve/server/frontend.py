"""The front end's core, under any RPC surface: admission, tokens in, sequences out, and the state of the server."""

from __future__ import annotations

import asyncio
import concurrent.futures
import dataclasses
import enum
import itertools
import logging
import random
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from google.protobuf.message import Message
from grpc.aio import ServicerContext

from jqserve.engine import wire
from jqserve.engine.request import EngineRequest, EngineStats, SamplingParams
from jqserve.errors import (
    EngineUnavailableError,
    JqserveError,
    ModelNotFoundError,
    QueueFullError,
    RequestError,
    UnsupportedError,
)
from jqserve.server.bundle import make_bundle
from jqserve.server.config import ServerConfig
from jqserve.server.detokenize import Detokenizer
from jqserve.server.generation import Generation
from jqserve.server.link import EngineLink
from jqserve.server.metrics import Metrics
from jqserve.server.pace import Pace
from jqserve.server.serving import Serving
from jqserve.server.sizes import check_sizes
from jqserve.server.throughput import Throughput
from jqserve.server.tokenizer import Tokenizer
from jqserve.server.tracing import Tracer

log = logging.getLogger("jqserve.server")

MAX_N = 128
MAX_REQUEST_ID = 256  # bytes
LONG_TEXT = 4096  # characters; a longer one is tokenized on a thread, which takes more than a millisecond
TOKENIZER_THREADS = 4  # a crowd of long prompts waits here and not in the engine's or the loop's way
CHECK_SECONDS = 0.25  # how often running calls are held against the limits
BYTES_PER_TOKEN = 32  # of a prompt; English has 4 to 5, and the longest tokens are runs of spaces
LEAST_PROMPT_BYTES = 2**16
MAX_ENCODING = 64 * 2**20  # characters of long texts that may wait to be tokenized; a tokenizer makes ~100 B of each


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
        self.servings: set[Serving] = set()
        self.metrics = Metrics(self)
        interval = self.config.stream_interval
        self.pace = Pace(interval, fixed=True) if interval else Pace()
        self.tracer: Tracer | None = None
        self._throughput = Throughput()
        self.tasks: int = 0  # of the event loop, when last looked: a number that grows is a leak
        self._threads = concurrent.futures.ThreadPoolExecutor(TOKENIZER_THREADS, "tokenize")
        self.idle = asyncio.Event()
        self.idle.set()
        self._rids = itertools.count(1)
        seed = self.config.random_seed
        self._encoding = 0  # characters of texts on the tokenizer's threads
        self._bundle: tuple[bytes, str] | None = None
        self._seeds = random.SystemRandom() if seed is None else random.Random(seed)

    def ready(self, info: dict[str, Any]) -> None:
        """The engine serves from now on."""
        self.info = info
        self.defaults = wire.sampling_from_json(info.get("sampling_defaults") or {})
        if self.state is State.STARTING:
            self.state, self.status_text = State.READY, "ready"

    @property
    def stats(self) -> EngineStats:
        """The engine's newest."""
        return self.link.stats if self.link is not None else EngineStats()

    @property
    def throughput(self) -> float:
        """Generated tokens per second over the last seconds."""
        return self._throughput.rate

    @property
    def cache_hit_rate(self) -> float:
        stats = self.stats
        return stats.cached_tokens / stats.prompt_tokens if stats.prompt_tokens else 0.0

    @property
    def page_size(self) -> int:
        return int((self.info.get("kv") or {}).get("page_size") or 0)

    @property
    def is_ready(self) -> bool:
        return self.state is State.READY and self.link is not None and self.link.up

    async def watch(self) -> None:
        """Holds running calls against the limits, for ever."""
        config = self.config
        while True:
            await asyncio.sleep(CHECK_SECONDS)
            now = time.monotonic()
            self._throughput.sample(now, self.stats.generated_tokens)
            self.tasks = len(asyncio.all_tasks())
            for serving in list(self.servings):
                serving.check(now, config.max_request_seconds, config.unread_seconds)

    def close(self) -> None:
        """The server's end."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        if self.tracer is not None:
            self.tracer.close()

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

    def need_room(self, n: int, field: str = "sampling.n") -> None:
        """Before anything is done for a request. Raises as `submit` does for a server that is not ready, or full.
        `field`: whose number n is."""
        self._admit(self.need_ready(), n, field)

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

    @property
    def context_length(self) -> int:
        """0 until the engine has told it."""
        return int(self.info.get("context_length") or 0)

    @property
    def text_bytes(self) -> int:
        """The most that a prompt's text may have."""
        return self.config.max_prompt_bytes or max(LEAST_PROMPT_BYTES, BYTES_PER_TOKEN * self.context_length)

    def check_sizes(self, message: Message) -> None:
        """Raises `RequestError` for a large message with a part that is too large to be meant."""
        check_sizes(message, self.context_length, self.text_bytes)

    def check_size(self, field: str, size: int) -> None:
        """Raises `RequestError` for a text that is too long to be worth parsing: `size` in bytes (or characters)."""
        if size > (limit := self.text_bytes):
            raise RequestError(field, f"has {size} bytes; this server takes {limit} at most (--max-prompt-bytes)")

    async def encode(self, field: str, text: str, add_special_tokens: bool) -> list[int]:
        tokenizer = self.need_tokenizer(field)
        size = len(text)
        self.check_size(field, size)
        if size <= LONG_TEXT:
            return tokenizer.encode(text, add_special_tokens)
        if self._encoding and self._encoding + size > MAX_ENCODING:
            raise QueueFullError(f"{self._encoding} characters of prompts wait to be tokenized; try again later")
        self._encoding += size
        try:
            return await self.on_thread(tokenizer.encode, text, add_special_tokens)
        finally:
            self._encoding -= size

    async def on_thread[*A, R](self, function: Callable[[*A], R], *arguments: *A) -> R:
        """Runs what takes long beside the event loop, a few at a time."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *arguments)

    async def tokenizer_bundle(self) -> tuple[bytes, str]:
        """(zip of the tokenizer's files, its sha256). Raises `UnsupportedError` when the server has none."""
        if self.tokenizer is None or self.tokenizer.folder is None:
            self.need_ready()
            raise UnsupportedError("this server has no tokenizer files to give")
        if self._bundle is None:
            folder, template = Path(self.tokenizer.folder), self.tokenizer.chat_override
            self._bundle = await self.on_thread(make_bundle, folder, template)
        return self._bundle

    def submit(
        self,
        prompt: list[int],
        sampling: SamplingParams,
        *,
        n: int = 1,
        request_id: str = "",
        text: bool = True,
        pace: Pace | None = None,
        scored: bool = False,
        priority: int = 0,
    ) -> Generation:
        """Starts n sequences. The caller iterates the result within `serving`, which ends it, whatever happens.
        `pace`: None: the server's. `scored`: for a Score call, which is counted apart. `priority`: the highest runs
        first.

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
        tokens = tuple(prompt)
        generation = Generation(
            request_id,
            [EngineRequest(next(self._rids), tokens, copy_sampling(sampling, i), priority) for i in range(n)],
            link,
            lambda: (
                Detokenizer(lambda ids: self.need_tokenizer("text").decode(ids, skip), prompt) if with_text else None
            ),
            pace or self.pace,
            observe=self.metrics.flushed,
            scored=scored,
        )
        generation.start()
        self.generations[request_id] = generation
        self.pace.streams(len(self.generations))
        self.idle.clear()
        self.metrics.started(generation)
        return generation

    def serving(self, generation: Generation, context: ServicerContext) -> Serving:
        """What a servicer holds while it answers: a context manager that calls `finish`."""
        return Serving(self, generation, context)

    def finish(self, generation: Generation) -> None:
        """Ends the generation's life here; frees its slots if it still runs."""
        generation.close()
        self.generations.pop(generation.request_id, None)
        self.pace.streams(len(self.generations))
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

    def _admit(self, link: EngineLink, n: int, field: str = "sampling.n") -> None:
        """The cheap refusal of a full server; the engine has the last word."""
        running, queued = self.info.get("max_running_requests"), self.info.get("max_queued")
        if running is None or queued is None:
            return
        if n > running + queued:
            raise RequestError(field, f"is {n}; this server holds {running + queued} sequences at most")
        if link.live + n > running + queued:
            raise QueueFullError(f"the server is full ({running} running, {queued} queued); try again later")

    def _resolve(self, prompt: list[int], sampling: SamplingParams) -> SamplingParams:
        """Fills in max_new_tokens and seed; refuses a prompt that cannot run."""
        if not prompt:
            raise RequestError("prompt", "is empty; at least one token is needed")
        vocabulary, context = self.info.get("vocab_size"), self.info.get("context_length")
        if vocabulary is not None and (worst := max(prompt)) >= vocabulary:
            raise RequestError("token_ids", f"holds {worst}; the vocabulary has {vocabulary} tokens")
        answered = sampling.max_new_tokens != 0
        if context is not None and len(prompt) + answered > context:
            also = ", and the answer needs at least one" if answered else ""
            raise RequestError("prompt", f"has {len(prompt)} tokens; the context length is {context}{also}")
        if sampling.constraint is not None and sampling.constraint[0] not in self.info.get("constraints", ()):
            why = self.info.get("no_constraints") or "this engine holds no answer to a grammar"
            raise UnsupportedError(f"constraint: {why}")
        if sampling.prompt_logprobs is not None and not self.info.get("scores"):
            raise UnsupportedError("prompt_logprobs: this engine does not score prompts")
        if any(not stop for stop in sampling.stop):
            raise RequestError("sampling.stop", "holds an empty string")
        if sampling.stop and self.config.ids_only:
            raise RequestError("sampling.stop", "this server has no tokenizer, so it cannot match stop strings")
        limit, seed = sampling.max_new_tokens, sampling.seed
        if limit is not None and seed is not None:
            return sampling
        room = (context or 2**31) - len(prompt)
        return dataclasses.replace(  # once: it takes 15 us
            sampling,
            max_new_tokens=room if limit is None else limit,
            # As the engine cuts it; it would be held against a limit that nobody asked for.
            min_new_tokens=min(sampling.min_new_tokens, room) if limit is None else sampling.min_new_tokens,
            seed=self._seeds.getrandbits(31) if seed is None else seed,
        )


def copy_sampling(sampling: SamplingParams, index: int) -> SamplingParams:
    """Copy `index` of a request: copy 0 is as the request says; the others have well-spread 31-bit seeds of their own,
    and the prompt's logprobs are told once."""
    if index == 0:
        return sampling
    assert sampling.seed is not None
    seed = random.Random(f"{sampling.seed}/{index}").getrandbits(31)
    return dataclasses.replace(sampling, seed=seed, prompt_logprobs=None)
