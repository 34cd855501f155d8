"""One prompt of the offline engine on its way to a `Completion`."""

from __future__ import annotations

import dataclasses
from typing import Any

from jqserve.engine.engine import EngineCore
from jqserve.engine.request import EngineRequest, FinishReason, StepEvent, TokenLogprobs
from jqserve.errors import JqserveError, RequestError


@dataclasses.dataclass(frozen=True)
class Completion:
    """What came after one prompt. `text` is without the token or string that stopped it; `token_ids` has them all."""

    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    text: str
    finish: FinishReason
    logprobs: tuple[TokenLogprobs, ...] = ()


class Running:
    """One prompt on its way."""

    def __init__(self, request: EngineRequest, tokenizer: Any) -> None:
        self.request, self.tokenizer = request, tokenizer
        self.ids: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self.finish: FinishReason | None = None
        self.hidden = 0  # tokens at the end that are not text
        self.cut: int | None = None  # characters before a stop string

    def take(self, event: StepEvent, core: EngineCore) -> bool:
        """True when the sequence has ended."""
        if event.finish is FinishReason.ERROR and event.field:
            raise RequestError(event.field, f"{event.error} (prompt {self.request.rid})")
        if event.finish is FinishReason.ERROR:
            raise JqserveError(f"the engine failed on prompt {self.request.rid}: {event.error}")
        self.ids += event.token_ids
        self.logprobs += event.logprobs
        self.finish = event.finish
        self.hidden = int(event.matched_stop is not None)
        stops = self.request.sampling.stop
        if stops and len(self.ids) >= self.request.sampling.min_new_tokens:
            text = self.text()
            found = [at for stop in stops if (at := text.find(stop)) >= 0]
            if found:
                self.cut, self.finish = min(found), FinishReason.STOP
                core.abort(self.request.rid)
        return self.finish is not None

    def text(self) -> str:
        ids = self.ids[: len(self.ids) - self.hidden]
        return self.tokenizer.decode(ids, skip_special_tokens=self.request.sampling.skip_special_tokens)[: self.cut]

    def completion(self) -> Completion:
        assert self.finish is not None
        return Completion(self.request.prompt, tuple(self.ids), self.text(), self.finish, tuple(self.logprobs))
