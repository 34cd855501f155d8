"""What an answer is held to, from a request's text to llguidance's matcher. No jax, no threads.

Only call `build` for a grammar that `grammar_trial` has survived: nothing bounds its time, its memory or its stack.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jqserve.errors import RequestError, UnsupportedError

KINDS = ("json_schema", "regex", "lark", "choice")
MAX_SOURCE = 256 * 1024  # characters
MAX_CHOICES = 1024
#: between the tokens of JSON: nothing, a space, or a line break with its indentation, so that no answer is all blanks
WHITESPACE = r" |\n {0,24}"
#: the first rule of a grammar in GBNF, which Lark's notation cannot hold
GBNF = re.compile(r"^[ \t]*[\w-]+[ \t]*::=", re.MULTILINE)
#: what means something in llguidance's regexes; before others a backslash is an error ("→") or means something ("<")
SPECIAL = re.compile(r"[\\.+*?()|\[\]{}^$#&~/-]")
UNSENDABLE = re.compile("[\ud800-\udfff]")
#: llguidance's own limits bound a mask at ~14 ms; these at about a third of it, for one row holds up its whole batch
LIMITS: dict[str, Any] = {
    "initial_lexer_fuel": 200_000,
    "step_lexer_fuel": 80_000,
    "step_max_items": 20_000,
    "max_lexer_states": 100_000,
    "max_grammar_size": 200_000,
}
#: Regexes of tokens that a mask takes as a whole where all they match may come; others are walked one by one. With
#: llguidance's own (10, 30 and any number of characters) a string close to its maxLength took 1.1 ms a mask in the
#: worst hundredth, with these 0.7 (131,072 tokens; the mean fell from 59 to 37 us: bench/mask_time); a step
#: waits for its slowest row.
IN_STRING = r'[^"\\\x00-\x1F\x7F]'
SLICES = [*(f"{IN_STRING}{{1,{most}}}" for most in (1, 2, 3, 4, 6, 8, 10, 15, 20, 30)), IN_STRING + "+"]


def load_tokenizer(file: Path, vocab_size: int, eos_token_ids: Sequence[int]) -> Any:
    """llguidance's own, from tokenizer.json. `vocab_size`: of logits. Raises `UnsupportedError`."""
    import llguidance

    try:
        text = file.read_text(encoding="utf-8")
        return llguidance.LLTokenizer(text, n_vocab=vocab_size, eos_token=list(eos_token_ids) or None, slices=SLICES)
    except (OSError, ValueError, RuntimeError) as error:
        raise UnsupportedError(f"grammars cannot be used with {file.name}: {shorten(str(error))}") from error


def build(tokenizer: Any, constraint: tuple[str, str]) -> Any:
    """The matcher of an answer that has not begun. Raises `RequestError` for what is not a grammar, or too large."""
    import llguidance

    limits = llguidance.LLParserLimits(**LIMITS, verbose_errors=False)
    matcher = llguidance.LLMatcher(tokenizer, source(constraint), log_level=0, limits=limits)
    if not matcher.is_error():
        matcher.compute_bitmask()  # builds the lexer, which is most of the work, here and not in the loop
    if matcher.is_error():
        said = shorten(matcher.get_error())
        if "NoExtensionBias" in said:  # all that llguidance says of it
            said = "no answer to it ever ends, or there is none (does it refer to itself without another way out?)"
        raise RequestError(
            "constraint", f"{'the grammar' if constraint[0] == 'lark' else constraint[0]} cannot be used: {said}"
        )
    return matcher


def source(constraint: tuple[str, str]) -> str:
    """llguidance's form of a constraint. Raises `RequestError`."""
    from llguidance import LLMatcher

    kind, text = constraint
    if kind not in KINDS:
        raise RequestError("constraint", f"{kind!r} is none of {', '.join(KINDS)}")
    if len(text) > MAX_SOURCE:
        raise RequestError("constraint", f"{kind} has {len(text)} characters; at most {MAX_SOURCE} are taken")
    if UNSENDABLE.search(text):
        raise RequestError("constraint", f"{kind} holds half of a surrogate pair, which UTF-8 cannot carry")
    if kind == "lark":
        return str(LLMatcher.grammar_from_lark(lark(text)))
    if kind == "regex":
        return str(LLMatcher.grammar_from_regex(text))
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError("constraint", f"{kind} is not JSON: {shorten(str(error))}") from None
    if kind == "choice":
        return str(LLMatcher.grammar_from_regex(choice_regex(value)))
    if not isinstance(value, dict | bool):
        raise RequestError("constraint", f"a JSON schema is an object, found a {type(value).__name__}")
    if value is False:
        raise RequestError("constraint", "json_schema is false, which no JSON satisfies")
    value = {} if value is True else value  # all JSON; llguidance wants an object to put options into
    options: Any = {"whitespace_pattern": WHITESPACE, "lenient": False}
    try:
        return str(LLMatcher.grammar_from_json_schema(json.dumps(value), overrides=options))
    except (ValueError, RecursionError) as error:
        raise RequestError("constraint", f"json_schema cannot be used: {shorten(str(error))}") from None


def lark(text: str) -> str:
    """A grammar in Lark's notation, also of one in GBNF (`root ::= ...`), which `ebnf` is to SGLang and `grammar` to
    vLLM. Raises `RequestError`."""
    if not GBNF.search(text):
        return text
    from llguidance.gbnf_to_lark import gbnf_to_lark

    try:
        return str(gbnf_to_lark(text))
    except Exception as error:  # of a rule that is missing it raises this very class, of a cut escape an IndexError
        said = "it is cut in the middle of an escape" if isinstance(error, IndexError) else shorten(str(error))
        raise RequestError("constraint", f"the grammar cannot be used: {said} (GBNF, for it has ::=)") from None


def choice_regex(options: Any) -> str:
    """One of the texts. Raises `RequestError`."""
    if not isinstance(options, list) or not options or not all(isinstance(o, str) and o for o in options):
        raise RequestError("constraint", "choice is a list of texts, none of them empty")
    if len(options) > MAX_CHOICES:
        raise RequestError("constraint", f"choice has {len(options)} texts; at most {MAX_CHOICES} are taken")
    if any(UNSENDABLE.search(option) for option in options):
        raise RequestError("constraint", "choice holds half of a surrogate pair, which UTF-8 cannot carry")
    return "|".join(SPECIAL.sub(r"\\\g<0>", option) for option in options)


def shorten(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 300 else line[:297] + "..."
