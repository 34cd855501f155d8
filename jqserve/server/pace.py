"""How often a stream's tokens are sent: several in a message, and more of them the more streams there are.

A message costs the front end some 80 us of its one core, whatever it holds (measured, `bench/frontend_cpu.py`). At four
tokens a message 25,000 tokens a second would take half of it, and who waits for that core then waits longer for the
first token, and begins later with the next request.
"""

from __future__ import annotations

FLUSH_TOKENS = 4
FLUSH_SECONDS = 0.05
MESSAGES = 2500.0  # a second, of all streams together
MOST_SPACING = 0.2  # seconds; a reader sees five messages a second even so


class Pace:
    """One for all streams of a server, but for requests that say themselves how they want it.

    tokens    wait at most for so many, `seconds` at most
    spacing   seconds from a stream's message to its next one, at least; its end never waits
    """

    def __init__(self, tokens: int = FLUSH_TOKENS, seconds: float = FLUSH_SECONDS, *, fixed: bool = False) -> None:
        """`fixed`: no spacing, however many streams there are."""
        self.tokens = tokens
        self.spacing = 0.0
        self._seconds, self._fixed = seconds, fixed

    @property
    def seconds(self) -> float:
        return max(self._seconds, self.spacing)

    def streams(self, count: int) -> None:
        """So many are answered now."""
        if not self._fixed:
            self.spacing = min(MOST_SPACING, count / MESSAGES)
