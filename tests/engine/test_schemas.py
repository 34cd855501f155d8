"""200 schemas: whatever is drawn from the masks, with the demo model's tokenizer, is JSON that fits its schema."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from tokenizers import Tokenizer

from jqserve.engine.grammar import Grammars
from jqserve.errors import RequestError
from tests.data.schemas import cases

EOS, VOCAB = 2, 4096
WANDER = 60  # tokens that are drawn freely; after that whatever brings the answer to its end
LIMIT = 400
CASES = cases()


@pytest.fixture(scope="module")
def grammars(demo_dir: Path) -> Grammars:
    return Grammars(str(demo_dir), VOCAB, (EOS,))


@pytest.fixture(scope="module")
def tokenizer(demo_dir: Path) -> Tokenizer:
    return Tokenizer.from_file(str(demo_dir / "tokenizer.json"))


def answer(grammars: Grammars, schema: dict[str, Any] | bool, rng: random.Random, closing: list[int]) -> list[int]:
    """Random tokens of those allowed, without the EOS at the end."""
    matcher = grammars.compile(("json_schema", json.dumps(schema))).result()
    mask = np.empty((1, VOCAB // 32), np.int32)
    tokens: list[int] = []
    while len(tokens) < LIMIT:
        mask[:] = -1
        grammars.fill(mask, [(0, matcher)])
        assert not matcher.state.is_error(), matcher.state.get_error()
        allowed = np.nonzero(np.unpackbits(mask[0].view(np.uint8), bitorder="little"))[0].tolist()
        ends = [token for token in closing if token in allowed] if len(tokens) >= WANDER else []
        token = ends[0] if ends else rng.choice(allowed)
        if token == EOS:
            return tokens
        tokens.append(token)
        grammars.take([(matcher, token)])
        assert not matcher.failed, matcher.failed
        if matcher.complete:
            return tokens
    raise AssertionError(f"no end after {LIMIT} tokens: {tokens}")


def test_there_are_200() -> None:
    assert len(CASES) == 200 and len({name for name, _ in CASES}) == 200


@pytest.mark.parametrize("part", range(4))
def test_answers_are_valid(grammars: Grammars, tokenizer: Tokenizer, part: int) -> None:
    closing = [EOS, *(tokenizer.token_to_id(text) for text in ('"', "}", "]", ",", ":", "0", "1", "e"))]
    closing = [token for token in closing if token is not None]
    checker = jsonschema.FormatChecker(("uuid", "ipv4"))  # its dates have no year 0, its times no time zones
    for number, (name, schema) in list(enumerate(CASES))[part::4]:
        tokens = answer(grammars, schema, random.Random(number), closing)
        text = tokenizer.decode(tokens, skip_special_tokens=False)
        try:
            value = json.loads(text)
        except ValueError as error:
            raise AssertionError(f"{name}: {text!r} is not JSON") from error
        jsonschema.Draft202012Validator(schema, format_checker=checker).validate(value)


TEXTS = [
    "<a>", "x > 1", "\u2192", "\U0001f600", "5 \u20ac", "\u0939\u093f\u0928\u094d\u0926\u0940", "a\u0301", "\u3001",
    "a/b", "\\n", "\n", " ", "a", "ab", "\x00", "*", "no-op", "(?i)a", "[^a]", "#", "&&", "~~", "--",
    *(chr(code) for code in range(33, 127)),
]  # fmt: skip


def test_a_choice_is_one_of_any_texts(grammars: Grammars, tokenizer: Tokenizer) -> None:
    """All of them together, and each alone, where nothing else may come."""
    whole = ("choice", json.dumps(TEXTS))
    for text in TEXTS:
        tokens = tokenizer.encode(text, add_special_tokens=False).ids
        for constraint in (whole, ("choice", json.dumps([text]))):
            state = grammars.compile(constraint).result().state
            assert state.validate_tokens(tokens) == len(tokens), text
        for token in tokens:
            state.consume_token(token)
        assert state.is_accepting(), text


def test_half_a_surrogate_pair_is_no_text(grammars: Grammars) -> None:
    for constraint in (("choice", '["\\ud800"]'), ("json_schema", '{"const": "\\ud800"}'), ("regex", "\ud800")):
        with pytest.raises(RequestError, match=constraint[0]):
            grammars.compile(constraint).result()


def test_true_is_any_json(grammars: Grammars, tokenizer: Tokenizer) -> None:
    tokens = answer(grammars, True, random.Random(3), [EOS, tokenizer.token_to_id("}"), tokenizer.token_to_id('"')])
    json.loads(tokenizer.decode(tokens, skip_special_tokens=False))


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ("false", "nothing|no JSON satisfies"),
        ("[1]", "is an object, found a list"),
        ('{"$ref": "#"}', "does it refer to itself"),
        ('{"enum": []}', "Unsatisfiable"),
        ('{"type": "string", "pattern": "("}', "unclosed group"),
    ],
)
def test_what_cannot_be_used_is_told(grammars: Grammars, schema: str, said: str) -> None:
    with pytest.raises(RequestError, match=said):
        grammars.compile(("json_schema", schema)).result()
