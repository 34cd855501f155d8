"""Token ids to text, a few at a time: the pieces joined are the decoded whole, and no piece holds half a character."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Decode = Callable[[Sequence[int]], str]

UNFINISHED = "\ufffd"  # what decoding gives for bytes that are not (yet) a character
CONTEXT = 5  # tokens of the prompt: decoders treat the first token of a text specially (a leading space is dropped)
LIMIT = 64  # tokens; a window of skipped special tokens or broken bytes does not grow for ever
PATIENCE = 8  # tokens; a character has at most 4 bytes, so a longer run of broken bytes will never become one


class Detokenizer:
    """Decodes a sliding window: the tokens of the last whole piece (context) and those after it.

    A byte-level or byte-fallback vocabulary can split a character over several tokens. While the window's text ends in
    the replacement character, the text is held back; bytes that can no longer become a character pass as decoded.
    """

    def __init__(self, decode: Decode, prompt: Sequence[int] = ()) -> None:
        self._decode = decode
        self._window = list(prompt[-CONTEXT:])
        self._context = len(self._window)  # how many tokens of the window have been emitted whole
        self._sent = len(decode(self._window).rstrip(UNFINISHED)) if self._window else 0  # characters of its text

    def feed(self, ids: Sequence[int]) -> str:
        """The text that `ids` made certain; often lags a token behind when they split a character."""
        self._window += ids
        text = self._decode(self._window)
        if not text.endswith(UNFINISHED):
            piece = text[self._sent :]
            if piece or len(self._window) > LIMIT:  # slide: what was new is the next context, if it gave text by itself
                del self._window[: self._context]
                text = self._decode(self._window)
            self._context = len(self._window)
            self._sent = len(text)
            return piece
        whole = len(text.rstrip(UNFINISHED))
        if len(self._window) - self._context > PATIENCE:
            whole = len(text) - 1  # only the last of them can still be the beginning of a character
        if whole <= self._sent:
            return ""
        piece = text[self._sent : whole]
        self._sent = whole
        if len(self._window) > LIMIT:
            del self._window[:-PATIENCE]
            self._context = PATIENCE - 1
            self._sent = len(self._decode(self._window)) - 1
        return piece
