"""One prompt of the offline engine on its way to a `Completion`."""

from __future__ import annotations

import dataclasses
from typing import Any

from jqserve.engine.engine import EngineCore
from jqserve.engine.request import EngineRequest, FinishReason, StepEvent, TokenLogprobs
from jqserve.errors import JqserveError, RequestError

UNFINISHED = "\ufffd"  # what decoding gives for bytes that are not a character yet
PATIENCE = 8  # of them; a longer run of broken bytes will never become one, and is text (`server/detokenize`)


@dataclasses.dataclass(frozen=True)
class Completion:
    """What came after one prompt. `text` is without the token or string that stopped it; `token_ids` has them all, to
    the one that completes it. `prompt_logprobs`: of prompt[prompt_from:], where asked for."""

    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    text: str
    finish: FinishReason
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()


class Running:
    """One prompt on its way. `index`: its place among those that were asked together, for errors."""

    def __init__(self, request: EngineRequest, tokenizer: Any, index: int = 0) -> None:
        self.request, self.tokenizer, self.index = request, tokenizer, index
        self.ids: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self.prompt_logprobs: tuple[TokenLogprobs, ...] = ()
        self.finish: FinishReason | None = None
        self.hidden = 0  # tokens at the end that are not text
        self.cut: int | None = None  # characters before a stop string
        self.searched = 0  # characters in which no stop string may begin: what min_new_tokens asked for

    def take(self, event: StepEvent, core: EngineCore) -> bool:
        """True when the sequence has ended."""
        if event.finish is FinishReason.ERROR and event.field:
            raise RequestError(event.field, f"{event.error} (prompt {self.index})")
        if event.finish is FinishReason.ERROR:
            raise JqserveError(f"the engine failed on prompt {self.index}: {event.error}")
        self.prompt_logprobs = event.prompt_logprobs or self.prompt_logprobs
        stopping = event.matched_stop is not None  # its last token, whose text is not output and completes nothing
        watched = max(0, len(event.token_ids) - stopping) if self.request.sampling.stop else 0
        for i in range(watched):  # one by one: a step may have given more than the one that completes a stop string
            self._append(event, i, i + 1)
            if self._stopped():
                self.finish = FinishReason.STOP
                if event.finish is None:
                    core.abort(self.request.rid, stopped=True)
                return True
        self._append(event, watched, len(event.token_ids))
        self.finish = event.finish
        self.hidden = int(stopping)
        return self.finish is not None

    def _append(self, event: StepEvent, start: int, end: int) -> None:
        self.ids += event.token_ids[start:end]
        self.logprobs += event.logprobs[start:end]

    def _stopped(self) -> bool:
        """Whether the newest token completes a stop string; cuts the text before the one that begins first then."""
        text = self._decoded()
        if len(self.ids) < self.request.sampling.min_new_tokens:
            self.searched = len(text.rstrip(UNFINISHED))
            return False
        found = [at for stop in self.request.sampling.stop if (at := text.find(stop, self.searched)) >= 0]
        self.cut = min(found, default=None)
        return bool(found)

    def text(self) -> str:
        """Without the beginning of a character that did not come to its end, as the server tells it."""
        text = self._decoded()
        if self.cut is not None:
            return text[: self.cut]
        whole = text.rstrip(UNFINISHED)
        return text[:-1] if len(text) - len(whole) > PATIENCE else whole

    def _decoded(self) -> str:
        ids = self.ids[: len(self.ids) - self.hidden]
        return str(self.tokenizer.decode(ids, skip_special_tokens=self.request.sampling.skip_special_tokens))

    def completion(self) -> Completion:
        assert self.finish is not None
        return Completion(
            self.request.prompt, tuple(self.ids), self.text(), self.finish, tuple(self.logprobs), self.prompt_logprobs
        )
