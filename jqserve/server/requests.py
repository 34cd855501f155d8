"""Native protobuf requests to the front end's plain types, refusing what would otherwise be ignored in silence."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from typing import Any, cast

from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet

from jqserve.engine.request import SamplingParams
from jqserve.errors import RequestError
from jqserve.server.chat import ChatTemplate
from jqserve.server.pb import jqserve_pb2 as pb

#: fields that are present or absent, and have the same name in both types
SCALARS = (
    "max_new_tokens",
    "min_new_tokens",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "logprobs",
    "ignore_eos",
    "skip_special_tokens",
)


#: the proto's constraints -> SamplingParams.constraint's kinds
KINDS = {"json_schema": "json_schema", "regex": "regex", "ebnf": "lark"}


def refuse_unknown_fields(message: Message, name: str) -> None:
    """A newer client's field is refused, not dropped: its sender believes that it has an effect."""
    for field in cast(Iterable[Any], UnknownFieldSet(message)):  # the stub lacks __iter__
        raise RequestError(
            f"{name}[{field.field_number}]", f"this server's protocol has no field {field.field_number} in {name}"
        )


def check(request: pb.GenerateRequest) -> None:
    """What this version does not know or does not do. Raises `RequestError`."""
    refuse_unknown_fields(request, "GenerateRequest")
    refuse_unknown_fields(request.sampling, "SamplingParams")
    if request.HasField("token_ids"):
        refuse_unknown_fields(request.token_ids, "TokenIds")
    if request.HasField("choice"):
        refuse_unknown_fields(request.choice, "Choice")
    if request.output not in pb.Output.values():
        raise RequestError("output", f"{request.output} is not an Output")


def sampling_params(message: pb.SamplingParams, defaults: SamplingParams) -> SamplingParams:
    """`defaults` (the model's) where a field is absent. Ranges are the engine's to judge."""
    fields: dict[str, Any] = {name: getattr(message, name) for name in SCALARS if message.HasField(name)}
    if fields.get("top_k") == -1:
        fields["top_k"] = 0
    if message.logit_bias:
        fields["logit_bias"] = tuple(sorted(message.logit_bias.items()))
    if message.stop:
        fields["stop"] = tuple(message.stop)
    if message.stop_token_ids:
        fields["stop_token_ids"] = tuple(message.stop_token_ids)
    return dataclasses.replace(defaults, **fields)


def constraint(request: pb.GenerateRequest) -> tuple[str, str] | None:
    """As `SamplingParams.constraint`."""
    kind = request.WhichOneof("constraint")
    if kind is None:
        return None
    if kind == "choice":
        return "choice", json.dumps(list(request.choice.options))
    return KINDS[kind], getattr(request, kind)


def sampling_message(sampling: SamplingParams) -> pb.SamplingParams:
    """The inverse of `sampling_params`, for GetServerInfo."""
    message = pb.SamplingParams(stop=sampling.stop, stop_token_ids=sampling.stop_token_ids)
    for name in SCALARS:
        if (value := getattr(sampling, name)) is not None:
            setattr(message, name, value)
    message.logit_bias.update(dict(sampling.logit_bias))
    return message


def render_chat(template: ChatTemplate, chat: pb.Chat) -> str:
    """The prompt of a chat. Raises `RequestError`."""
    refuse_unknown_fields(chat, "Chat")
    for message in chat.messages:
        refuse_unknown_fields(message, "ChatMessage")
    if bool(chat.messages) == bool(chat.messages_json):
        raise RequestError("chat.messages", "give either messages or messages_json")
    messages: list[Any] = [{"role": message.role, "content": message.content} for message in chat.messages]
    if chat.messages_json:
        messages = parse_json("chat.messages_json", chat.messages_json, list)
    return template.render(
        messages,
        tools=parse_json("chat.tools_json", chat.tools_json, list) if chat.tools_json else None,
        add_generation_prompt=chat.add_generation_prompt if chat.HasField("add_generation_prompt") else True,
        variables=template_variables(chat.template_kwargs_json),
    )


def template_variables(source: str) -> Mapping[str, Any] | None:
    return parse_json("chat.template_kwargs_json", source, dict) if source else None


def parse_json(field: str, text: str, kind: type) -> Any:
    """Raises `RequestError` unless `text` is JSON and a `kind`."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(field, f"is not JSON: {error}") from error
    if not isinstance(value, kind):
        raise RequestError(field, f"is a {type(value).__name__}; expected a JSON {kind.__name__}")
    return value
