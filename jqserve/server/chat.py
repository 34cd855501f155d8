"""Chat messages to a prompt, by the checkpoint's Jinja template in a sandbox.

The environment is the one that templates are written for (as Hugging Face documents it): trimmed blocks, loop controls,
`tojson` without HTML escapes, `raise_exception`, `strftime_now`, and `{% generation %}` blocks passed through.
The template is the checkpoint's or the operator's; a request supplies data only and can neither replace nor extend it.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from jqserve.errors import CheckpointError, RequestError

#: variables of the template that a request's template_kwargs may not set
RESERVED = frozenset({"messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token"})


class Generation(jinja2.ext.Extension):
    """`{% generation %} ... {% endgeneration %}` marks the assistant's text for training; here it is its body."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: jinja2.parser.Parser) -> Any:
        next(parser.stream)
        return list(parser.parse_statements(("name:endgeneration",), drop_needle=True))


def to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def strftime_now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)


class ChatTemplate:
    """A compiled template. Raises `CheckpointError` when the source is not a template."""

    def __init__(self, source: str | Mapping[str, str], special_tokens: Mapping[str, str]) -> None:
        """`source`: the template, or several by name ("default", and "tool_use" for requests with tools)."""
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = to_json
        environment.globals.update(raise_exception=raise_exception, strftime_now=strftime_now)
        sources = {"default": source} if isinstance(source, str) else dict(source)
        if not sources:
            raise CheckpointError("the chat template is empty")
        try:
            self._templates = {name: environment.from_string(text) for name, text in sources.items()}
        except jinja2.TemplateError as error:
            raise CheckpointError(f"the chat template is not valid Jinja: {error}") from error
        self._special_tokens = dict(special_tokens)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Any] | None = None,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt. Raises `RequestError` for messages that the template (or we) cannot take."""
        if bad := RESERVED.intersection(variables or ()):
            raise RequestError("chat.template_kwargs_json", f"{', '.join(sorted(bad))} cannot be set here")
        default = self._templates.get("default") or next(iter(self._templates.values()))
        template = self._templates.get("tool_use", default) if tools else default
        try:
            text: str = template.render(
                messages=check_messages(messages),
                tools=tools or None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
                **{k: v for k, v in (variables or {}).items() if k not in self._special_tokens},
            )
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
            raise RequestError("chat", f"the model's chat template does not accept these messages: {error}") from error
        except (RecursionError, MemoryError) as error:
            raise RequestError("chat", "the messages are nested too deeply or too large") from error
        try:
            text.encode()
        except UnicodeEncodeError as error:  # JSON can say it, and no tokenizer takes it
            half = f"\\u{ord(text[error.start]):04x}"
            raise RequestError("chat", f"holds {half}, half of a surrogate pair, which is no character") from None
        return text


def check_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each message has a role; content in text parts is joined, other parts (images, ...) are refused."""
    if not messages:
        raise RequestError("chat.messages", "is empty; at least one message is needed")
    return [{**message, **_content(i, message)} for i, message in enumerate(messages)]


def _content(i: int, message: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str) or not message["role"]:
        raise RequestError(f"chat.messages[{i}].role", "is missing; expected system, user, assistant, ...")
    content = message.get("content")
    if not isinstance(content, list):
        if content is not None and not isinstance(content, str):
            raise RequestError(f"chat.messages[{i}].content", f"is a {type(content).__name__}; expected text")
        return {}
    texts = []
    for part in content:
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise RequestError(f"chat.messages[{i}].content", f"has a part of type {kind!r}; only text is supported")
        texts.append(part["text"])
    return {"content": "".join(texts)}
