"""Requests that something has to be made for before they can be scheduled: a grammar, the programs of split steps."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

from jqserve.engine.grammar import Grammars
from jqserve.engine.sequence import Sequence
from jqserve.errors import RequestError, UnsupportedError

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, eq=False)
class Waiting:
    """A sequence, and what is being made for it."""

    sequence: Sequence
    programs: concurrent.futures.Future[None]
    grammar: concurrent.futures.Future[Any] | None

    @property
    def done(self) -> bool:
        return self.programs.done() and (self.grammar is None or self.grammar.done())


@dataclasses.dataclass(frozen=True)
class Refused:
    """A sequence that cannot run after all. `field`: the request's field at fault, "" when it is our own fault."""

    sequence: Sequence
    error: str
    field: str = ""


class Preparing:
    """Those sequences, in the order of arrival."""

    def __init__(self, grammars: Grammars | None, prepare_programs: Callable[[], Any]) -> None:
        self.grammars = grammars
        self._prepare_programs = prepare_programs
        self._waiting: list[Waiting] = []
        self._told = False

    def __len__(self) -> int:
        return len(self._waiting)

    def needed(self, sequence: Sequence) -> bool:
        return sequence.sampling.constraint is not None or sequence.wants_scores

    def add(self, sequence: Sequence) -> None:
        """Starts what the sequence needs. Raises `RequestError` when there are no grammars here."""
        constraint, grammar = sequence.sampling.constraint, None
        if constraint is not None:
            if self.grammars is None:
                raise RequestError("constraint", "this engine has no tokenizer to hold answers to a grammar with")
            grammar = self.grammars.compile(constraint)
        programs = self._prepare_programs()
        if not (self._told or programs.done()):
            self._tell(programs)
        self._waiting.append(Waiting(sequence, programs, grammar))

    def _tell(self, programs: concurrent.futures.Future[None]) -> None:
        """Once: why the first of these requests waits, how long it did, and how to have it otherwise."""
        self._told, began = True, time.perf_counter()
        log.warning(
            "the first constrained or scored request is here: it waits while its programs are compiled, others go on; "
            "--constraint-warmup (or constraint_warmup=True) has them compiled before serving"
        )

        def compiled(programs: concurrent.futures.Future[None]) -> None:
            if not programs.cancelled() and programs.exception() is None:  # else `ready` tells, for each request
                log.info("its programs are ready after %.1f s", time.perf_counter() - began)

        programs.add_done_callback(compiled)

    def remove(self, sequence: Sequence) -> bool:
        """False when it is not here."""
        before = len(self._waiting)
        self._waiting = [one for one in self._waiting if one.sequence is not sequence]
        return len(self._waiting) < before

    def ready(self) -> Iterator[Sequence | Refused]:
        """Those that are done with, one way or the other; they are not here any more."""
        if not self._waiting:
            return
        # Asked once each: one that became ready between two looks would be in neither list.
        done = [one for one in self._waiting if one.done]
        self._waiting = [one for one in self._waiting if one not in done]
        for one in done:
            try:
                one.programs.result()
                if one.grammar is not None:
                    one.sequence.grammar = one.grammar.result()
            except (RequestError, UnsupportedError) as error:
                text = str(error).removeprefix("constraint: ")
                yield Refused(one.sequence, text, "constraint")
            except Exception as error:
                log.error("request %d could not be prepared: %s: %s", one.sequence.rid, type(error).__name__, error)
                yield Refused(one.sequence, f"it could not be prepared: {error}")
            else:
                yield one.sequence

    def wait(self, seconds: float) -> None:
        """Until something may be done, at most `seconds`; returns at once when nothing waits."""
        futures = [f for one in self._waiting for f in (one.programs, one.grammar) if f is not None and not f.done()]
        if futures:
            concurrent.futures.wait(futures, seconds, concurrent.futures.FIRST_COMPLETED)
