"""Stop strings in a stream of text: found across any boundary, and never partly emitted."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Holds back the end of the text while it could still become a stop string."""

    def __init__(self, stops: Sequence[str]) -> None:
        """`stops`: none of them empty."""
        self._stops = tuple(stops)
        self._longest = max(map(len, stops), default=0)
        self._held = ""

    def feed(self, text: str) -> tuple[str, str | None]:
        """What may be emitted now, and the stop string that was met, if any (text from it on is dropped).

        Of several in the text the one that begins first wins; of those that begin together, the longest.
        """
        text = self._held + text
        found = [(at, -len(stop), stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            at, _, stop = min(found)
            self._held = ""
            return text[:at], stop
        keep = self._could_begin(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], None

    def flush(self) -> str:
        """The text held back: the sequence has ended without a match."""
        held, self._held = self._held, ""
        return held

    def _could_begin(self, text: str) -> int:
        """Length of the longest end of `text` that is the beginning of a stop string."""
        for size in range(min(self._longest - 1, len(text)), 0, -1):
            tail = text[-size:]
            if any(len(stop) > size and stop.startswith(tail) for stop in self._stops):
                return size
        return 0
