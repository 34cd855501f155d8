"""Grammars in the two notations that `ebnf` may have."""

from __future__ import annotations

from pathlib import Path

import llguidance
import pytest

from jqserve.engine.constraint import build, lark, load_tokenizer
from jqserve.errors import RequestError

#: GBNF -> (answers that fit, answers that do not)
GBNF: dict[str, tuple[list[str], list[str]]] = {
    'root ::= "yes" ws "no"\nws ::= [ \\t\\n]*': (["yesno", "yes \nno"], ["yes x"]),
    "root  ::= item{2,3} # twice\nitem ::= [a-c] \"-\"": (["a-b-", "a-b-c-"], ["a-", "a-b-c-a-"]),
    'root ::= my-rule | "(" root ")"\nmy-rule ::= "x" [^\\n)]?': (["x", "((xy))"], ["(x", "x\n"]),
    '\n  root::="SELECT " col\n  col ::= "é" | "col_2"': (["SELECT é"], ["SELECT col_1"]),
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(demo_dir: Path) -> llguidance.LLTokenizer:
    return load_tokenizer(demo_dir / "tokenizer.json", 4096, [2])


@pytest.mark.parametrize("grammar", GBNF)
def test_gbnf_means_what_it_means_elsewhere(tokenizer: llguidance.LLTokenizer, grammar: str) -> None:
    fit, others = GBNF[grammar]
    for answer in fit + others:
        matcher = build(tokenizer, ("lark", grammar))
        taken = all(matcher.consume_token(token) for token in tokenizer.tokenize_str(answer))
        assert (taken and matcher.is_accepting()) == (answer in fit), answer


@pytest.mark.parametrize(
    ("grammar", "says"),
    [
        ('expr ::= "a"', "No 'root' rule found"),
        ("root ::= nobody", "Rule 'nobody' not found"),
        ("root ::= 'a'", "Expected name at line 1"),
        ('root ::= "a\\', "cut in the middle of an escape"),
        ("root ::= " + "(" * 5000, "the grammar cannot be used"),
    ],
)
def test_what_is_no_gbnf(tokenizer: llguidance.LLTokenizer, grammar: str, says: str) -> None:
    with pytest.raises(RequestError, match=says):
        build(tokenizer, ("lark", grammar))


def test_larks_notation_is_left_as_it_is() -> None:
    source = 'start: A\nA: "x ::= y"  // a ::= b\n'
    assert lark(source) == source
