"""Whether the parts of a large message can be meant, judged without making Python objects of them.

A message of 16 MiB may hold three million stop strings: as a tuple they are ten times as large, and the loop that makes
it keeps every stream waiting. What passes here is bounded by the context length and the constants below; the finer
limits (and their words) are those of `requests`, `frontend` and the engine.
"""

from __future__ import annotations

from google.protobuf.message import Message

from jqserve.errors import RequestError

LEAST_IDS = 2**16  # token ids that may always be sent
MAX_ENTRIES = 4096  # of any other list
MAX_NAME = 4096  # characters of an id, a name or a stop string
MAX_GRAMMAR = 2**18  # characters; the engine takes no more either

IDS = {"ids", "input_ids", "token_ids"}
NAMES = ("request_id", "request_ids", "model", "role", "stop")
GRAMMARS = ("json_schema", "regex", "ebnf", "grammar", "ebnf_grammar", "structural_tag", "options", "choices")
LENGTHS = dict.fromkeys(NAMES, MAX_NAME) | dict.fromkeys(GRAMMARS, MAX_GRAMMAR)


def check_sizes(message: Message, context_length: int, text_bytes: int) -> None:
    """`text_bytes`: of a prompt's text. Raises `RequestError` for the first part that is too large to be meant."""
    _check(message, max(LEAST_IDS, context_length), text_bytes, "")
    before = message.ByteSize()
    message.DiscardUnknownFields()  # type: ignore[no-untyped-call]
    if message.ByteSize() != before:
        raise RequestError("request", "has fields that this server's protocol does not know")


def _check(message: Message, ids: int, text_bytes: int, path: str) -> None:
    for field, value in message.ListFields():
        name, kind = path + field.name, field.cpp_type
        if field.is_repeated:
            most = ids if field.name in IDS else MAX_ENTRIES
            if len(value) > most:
                raise RequestError(name, f"has {len(value)} entries; at most {most} are taken")
            if field.message_type is not None and field.message_type.GetOptions().map_entry:
                continue  # of numbers
        for one in value if field.is_repeated and kind in (field.CPPTYPE_MESSAGE, field.CPPTYPE_STRING) else (value,):
            if kind == field.CPPTYPE_MESSAGE:
                _check(one, ids, text_bytes, f"{name}.")
            elif kind == field.CPPTYPE_STRING:
                most = LENGTHS.get(field.name, text_bytes)
                if len(one) > most:
                    raise RequestError(name, f"has {len(one)} characters; at most {most} are taken")
