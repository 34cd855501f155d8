from __future__ import annotations

import io
import logging

import pytest
from rich.console import Console

from jqserve.engine import wire
from jqserve.server import progress
from jqserve.server.progress import StartProgress


def compiled(done: int) -> wire.Progress:
    return wire.Progress("compile", f"{done}/40 8 rows + {done} tiles", {"done": done, "total": 40})


def test_a_terminal_shows_a_bar_and_then_one_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(progress, "BAR_SECONDS", -1.0)
    screen = io.StringIO()
    with caplog.at_level(logging.INFO, "jqserve.server"):
        shown = StartProgress(Console(file=screen, force_terminal=True, width=100))
        shown.show(wire.Progress("load", "3/9 layers.3", {"done": 3, "total": 9}))
        for done in range(1, 40):
            shown.show(compiled(done))
        assert (
            "load" in screen.getvalue() and "━" in screen.getvalue() and "39/40 8 rows + 39 tiles" in screen.getvalue()
        )
        assert not caplog.messages
        shown.show(compiled(40))
    assert caplog.messages == ["compile: 40/40 8 rows + 40 tiles"]
    drawn = len(screen.getvalue())
    shown.close()  # there is none any more: what follows has the screen to itself
    assert len(screen.getvalue()) == drawn and screen.getvalue().endswith("\x1b[2K")


def test_elsewhere_lines_come_once_a_second(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    clock = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    screen = io.StringIO()
    with caplog.at_level(logging.INFO, "jqserve.server"):
        shown = StartProgress(Console(file=screen))
        shown.show(wire.Progress("cache", "32 KV pages", {}))
        for done in range(1, 41):
            clock[0] += 0.1
            shown.show(compiled(done))
    told = [int(text.split()[1].split("/")[0]) for text in caplog.messages if text.startswith("compile")]
    assert caplog.messages[0] == "cache: 32 KV pages" and told[-1] == 40 and 4 <= len(told) <= 5
    assert not screen.getvalue()
