"""Score: the log-probability of every token of given sequences, through the engine's prompt logprobs."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

from grpc.aio import ServicerContext

from jqserve.engine.request import SamplingParams, TokenLogprobs
from jqserve.errors import RequestError
from jqserve.server import requests
from jqserve.server.frontend import Frontend
from jqserve.server.pb import jqserve_pb2 as pb

MAX_INPUTS = 64
MAX_TOP = 20


@dataclasses.dataclass(frozen=True)
class Item:
    """One sequence: its first `context` tokens are given, the others scored. `field`: its place in the request."""

    field: str
    tokens: list[int]
    context: int


async def score(frontend: Frontend, request: pb.ScoreRequest, context: ServicerContext) -> pb.ScoreResponse:
    """Raises `RequestError` for what cannot be scored, and what `Frontend.submit` raises."""
    frontend.need_ready()
    requests.refuse_unknown_fields(request, "ScoreRequest")
    frontend.check_model(request.model)
    if not 1 <= len(request.inputs) <= MAX_INPUTS:
        raise RequestError("inputs", f"has {len(request.inputs)} sequences; expected 1 to {MAX_INPUTS}")
    if request.top_logprobs > MAX_TOP:
        raise RequestError("top_logprobs", f"is {request.top_logprobs}; expected 0 to {MAX_TOP}")
    frontend.need_room(len(request.inputs), "len(inputs)")  # for all: part of the results is of no use to anybody
    items = [await _item(frontend, i, given) for i, given in enumerate(request.inputs)]
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(_score(frontend, item, request.top_logprobs, context)) for item in items]
    return pb.ScoreResponse(results=[task.result() for task in tasks])


async def _item(frontend: Frontend, index: int, given: pb.ScoreInput) -> Item:
    field = f"inputs[{index}]"
    requests.refuse_unknown_fields(given, "ScoreInput")
    kind = given.WhichOneof("input")
    if kind is None:
        raise RequestError(field, "is empty; give text or token_ids")
    tokens = list(given.token_ids.ids)
    if kind == "text":
        tokens = await frontend.encode(field, given.text, add_special_tokens=True)
    if len(tokens) < 2:
        raise RequestError(field, f"has {len(tokens)} tokens; at least 2 are needed, for the first is only given")
    before = given.context if given.HasField("context") else 1
    if not 1 <= before < len(tokens):
        raise RequestError(f"{field}.context", f"is {before}; expected 1 to {len(tokens) - 1}")
    return Item(field, tokens, before)


async def _score(frontend: Frontend, item: Item, tops: int, context: ServicerContext) -> pb.Scored:
    sampling = SamplingParams(max_new_tokens=0, temperature=0.0, prompt_logprobs=max(1, tops), prompt_from=item.context)
    try:
        generation = frontend.submit(item.tokens, sampling, text=False, scored=True)
        with frontend.serving(generation, context) as serving:
            async for ended in generation:
                serving.finished(ended)  # type: ignore[arg-type]  # nothing is generated, so there is no delta
    except RequestError as error:  # of up to 64: which one
        raise RequestError(item.field, str(error).removeprefix("prompt: ")) from None
    entries = generation.sequences[0].prompt_logprobs
    scored = item.tokens[item.context :]
    return pb.Scored(
        token_ids=item.tokens,
        logprobs=[_logprob(token, entry, tops) for token, entry in zip(scored, entries, strict=True)],
        total=sum(entry.token for entry in entries),
        greedy=all(entry.token >= entry.top[0] for entry in entries),
    )


def first(errors: BaseExceptionGroup[Any]) -> BaseException:
    """Of what went wrong in several sequences at once."""
    error = errors.exceptions[0]
    return first(error) if isinstance(error, BaseExceptionGroup) else error


def _logprob(token: int, entry: TokenLogprobs, tops: int) -> pb.TokenLogprob:
    best = [pb.TopLogprob(token_id=t, logprob=p) for t, p in zip(entry.top_ids[:tops], entry.top[:tops])]
    return pb.TokenLogprob(token_id=token, logprob=entry.token, top=best)
