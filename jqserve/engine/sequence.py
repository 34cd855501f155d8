"""One request inside the engine: its tokens, its place on the device, and how far its KV has come. Plain Python."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from jqserve.engine.request import EngineRequest, FinishReason, SamplingParams, TokenLogprobs
from jqserve.engine.variant import ORDER, needed

if TYPE_CHECKING:
    from jqserve.engine.grammar import Matcher


@dataclasses.dataclass(eq=False)
class Sequence:
    """A request and its progress.

    tokens     prompt and generated ids, as far as the host has read them
    computed   positions whose keys and values are in pages, or will be once the dispatched steps have run
    pending    tokens sampled on the device by dispatched steps that the host has not read yet
    on_device  the newest token is in the device's `last_token[slot]`: the next step may be a decode row
    pages      KV pages in the order of positions; slot: row of the device's per-slot state, None while waiting
    limit      the length (prompt and answer) at which it ends
    names      of its first full pages (`engine/prefix`), as far as they were needed; named_pages: pages that have them
    cached_tokens  positions that were found in the prefix cache when it got its slot; first_cached: the first time
    grammar    where its answer stands in its constraint, when it has one
    scores     of its prompt's tokens, by place, as far as they are computed; None when nobody asks (any more)
    probation  it was in a step that failed: it runs alone until that many positions have been computed (0: no)
    sampler    the place in `variant.ORDER` of the least sampler that gives it all it asks
    """

    request: EngineRequest
    arrival: int
    limit: int
    tokens: list[int]
    stop_ids: frozenset[int]
    slot: int | None = None
    pages: list[int] = dataclasses.field(default_factory=list)
    computed: int = 0
    pending: int = 0
    on_device: bool = False
    probation: int = 0
    failures_alone: int = 0
    preemptions: int = 0
    names: list[bytes] = dataclasses.field(default_factory=list)
    named_pages: int = 0
    cached_tokens: int = 0
    first_cached: int = 0
    grammar: Matcher | None = None
    scores: dict[int, TokenLogprobs] | None = None
    finish: FinishReason | None = None
    sampler: int = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.sampler = ORDER.index(needed(self.request.sampling))

    @property
    def wants_scores(self) -> bool:
        return self.scores is not None

    @property
    def rid(self) -> int:
        return self.request.rid

    @property
    def sampling(self) -> SamplingParams:
        return self.request.sampling

    @property
    def prompt_length(self) -> int:
        return len(self.request.prompt)

    @property
    def length(self) -> int:
        """Tokens that exist, read or not."""
        return len(self.tokens) + self.pending

    @property
    def remaining(self) -> int:
        """Tokens whose KV is not computed yet; the last of them gives the next token."""
        return self.length - self.computed

    @property
    def decodes(self) -> bool:
        """Its next step is one decode row whose token is on the device."""
        return self.on_device and self.remaining == 1
