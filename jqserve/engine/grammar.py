"""What an answer may be, token by token: JSON schema, regex, Lark, choice, through llguidance. No jax.

A grammar is compiled on a thread and limited in size and in work a step, for it comes from a request. The masks of a
step are computed in parallel, without the interpreter's lock, while the device computes the step's logits.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import importlib.util
import json
import os
import re
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jqserve.errors import RequestError, UnsupportedError

KINDS = ("json_schema", "regex", "lark", "choice")
MAX_SOURCE = 256 * 1024  # characters
MAX_CHOICES = 1024
CACHED = 64  # compiled grammars; the same schema comes again and again
THREADS = 2  # that compile: the loop's core is not theirs
#: between the tokens of JSON: nothing, a space, or a line break with its indentation, so that no answer is all blanks
WHITESPACE = r" |\n {0,24}"
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


def why_not(directory: str) -> str:
    """Why answers cannot be constrained with the tokenizer in `directory`; "" when they can."""
    if importlib.util.find_spec("llguidance") is None:
        return "llguidance is not installed; pip install llguidance"
    if not (Path(directory) / "tokenizer.json").is_file():
        return "grammars need the tokenizer's tokenizer.json, and there is none"
    return ""


class Grammars:
    """Compiles constraints for one tokenizer; any thread may ask."""

    def __init__(self, directory: str, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        """`directory`: where tokenizer.json is; it is read when the first grammar comes. `vocab_size`: of logits."""
        self.vocab_size = vocab_size
        self._file = Path(directory) / "tokenizer.json"
        self._eos = list(eos_token_ids)
        self._tokenizer: Any = None
        self._lock = threading.Lock()
        self._compiled: collections.OrderedDict[tuple[str, str], Any] = collections.OrderedDict()
        self._threads = concurrent.futures.ThreadPoolExecutor(THREADS, "grammar")
        self._executor: Any = None

    def compile(self, constraint: tuple[str, str]) -> concurrent.futures.Future[Matcher]:
        """The future raises `RequestError` for what is not a grammar, or too large a one."""
        return self._threads.submit(self._compile, constraint)

    def _compile(self, constraint: tuple[str, str]) -> Matcher:
        import llguidance

        with self._lock:
            if self._tokenizer is None:
                self._tokenizer = self._load()
            known = self._compiled.get(constraint)
            if known is not None:
                self._compiled.move_to_end(constraint)
                return Matcher(known.deep_copy())
        limits = llguidance.LLParserLimits(**LIMITS, verbose_errors=False)
        matcher = llguidance.LLMatcher(self._tokenizer, source(constraint), log_level=0, limits=limits)
        if not matcher.is_error():
            matcher.compute_bitmask()  # builds the lexer, which is most of the work, here and not in the loop
        if matcher.is_error():
            said = shorten(matcher.get_error())
            if "NoExtensionBias" in said:  # all that llguidance says of it
                said = "no answer to it ever ends, or there is none (does it refer to itself without another way out?)"
            raise RequestError("constraint", f"{constraint[0]} cannot be used: {said}")
        with self._lock:
            self._compiled[constraint] = matcher
            while len(self._compiled) > CACHED:
                self._compiled.popitem(last=False)
            return Matcher(matcher.deep_copy())

    def _load(self) -> Any:
        import llguidance

        try:
            text = self._file.read_text(encoding="utf-8")
            return llguidance.LLTokenizer(text, n_vocab=self.vocab_size, eos_token=self._eos or None)
        except (OSError, ValueError, RuntimeError) as error:
            raise UnsupportedError(f"grammars cannot be used with {self._file.name}: {shorten(str(error))}") from error

    def fill(self, mask: np.ndarray, rows: Sequence[tuple[int, Matcher]]) -> None:
        """Writes the masks of rows: mask int32 [R, ceil(V/32)], one bit a token, 1 = allowed; others stay as they are.

        The row of a matcher that gives up (too much work) is left all allowed; the next `take` says why.
        """
        if not rows:
            return
        assert mask.dtype == np.int32 and mask.flags.c_contiguous and mask.shape[1] * 32 >= self.vocab_size
        pairs = [(matcher.state, row) for row, matcher in rows]
        self._parallel().unsafe_compute_mask_ptr(pairs, mask.ctypes.data, mask.shape[1] * 4, mask.shape[0])
        for row, matcher in rows:
            if matcher.state.is_error():
                mask[row] = -1

    def take(self, given: Sequence[tuple[Matcher, int]]) -> None:
        """The next token of each of these answers; their `complete` and `failed` tell what came of it."""
        if not given:
            return
        taken = self._parallel().consume_token_par([(matcher.state, token) for matcher, token in given])
        for (matcher, _), good in zip(given, taken):
            if good:
                matcher.complete = bool(matcher.state.is_stopped())
            else:
                matcher.failed = shorten(matcher.state.get_error()) or "the token does not follow"

    def _parallel(self) -> Any:
        if self._executor is None:
            import llguidance

            self._executor = llguidance.LLExecutor(max(1, min(16, (os.cpu_count() or 1) - 1)))
        return self._executor


@dataclasses.dataclass
class Matcher:
    """Where one answer stands in its grammar.

    complete: nothing may follow the last token taken. failed: why it can say nothing any more (the grammar takes too
    much work a token); "" while all is well.
    """

    state: Any  # llguidance.LLMatcher
    complete: bool = False
    failed: str = ""


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
        return str(LLMatcher.grammar_from_lark(text))
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
