"""Whether a request can be served as asked; every refusal names its field. Plain Python."""

from __future__ import annotations

import dataclasses
import math

from jqserve.engine.request import EngineRequest, SamplingParams
from jqserve.errors import RequestError

MAX_LOGIT_BIAS = 300  # as OpenAI
MAX_STOP_TOKEN_IDS = 16  # with the EOS ids they fit, beside 300 biases, into a slot's table
MAX_TOP_LOGPROBS = 20
MAX_STOP_STRINGS = 32
#: below it a logit divided by it may overflow float32; a draw at this temperature is greedy, but for ties
LEAST_TEMPERATURE = 1e-6
LEAST_REPETITION = 1e-6  # for the same reason


@dataclasses.dataclass(frozen=True)
class Limits:
    """What the model and the pool allow. `context_length`: prompt and answer together."""

    vocab_size: int
    context_length: int
    eos_token_ids: tuple[int, ...] = ()


def check_sampling(sampling: SamplingParams, limits: Limits) -> None:
    """Raises RequestError for the first field out of range."""
    s = sampling
    _integer("max_new_tokens", s.max_new_tokens, 1 if s.prompt_logprobs is None else 0, optional=True)
    _integer("min_new_tokens", s.min_new_tokens, 0)
    if s.max_new_tokens is not None and s.min_new_tokens > s.max_new_tokens:
        raise RequestError("min_new_tokens", f"{s.min_new_tokens} is more than max_new_tokens {s.max_new_tokens}")
    _number("temperature", s.temperature, 0, 100)
    _integer("top_k", s.top_k, -1, 2**31 - 1)
    _number("top_p", s.top_p, 0, 1, above=True)
    _number("min_p", s.min_p, 0, 1)
    _number("repetition_penalty", s.repetition_penalty, LEAST_REPETITION, 10)
    _number("presence_penalty", s.presence_penalty, -2, 2)
    _number("frequency_penalty", s.frequency_penalty, -2, 2)
    _integer("seed", s.seed, -(2**63), 2**64 - 1, optional=True)
    _integer("logprobs", s.logprobs, 0, min(MAX_TOP_LOGPROBS, limits.vocab_size), optional=True)
    _integer("prompt_logprobs", s.prompt_logprobs, 0, min(MAX_TOP_LOGPROBS, limits.vocab_size), optional=True)
    _integer("prompt_from", s.prompt_from, 1)
    if s.constraint is not None and not _two_texts(s.constraint):
        raise RequestError(
            "constraint",
            f"found {s.constraint!r:.80}; expected a pair of texts, ('regex', '[0-9]+'), where a schema or a list of "
            "choices is JSON: ('json_schema', json.dumps(schema))",
        )
    if s.constraint is not None and s.min_new_tokens:
        raise RequestError("min_new_tokens", "cannot be asked together with a constraint: it says when an answer ends")
    if isinstance(s.logit_bias, dict):
        raise RequestError("logit_bias", "is a dict; give pairs of token id and bias: tuple(bias.items())")
    if len(s.logit_bias) > MAX_LOGIT_BIAS:
        raise RequestError("logit_bias", f"{len(s.logit_bias)} entries; at most {MAX_LOGIT_BIAS} are supported")
    for token, bias in s.logit_bias:
        _token("logit_bias", token, limits)
        _number("logit_bias", bias, -1e4, 1e4)
    if len({token for token, _ in s.logit_bias}) < len(s.logit_bias):
        raise RequestError("logit_bias", "a token id stands in it twice")
    if len(s.stop_token_ids) > MAX_STOP_TOKEN_IDS:
        raise RequestError("stop_token_ids", f"{len(s.stop_token_ids)} ids; at most {MAX_STOP_TOKEN_IDS}")
    for token in s.stop_token_ids:
        _token("stop_token_ids", token, limits)
    if isinstance(s.stop, str):  # each of its characters would stop
        raise RequestError("stop", f"is one string; give a tuple of them: ({s.stop!r:.80},)")
    if len(s.stop) > MAX_STOP_STRINGS:
        raise RequestError("stop", f"{len(s.stop)} strings; at most {MAX_STOP_STRINGS}")
    if any(not isinstance(text, str) or not text for text in s.stop):
        raise RequestError("stop", "a stop string is empty or not a string")


def check_request(request: EngineRequest, limits: Limits) -> EngineRequest:
    """The request with max_new_tokens and min_new_tokens cut to what the context leaves, a temperature that can be
    divided by, and a seed. Raises RequestError."""
    prompt = request.prompt
    if not prompt:
        raise RequestError("prompt", "it is empty; at least one token is needed")
    if len(prompt) + (request.sampling.max_new_tokens != 0) > limits.context_length:
        raise RequestError(
            "prompt",
            f"it has {len(prompt)} tokens; prompt and answer together may have {limits.context_length}. "
            "Shorten it, or start the server with a larger --context-length",
        )
    if set(map(type, prompt)) != {int} or min(prompt) < 0 or max(prompt) >= limits.vocab_size:
        for token in prompt:  # names the first; one by one, a thousand good ones took the loop 0.3 ms
            _token("prompt", token, limits)
    check_sampling(request.sampling, limits)
    room = limits.context_length - len(prompt)
    asked, temperature = request.sampling.max_new_tokens, request.sampling.temperature
    sampling = dataclasses.replace(
        request.sampling,
        max_new_tokens=room if asked is None else min(asked, room),
        min_new_tokens=min(request.sampling.min_new_tokens, room),
        temperature=0.0 if temperature < LEAST_TEMPERATURE else temperature,
        seed=0 if request.sampling.seed is None else request.sampling.seed,
    )
    return dataclasses.replace(request, sampling=sampling)


def stop_ids(sampling: SamplingParams, limits: Limits) -> frozenset[int]:
    """The token ids that end an answer: the request's own, and EOS unless it is to be ignored."""
    return frozenset(sampling.stop_token_ids) | frozenset(() if sampling.ignore_eos else limits.eos_token_ids)


def _two_texts(value: object) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(isinstance(part, str) for part in value)


def _integer(field: str, value: object, low: int, high: int | None = None, *, optional: bool = False) -> None:
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise RequestError(field, f"{value!r} is not an integer")
    if value < low or (high is not None and value > high):
        raise RequestError(
            field, f"{value} is less than {low}" if high is None else f"{value} is not in {low} .. {high}"
        )


def _number(field: str, value: object, low: float, high: float, *, above: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise RequestError(field, f"{value!r} is not a finite number")
    if not low <= value <= high or (above and value == low):
        raise RequestError(field, f"{value} is not in {'(' if above else '['}{low:g}, {high:g}]")


def _token(field: str, token: object, limits: Limits) -> None:
    if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < limits.vocab_size:
        raise RequestError(field, f"token id {token!r} is not in 0 .. {limits.vocab_size - 1}")
