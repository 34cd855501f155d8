"""What comes out of Generate, gathered: the same for the sync and the asyncio client."""

from __future__ import annotations

import dataclasses

from jqserve.server.pb import jqserve_pb2 as pb

REASONS = {
    pb.FINISH_REASON_STOP: "stop",
    pb.FINISH_REASON_LENGTH: "length",
    pb.FINISH_REASON_ABORT: "abort",
}


@dataclasses.dataclass(frozen=True)
class Event:
    """Something new in sequence `index`: text, token ids, or (with `finish_reason`) its end."""

    index: int
    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[pb.TokenLogprob, ...] = ()
    finish_reason: str | None = None  # "stop" | "length" | "abort"


@dataclasses.dataclass
class Choice:
    """One of the n sequences, as far as it has come."""

    index: int
    text: str = ""
    token_ids: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[pb.TokenLogprob] = dataclasses.field(default_factory=list)
    finish_reason: str | None = None
    matched_stop: str | int | None = None  # the stop string, or the token id that stopped it
    completion_tokens: int = 0
    first_token_seconds: float = 0.0
    total_seconds: float = 0.0
    seed: int = 0


@dataclasses.dataclass
class Result:
    """A request's answer, as far as it has come. The attributes without an index are choice 0's."""

    request_id: str = ""
    prompt_tokens: int = 0
    cached_tokens: int = 0  # of the prompt, found in the server's prefix cache
    choices: list[Choice] = dataclasses.field(default_factory=lambda: [Choice(0)])

    @property
    def text(self) -> str:
        return self.choices[0].text

    @property
    def token_ids(self) -> list[int]:
        return self.choices[0].token_ids

    @property
    def finish_reason(self) -> str | None:
        return self.choices[0].finish_reason

    @property
    def completion_tokens(self) -> int:
        """Of all choices."""
        return sum(choice.completion_tokens for choice in self.choices)

    def add(self, response: pb.GenerateResponse) -> Event | None:
        """Takes one message in. None for the opening one."""
        kind = response.WhichOneof("event")
        if kind == "delta":
            delta = response.delta
            choice = self._choice(delta.index)
            choice.text += delta.text
            choice.token_ids += delta.token_ids
            choice.logprobs += delta.logprobs
            return Event(delta.index, delta.text, tuple(delta.token_ids), tuple(delta.logprobs))
        if kind == "finished":
            finished = response.finished
            choice = self._choice(finished.index)
            choice.finish_reason = REASONS.get(finished.reason, "unknown")
            matched = finished.WhichOneof("matched")
            choice.matched_stop = getattr(finished, matched) if matched else None
            choice.completion_tokens = finished.usage.completion_tokens
            choice.first_token_seconds = finished.timings.first_token
            choice.total_seconds = finished.timings.total
            choice.seed = finished.seed
            return Event(finished.index, finish_reason=choice.finish_reason)
        if kind == "started":
            self.request_id = response.started.request_id
            self.prompt_tokens, self.cached_tokens = response.started.prompt_tokens, response.started.cached_tokens
        return None

    def _choice(self, index: int) -> Choice:
        while len(self.choices) <= index:
            self.choices.append(Choice(len(self.choices)))
        return self.choices[index]
