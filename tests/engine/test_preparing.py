"""Requests that something is made for: none is lost, whenever that becomes ready."""

from __future__ import annotations

import concurrent.futures
from types import SimpleNamespace
from typing import Any

from jqserve.engine.preparing import Preparing


class ReadyAtTheSecondLook(concurrent.futures.Future[None]):
    """Becomes ready right after it has been asked for the first time."""

    def done(self) -> bool:
        was = super().done()
        if not was:
            self.set_result(None)
        return was


def test_what_becomes_ready_between_two_looks_is_not_lost() -> None:
    programs = ReadyAtTheSecondLook()
    sequence: Any = SimpleNamespace(rid=1, sampling=SimpleNamespace(constraint=None), grammar=None)
    preparing = Preparing(None, lambda: programs)
    preparing._told = True  # or `add` would take the first look
    preparing.add(sequence)
    found = list(preparing.ready())
    assert len(found) + len(preparing) == 1
    assert found + list(preparing.ready()) == [sequence]
