"""A compatible Generate in plain types, and how to say no to what it may not ask."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet

from jqserve.engine.request import SamplingParams
from jqserve.errors import RequestError, UnsupportedError
from jqserve.server.pace import Pace


@dataclasses.dataclass(frozen=True)
class Call:
    """One Generate: `stream` asks for chunks, else only what is complete is sent. `pace` None: the server's."""

    request_id: str
    prompt: list[int]
    sampling: SamplingParams
    n: int
    stream: bool
    pace: Pace | None = None


def refuse_undeclared(message: Message, names: Mapping[int, str]) -> None:
    """`names`: what the protocol has beyond our declaration, by field number. Nothing sent is ignored in silence."""
    for field in UnknownFieldSet(message):  # type: ignore[attr-defined]  # the stub lacks __iter__
        number = field.field_number
        name = names.get(number, f"field {number} of {message.DESCRIPTOR.name}")
        raise UnsupportedError(f"{name} is not supported by jqserve")


def refuse_rank(request: Any, field: str = "data_parallel_rank") -> None:
    """There is one data-parallel rank."""
    if request.HasField(field) and (rank := getattr(request, field)) not in (0, -1):
        raise RequestError(field, f"is {rank}; this worker has rank 0 only")


def unless_zero(message: Message, names: Mapping[str, str]) -> dict[str, Any]:
    """Fields without presence, under our names (the values of `names`), where 0 means that the sender set nothing."""
    return {ours: value for theirs, ours in names.items() if (value := getattr(message, theirs))}


def text_constraint(message: Any, kinds: Mapping[str, str]) -> tuple[str, str] | None:
    """The constraint as (our kind, source). `kinds`: their field -> our kind."""
    field = message.WhichOneof("constraint")
    if field is None:
        return None
    if field == "json_object":
        return ("json_schema", '{"type": "object"}') if message.json_object else None
    if field == "choice":
        return "choice", json.dumps(list(message.choice.choices))
    if field not in kinds:
        fields = (one.name for one in message.DESCRIPTOR.oneofs_by_name["constraint"].fields)
        known = (name for name in fields if name in kinds or name in ("json_object", "choice"))
        raise UnsupportedError(f"{field}: not supported by jqserve; supported: {', '.join(known)}")
    return kinds[field], getattr(message, field)


def top_count(field: str, value: int) -> int:
    """A number of top logprobs; -1 (the whole vocabulary) is not served."""
    if value < 0:
        raise RequestError(field, f"is {value}; expected 0 to 20")
    return value


def default_sampling(defaults: SamplingParams) -> str:
    """JSON that gateways apply where a request says nothing, under vLLM's names; "" when there is nothing."""
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    usual = SamplingParams()
    found = {name: getattr(defaults, name) for name in names if getattr(defaults, name) != getattr(usual, name)}
    if defaults.max_new_tokens is not None:
        found["max_tokens"] = defaults.max_new_tokens
    return json.dumps(found) if found else ""
