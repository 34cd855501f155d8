"""Python arguments to protobuf requests: the same for the sync and the asyncio client."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypedDict, Unpack

from jqserve.server.pb import jqserve_pb2 as pb

Messages = Sequence[Mapping[str, Any]]  # [{"role": "user", "content": "..."}, ...]
Prompt = str | Messages | Sequence[int]

CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", 64 * 2**20),
    ("grpc.max_send_message_length", 64 * 2**20),
)
OUTPUTS = {"both": pb.OUTPUT_UNSPECIFIED, "text": pb.OUTPUT_TEXT, "token_ids": pb.OUTPUT_TOKEN_IDS}


class Options(TypedDict, total=False):
    """The keyword arguments of `generate`. An absent one takes the model's default; see the proto for each."""

    # sampling
    max_new_tokens: int
    min_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]
    seed: int
    n: int
    logprobs: int
    stop: str | Iterable[str]
    stop_token_ids: Iterable[int]
    ignore_eos: bool
    skip_special_tokens: bool
    # the request
    request_id: str
    model: str
    output: str  # "both" | "text" | "token_ids"
    flush_tokens: int
    flush_ms: int
    priority: int  # higher runs first
    # what the answer is held to; at most one of them
    json_schema: str | Mapping[str, Any]
    regex: str
    ebnf: str
    choice: Sequence[str]
    # the chat template, when the prompt is messages
    tools: Sequence[Any]
    template_kwargs: Mapping[str, Any]
    add_generation_prompt: bool


REQUEST_FIELDS = ("request_id", "model", "flush_tokens", "flush_ms", "priority")
CONSTRAINTS = ("json_schema", "regex", "ebnf", "choice")
CHAT_FIELDS = ("tools", "template_kwargs", "add_generation_prompt")


def generate_request(prompt: Prompt, **options: Unpack[Options]) -> pb.GenerateRequest:
    """`prompt`: a text, chat messages (mappings), or token ids. Raises TypeError or ValueError for bad arguments."""
    values: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    request = checked(pb.GenerateRequest, {name: values.pop(name) for name in REQUEST_FIELDS if name in values})
    if (output := values.pop("output", "both")) not in OUTPUTS:
        raise ValueError(f"output is {output!r}; expected one of {', '.join(OUTPUTS)}")
    request.output = OUTPUTS[output]
    set_constraint(request, {name: values.pop(name) for name in CONSTRAINTS if name in values})
    chat_values = {name: values.pop(name) for name in CHAT_FIELDS if name in values}
    if isinstance(prompt, str):
        request.text = prompt
    elif prompt and isinstance(prompt[0], Mapping):
        request.chat.CopyFrom(chat_message(prompt, **chat_values))  # type: ignore[arg-type]
        chat_values = {}
    else:
        request.token_ids.ids.extend(int(token) for token in prompt)  # type: ignore[arg-type]
        request.token_ids.SetInParent()
    if chat_values:
        raise TypeError(f"{', '.join(chat_values)}: only for a prompt of chat messages")
    if isinstance(values.get("stop"), str):
        values["stop"] = [values["stop"]]
    unknown = values.keys() - pb.SamplingParams.DESCRIPTOR.fields_by_name.keys()
    if unknown:
        raise TypeError(f"unknown option: {', '.join(sorted(unknown))}; there are {', '.join(Options.__annotations__)}")
    request.sampling.CopyFrom(checked(pb.SamplingParams, values))
    return request


def checked(kind: Any, values: Mapping[str, Any]) -> Any:
    """A message of them. protobuf's TypeError and ValueError ("Value out of range: -5") get the field's name."""
    try:
        return kind(**values)
    except (TypeError, ValueError):
        for name, value in values.items():
            try:
                kind(**{name: value})
            except (TypeError, ValueError) as error:
                raise type(error)(f"{name}={value!r:.80}: {error}") from None
        raise


def set_constraint(request: pb.GenerateRequest, given: Mapping[str, Any]) -> None:
    """A schema may be a mapping. Raises TypeError for several constraints."""
    if len(given) > 1:
        raise TypeError(f"{', '.join(given)}: give at most one")
    for name, value in given.items():
        if name == "choice":
            request.choice.options.extend(value)
            request.choice.SetInParent()
        else:
            setattr(request, name, json.dumps(value) if isinstance(value, Mapping) else value)


def score_request(
    inputs: Sequence[str | Sequence[int]], context: int | Sequence[int] = 1, top_logprobs: int = 0
) -> pb.ScoreRequest:
    """`context`: for all inputs, or one for each. Raises TypeError for one text: its letters would be the inputs."""
    if isinstance(inputs, str):
        raise TypeError(f"inputs: found one text; give a list of them: [{inputs!r:.80}]")
    each = [context] * len(inputs) if isinstance(context, int) else list(context)
    if len(each) != len(inputs):
        raise ValueError(f"{len(each)} contexts for {len(inputs)} inputs; give one, or one for each")
    request = pb.ScoreRequest(top_logprobs=top_logprobs)
    for value, count in zip(inputs, each):
        if isinstance(value, str):
            request.inputs.add(text=value, context=count)
        else:
            request.inputs.add(token_ids=pb.TokenIds(ids=value), context=count)
    return request


def chat_message(
    messages: Messages,
    *,
    tools: Sequence[Any] | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
    add_generation_prompt: bool | None = None,
) -> pb.Chat:
    """Messages of role and text as they are; anything richer (tool calls, parts) as JSON."""
    plain = all(set(m) == {"role", "content"} and isinstance(m["content"], str) for m in messages)
    chat = pb.Chat(
        messages=[pb.ChatMessage(role=m["role"], content=m["content"]) for m in messages] if plain else (),
        messages_json="" if plain else json.dumps([dict(m) for m in messages]),
        tools_json=json.dumps(list(tools)) if tools else "",
        template_kwargs_json=json.dumps(dict(template_kwargs)) if template_kwargs else "",
    )
    if add_generation_prompt is not None:  # the field has presence: unset means the server's default
        chat.add_generation_prompt = add_generation_prompt
    return chat


def tokenize_request(prompt: str | Messages, add_special_tokens: bool = True) -> pb.TokenizeRequest:
    if isinstance(prompt, str):
        return pb.TokenizeRequest(text=prompt, add_special_tokens=add_special_tokens)
    return pb.TokenizeRequest(chat=chat_message(prompt))
