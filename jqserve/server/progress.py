"""How far the start is: a bar where stderr is a terminal, else lines of the log, at most one a second."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from jqserve.engine import wire

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

log = logging.getLogger("jqserve.server")

LINE_SECONDS = 1.0  # at most one line of progress in this time
BAR_SECONDS = 0.1  # at most one drawing of the bar in this time


class StartProgress:
    """Shows the engine's `wire.Progress` of what is counted (weights that are loaded, programs that are compiled)."""

    def __init__(self, console: Console | None = None) -> None:
        """`console`: None: stderr."""
        if console is None:
            from rich.console import Console

            console = Console(stderr=True)
        self._console = console
        self._bar: Progress | None = None
        self._stage = ""
        self._told = 0.0

    def show(self, progress: wire.Progress) -> None:
        text, done, total = f"{progress.stage}: {progress.text}", progress.detail.get("done"), None
        if done is not None:
            total = progress.detail.get("total")
        if done is None or done == total:  # said in any case: what is not counted, and the end of what is
            self.close()
            self._told = time.monotonic()
            log.info("%s", text)
        elif time.monotonic() - self._told > (BAR_SECONDS if self._console.is_terminal else LINE_SECONDS):
            self._told = time.monotonic()
            if self._console.is_terminal:
                self._draw(progress, done, total)
            else:
                log.info("%s", text)

    def close(self) -> None:
        """Takes the bar away, so that what is written next has a line of its own."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _draw(self, progress: wire.Progress, done: int, total: int | None) -> None:
        if self._bar is not None and self._stage != progress.stage:
            self.close()
        if self._bar is None:
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

            # Drawn when something is told, and not by a thread: nothing of this runs once requests are served.
            words = TextColumn("{task.description}"), TextColumn("{task.fields[text]}", markup=False)
            columns = words[0], BarColumn(), TimeElapsedColumn(), words[1]
            self._bar = Progress(
                *columns,
                console=self._console,
                transient=True,
                auto_refresh=False,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._bar.add_task(progress.stage, text="")
            self._bar.start()
            self._stage = progress.stage
        self._bar.update(self._bar.task_ids[0], completed=done, total=total, text=progress.text)
        self._bar.refresh()
