"""The plain types that the front end and the engine share: no jax, no protobuf, no behaviour."""

from __future__ import annotations

import dataclasses
import enum


class FinishReason(enum.IntEnum):
    """Why a sequence ended."""

    STOP = 1  # EOS, a stop token id, or (decided by the front end) a stop string
    LENGTH = 2  # max_new_tokens or the context length
    ABORT = 3  # cancelled by the client, its deadline, or a drain that ran out of time
    ERROR = 4  # the engine failed; `StepEvent.error` says how


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How to continue a prompt. Validated by `jqserve.engine.validate`; the defaults change nothing.

    temperature 0 is greedy. top_k 0 or -1, top_p 1, min_p 0 are off. Penalties follow OpenAI (presence, frequency:
    subtracted, over generated tokens) and Hugging Face (repetition: divided or multiplied, over prompt and generated
    tokens). `seed` None draws one. `logprobs`: None, or the number (0..20) of top logprobs beside the sampled token's.
    `stop` strings are matched by the front end, `stop_token_ids` and EOS by the engine. `constraint`: None, or what the
    answer is held to: (kind, source), kind "json_schema" | "regex" | "lark" | "choice" (source: a JSON list of texts).
    `prompt_logprobs`: None, or the number of top logprobs at each token of the prompt from token `prompt_from` on; only
    then may max_new_tokens be 0.
    """

    max_new_tokens: int | None = None  # None: up to the context length
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None
    logprobs: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    constraint: tuple[str, str] | None = None
    prompt_logprobs: int | None = None
    prompt_from: int = 1


@dataclasses.dataclass(frozen=True)
class EngineRequest:
    """What crosses the link to the engine: one sequence. `n > 1` is several of these."""

    rid: int  # unique in the life of the front end
    prompt: tuple[int, ...]  # token ids, at least one
    sampling: SamplingParams  # max_new_tokens and seed resolved (not None)
    priority: int = 0  # higher runs first; within a priority first come, first served


@dataclasses.dataclass(frozen=True)
class TokenLogprobs:
    """Natural logs under the distribution after penalties and constraint, before temperature and truncation."""

    token: float
    top_ids: tuple[int, ...] = ()
    top: tuple[float, ...] = ()


@dataclasses.dataclass(slots=True)  # one is made for every token, and to make a frozen one takes four times as long
class StepEvent:
    """What one dispatch gave one sequence: one token, or as many as it had decode steps. `finish` None while it runs.

    `cached_tokens`: prompt tokens found in the prefix cache; only told with the first token.
    """

    rid: int
    token_ids: tuple[int, ...]
    finish: FinishReason | None = None
    matched_stop: int | None = None  # the token id that stopped it
    logprobs: tuple[TokenLogprobs, ...] = ()
    error: str = ""
    cached_tokens: int = 0
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()  # once, with the first event: of prompt[prompt_from:]
    field: str = ""  # with `error`: the request's own field is at fault, not the engine


@dataclasses.dataclass(frozen=True)
class EngineStats:
    """The engine's load, sent with a step's events a few times a second."""

    running: int = 0
    waiting: int = 0
    pages_used: int = 0
    pages_total: int = 0
    preemptions: int = 0
    compilations_after_warmup: int = 0
    steps: int = 0
    generated_tokens: int = 0
    mean_batch: float = 0.0
    prompt_tokens: int = 0  # of admissions (recomputed ones count again), and how many of them the prefix cache had
    cached_tokens: int = 0
    pages_cached: int = 0  # free pages that still hold a prefix
    evictions: int = 0
    host_seconds: dict[str, float] = dataclasses.field(default_factory=dict)  # by phase of the loop, since the start
