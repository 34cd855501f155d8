"""Chat templates: the same prompt as transformers renders, in a sandbox, with errors that name the field."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jqserve.errors import CheckpointError, RequestError, UnsupportedError
from jqserve.server.chat import ChatTemplate
from jqserve.server.tokenizer import Tokenizer, has_tokenizer, load_tokenizer

USER = [{"role": "user", "content": "héllo"}]
RICH = """{{- bos_token }}
{%- set ns = namespace(n=0) %}
{%- for m in messages %}
    {%- if m.role == 'system' %}{% continue %}{% endif %}
    {%- set ns.n = ns.n + 1 %}
    {%- generation %}
    {{- '[' ~ ns.n ~ m.role ~ ']' ~ m.content | trim }}
    {%- endgeneration %}
    {%- if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}
{%- endfor %}
{%- if tools %}{{ tools | tojson(indent=2) }}{% endif %}
{%- if add_generation_prompt %}<go>{% if enable_thinking is defined and not enable_thinking %}<no>{% endif %}{% endif %}
"""


@pytest.fixture(scope="module")
def tokenizer(demo_dir: Path) -> Tokenizer:
    return load_tokenizer(str(demo_dir))


@pytest.fixture(scope="module")
def transformers_tokenizer(demo_dir: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(demo_dir))


CONVERSATIONS = [
    USER,
    [{"role": "system", "content": "be <b>brief</b>"}, *USER, {"role": "assistant", "content": "ok\n"}, *USER],
    [{"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {"a": "ü<&"}}]}, *USER],
]


@pytest.mark.parametrize("messages", CONVERSATIONS)
@pytest.mark.parametrize("source", [None, RICH], ids=["own", "rich"])
@pytest.mark.parametrize("tools", [None, [{"type": "function", "function": {"name": "f"}}]])
def test_as_transformers_renders(
    tokenizer: Tokenizer, transformers_tokenizer: Any, messages: list[Any], source: str | None, tools: Any
) -> None:
    template = ChatTemplate(source, {"bos_token": "<|bos|>"}) if source else tokenizer.need_chat()
    for variables in ({}, {"enable_thinking": False}):
        want = transformers_tokenizer.apply_chat_template(
            messages, tools=tools, chat_template=source, add_generation_prompt=True, tokenize=False, **variables
        )
        assert template.render(messages, tools=tools, variables=variables) == want


def test_text_parts_are_joined_and_other_parts_refused() -> None:
    template = ChatTemplate("{{ messages[0].content }}", {})
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert template.render([{"role": "user", "content": parts}]) == "ab"
    with pytest.raises(RequestError, match=r"chat.messages\[0\].content: has a part of type 'image_url'"):
        template.render([{"role": "user", "content": [{"type": "image_url"}]}])


@pytest.mark.parametrize(
    ("source", "messages", "variables"),
    [
        ("{{ raise_exception('roles must alternate') }}", USER, {}),
        ("{{ messages.__class__.__mro__ }}", USER, {}),  # the sandbox
        ("{{ messages.append(1) }}", USER, {}),  # immutable
        ("{{ messages[0].content + 1 }}", USER, {}),
        ("x", [], {}),
        ("x", [{"role": "", "content": "x"}], {}),
        ("x", ["text"], {}),
        ("x", [{"role": "user", "content": 5}], {}),
        ("x", USER, {"messages": []}),
    ],
)
def test_what_cannot_be_rendered_is_a_request_error(
    source: str, messages: list[Any], variables: dict[str, Any]
) -> None:
    with pytest.raises(RequestError) as caught:
        ChatTemplate(source, {}).render(messages, variables=variables)
    assert caught.value.field.startswith("chat")


def test_special_tokens_cannot_be_replaced_by_a_request() -> None:
    template = ChatTemplate("{{ pad_token }}", {"pad_token": "<pad>"})
    assert template.render(USER, variables={"pad_token": "x"}) == "<pad>"


def test_a_broken_template_fails_at_the_start(demo_dir: Path) -> None:
    with pytest.raises(CheckpointError, match="not valid Jinja"):
        load_tokenizer(str(demo_dir), chat_template="{% for %}")
    with pytest.raises(UnsupportedError, match="neither a readable file"):
        load_tokenizer(str(demo_dir), chat_template="no/such/file.jinja")


def test_named_templates() -> None:
    template = ChatTemplate({"default": "plain", "tool_use": "tools"}, {})
    assert template.render(USER) == "plain" and template.render(USER, tools=[{}]) == "tools"


def test_a_template_of_the_operator(demo_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "own.jinja"
    path.write_text("<{{ messages[0].content }}>")
    for source in (str(path), path.read_text()):
        assert load_tokenizer(str(demo_dir), chat_template=source).need_chat().render(USER) == "<héllo>"


def test_no_tokenizer_is_a_clear_error(tmp_path: Path, demo_dir: Path) -> None:
    assert not has_tokenizer(str(tmp_path)) and has_tokenizer(str(demo_dir))
    with pytest.raises(CheckpointError, match=r"it holds none of tokenizer.json, .*\n.*--tokenizer-path"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(CheckpointError, match="no tokenizer could be loaded from nobody/nothing"):
        load_tokenizer("nobody/nothing")
    with pytest.raises(CheckpointError, match="from /nobody/nothing: there is no such directory"):
        load_tokenizer("/nobody/nothing")
    with pytest.raises(CheckpointError, match=f"it is a file; expected the directory that holds it, {demo_dir}"):
        load_tokenizer(str(demo_dir / "tokenizer.json"))


def test_a_hub_id_is_asked_for_once(demo_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' loader, given the id, repeated each file's request for 24 seconds where there was no network."""
    import huggingface_hub

    asked = []

    def snapshot(repo: str, **how: Any) -> str:
        asked.append((repo, how["revision"], "*.safetensors" in how["allow_patterns"]))
        return str(demo_dir)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    loaded = load_tokenizer("org/model", "v2")
    assert asked == [("org/model", "v2", False)] and loaded.folder == str(demo_dir)


def test_round_trip(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("What is 2? 😀")
    assert ids[0] == 1 and tokenizer.encode("What is 2? 😀", add_special_tokens=False) == ids[1:]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "What is 2? 😀"
    assert tokenizer.decode([*ids, 10**6]) == "<|bos|>What is 2? 😀"
