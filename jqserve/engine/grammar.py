"""What an answer may be, token by token: JSON schema, regex, Lark, choice, through llguidance. No jax.

A grammar is compiled on a thread, once a trial has survived it, and limited in size and in work a step, for it comes
from a request. The masks of a step are computed in parallel, without the interpreter's lock, while the device computes
the step's logits.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import importlib.util
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jqserve.engine.constraint import build, load_tokenizer, shorten
from jqserve.engine.grammar_trial import MEGABYTES, SECONDS, Trial
from jqserve.errors import RequestError

CACHED = 64  # compiled grammars; the same schema comes again and again
THREADS = 2  # that compile, each with a process for trials: the loop's core is not theirs
STACK = 64 * 2**20  # bytes of these threads' stacks: what fits into the trial's fits here
TOO_MUCH = f"to compile it takes more than {SECONDS} s, {MEGABYTES} MB or a deep stack; make it smaller"


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
        #: a matcher, or why there is none: one that takes seconds to refuse may well come again
        self._compiled: collections.OrderedDict[tuple[str, str], Any] = collections.OrderedDict()
        self._mine = threading.local()
        self._threads = concurrent.futures.ThreadPoolExecutor(THREADS, "grammar")
        self._executor: Any = None

    def compile(self, constraint: tuple[str, str]) -> concurrent.futures.Future[Matcher]:
        """The future raises `RequestError` for what is not a grammar, or too large a one."""
        before = threading.stack_size(STACK)  # of the thread that `submit` may start
        try:
            return self._threads.submit(self._compile, constraint)
        finally:
            threading.stack_size(before)

    def _compile(self, constraint: tuple[str, str]) -> Matcher:
        trial = self._trial()  # which starts while the tokenizer is loaded here
        with self._lock:
            if self._tokenizer is None:
                self._tokenizer = load_tokenizer(self._file, self.vocab_size, self._eos)
            known = self._compiled.get(constraint)
            if known is not None:
                self._compiled.move_to_end(constraint)
        if known is None:
            known = build(self._tokenizer, constraint) if trial.survives(constraint) else TOO_MUCH
            with self._lock:
                self._compiled[constraint] = known
                while len(self._compiled) > CACHED:
                    self._compiled.popitem(last=False)
        if isinstance(known, str):
            raise RequestError("constraint", f"{constraint[0]} cannot be used: {known}")
        with self._lock:
            return Matcher(known.deep_copy())

    def _trial(self) -> Trial:
        """This thread's."""
        if not hasattr(self._mine, "trial"):
            self._mine.trial = Trial(self._file, self.vocab_size, self._eos)
        trial: Trial = self._mine.trial
        return trial

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
