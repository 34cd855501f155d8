"""What the front end and the engine say to each other: framed messages over one socket pair; no pickle, no jax.

A frame is `<u32 body length> <u8 kind> <body>`, little-endian. Control messages carry JSON. `Add` carries a small JSON
header and the prompt as packed uint32. `Step`, the one message on the hot path, packs a whole step as arrays:

    <u32 events> <u32 tokens> <u32 logprobs> <u32 tops> <u32 extras' length> <u32 stats' length>
    rid u64[events]   count u32[events]   finish u8[events]   has_logprobs u8[events]   matched i64[events]   (-1: none)
    cached u32[events]
    token u32[tokens]
    logprob f32[logprobs]   k u16[logprobs]   top_id u32[tops]   top f32[tops]
    extras JSON {event index: {"error": text, "field": name, "prompt": [[logprob], [[id]], [[logprob]]]}}
    stats JSON

The order of a session: the front end sends `Configure` once; the engine answers with any number of `Progress` and then
one `Ready` (or `Failed` and the end of the stream); from then on `Add`, `Abort` and `Ask` go down, `Step`, `Rejected`
and `Answer` come up. End of stream in either direction means that the other side is gone: the engine exits, the front
end fails what ran.
"""

from __future__ import annotations

import dataclasses
import json
import struct
from collections.abc import Callable, Sequence
from typing import Any

from jqserve.engine.request import EngineRequest, EngineStats, FinishReason, SamplingParams, StepEvent, TokenLogprobs

MAX_BODY = 256 * 2**20  # bytes; a 128k-token prompt is 0.5 MB, so a longer one is a broken stream
FRAME = struct.Struct("<IB")
STEP = struct.Struct("<6I")


class WireError(Exception):
    """The stream does not hold what this module writes: the two processes differ in version, or one is broken."""


@dataclasses.dataclass(frozen=True)
class Configure:
    """Front end -> engine, first: what to load and how to run it. The keys are `EngineConfig`'s fields."""

    config: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Add:
    """Front end -> engine: run this sequence. Answered by `Step` events, or by one `Rejected`."""

    request: EngineRequest


@dataclasses.dataclass(frozen=True)
class Abort:
    """Front end -> engine: forget these sequences now. Unknown ids are not an error. No event answers it.

    `stopped`: their answers are complete, for a stop string has ended them; else they are not wanted any more.
    """

    rids: tuple[int, ...]
    stopped: bool = False


@dataclasses.dataclass(frozen=True)
class Progress:
    """Engine -> front end, before `Ready`: `stage` is "forecast" | "load" | "plan" | "cache" | "compile", `text` is for
    people."""

    stage: str
    text: str
    detail: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Ready:
    """Engine -> front end: it serves from now on. `info` is `Engine.model_info()` (JSON)."""

    info: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Failed:
    """Engine -> front end: it cannot go on and will exit. `user`: the fault is the user's (a `JqserveError`)."""

    message: str
    user: bool = False


@dataclasses.dataclass(frozen=True)
class Rejected:
    """Engine -> front end: this `Add` is refused. `code`: "request" (see `field`) | "queue_full" | "unavailable"."""

    rid: int
    code: str
    message: str
    field: str = ""


@dataclasses.dataclass(frozen=True)
class Step:
    """Engine -> front end: everything that one step gave, in one message; `stats` a few times a second, else None."""

    events: tuple[StepEvent, ...]
    stats: EngineStats | None = None


@dataclasses.dataclass(frozen=True)
class Ask:
    """Front end -> engine: do this for an operator. `verb`: "flush_cache" | "start_profile" | "stop_profile"."""

    number: int
    verb: str


@dataclasses.dataclass(frozen=True)
class Answer:
    """Engine -> front end: what `Ask` number `number` gave (JSON), or why not, in words."""

    number: int
    result: dict[str, Any] = dataclasses.field(default_factory=dict)
    error: str = ""


Message = Configure | Add | Abort | Progress | Ready | Failed | Rejected | Step | Ask | Answer


def encode(message: Message) -> bytes:
    """One frame. Raises `WireError` for a body over `MAX_BODY`."""
    kind, body = KIND[type(message)], _PACK[type(message)](message)
    if len(body) > MAX_BODY:
        raise WireError(f"a {type(message).__name__} of {len(body)} bytes is over the limit of {MAX_BODY}")
    return FRAME.pack(len(body), kind) + body


class Decoder:
    """Cuts a byte stream into messages; feed it pieces of any size."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes | bytearray | memoryview) -> list[Message]:
        """The messages that `data` completed. Raises `WireError` for a stream that is not ours."""
        buffer = self._buffer
        buffer += data
        messages: list[Message] = []
        at = 0
        while len(buffer) - at >= FRAME.size:
            length, kind = FRAME.unpack_from(buffer, at)
            if length > MAX_BODY or kind not in _UNPACK:
                raise WireError(f"bad frame: kind {kind}, {length} bytes")
            if len(buffer) - at < FRAME.size + length:
                break
            at += FRAME.size
            body = bytes(buffer[at : at + length])
            at += length
            try:
                messages.append(_UNPACK[kind](body))
            except (struct.error, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
                raise WireError(f"bad {_NAME[kind]} of {length} bytes: {error}") from error
        if at:
            del buffer[:at]
        return messages


def sampling_to_json(sampling: SamplingParams) -> dict[str, Any]:
    """The fields that differ from the defaults."""
    return {
        field.name: getattr(sampling, field.name)
        for field in dataclasses.fields(sampling)
        if getattr(sampling, field.name) != field.default
    }


def sampling_from_json(fields: dict[str, Any]) -> SamplingParams:
    """The inverse of `sampling_to_json`; lists become tuples again. Raises TypeError for an unknown field."""
    fields = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
    if "constraint" in fields:
        kind, source = fields["constraint"]
        fields["constraint"] = (str(kind), str(source))
    if "logit_bias" in fields:
        fields["logit_bias"] = tuple((int(token), float(bias)) for token, bias in fields["logit_bias"])
    return SamplingParams(**fields)


def _json(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


def _pack_add(message: Add) -> bytes:
    request = message.request
    fields = {"rid": request.rid, "sampling": sampling_to_json(request.sampling)}
    header = _json(fields | {"priority": request.priority} if request.priority else fields)
    return struct.pack("<I", len(header)) + header + struct.pack(f"<{len(request.prompt)}I", *request.prompt)


def _unpack_add(body: bytes) -> Add:
    (size,) = struct.unpack_from("<I", body)
    header = json.loads(body[4 : 4 + size])
    count, rest = divmod(len(body) - 4 - size, 4)
    if rest or count < 0:
        raise ValueError("the prompt is not whole")
    prompt = struct.unpack_from(f"<{count}I", body, 4 + size)
    return Add(EngineRequest(header["rid"], prompt, sampling_from_json(header["sampling"]), header.get("priority", 0)))


def _pack_abort(message: Abort) -> bytes:
    return struct.pack(f"<?{len(message.rids)}Q", message.stopped, *message.rids)


def _unpack_abort(body: bytes) -> Abort:
    stopped, *rids = struct.unpack(f"<?{(len(body) - 1) // 8}Q", body)
    return Abort(tuple(rids), stopped)


def _pack_step(message: Step) -> bytes:
    events = message.events
    tokens = [token for event in events for token in event.token_ids]
    logprobs = [entry for event in events for entry in event.logprobs]
    top_ids = [token for entry in logprobs for token in entry.top_ids]
    tops = [value for entry in logprobs for value in entry.top]
    if len(top_ids) != len(tops):
        raise ValueError("top_ids and top of a TokenLogprobs differ in length")
    for event in events:
        if event.logprobs and len(event.logprobs) != len(event.token_ids):
            raise ValueError(f"request {event.rid}: {len(event.logprobs)} logprobs for {len(event.token_ids)} tokens")
    extras = _json({i: extra for i, event in enumerate(events) if (extra := _extra(event))}) if events else b"{}"
    stats = _json(dataclasses.asdict(message.stats)) if message.stats else b""
    n = len(events)
    return b"".join(
        (
            STEP.pack(n, len(tokens), len(logprobs), len(tops), len(extras), len(stats)),
            struct.pack(f"<{n}Q", *[event.rid for event in events]),
            struct.pack(f"<{n}I", *[len(event.token_ids) for event in events]),
            bytes([event.finish or 0 for event in events]),
            bytes([bool(event.logprobs) for event in events]),
            struct.pack(f"<{n}q", *[-1 if e.matched_stop is None else e.matched_stop for e in events]),
            struct.pack(f"<{n}I", *[event.cached_tokens for event in events]),
            struct.pack(f"<{len(tokens)}I", *tokens),
            struct.pack(f"<{len(logprobs)}f", *[entry.token for entry in logprobs]),
            struct.pack(f"<{len(logprobs)}H", *[len(entry.top) for entry in logprobs]),
            struct.pack(f"<{len(top_ids)}I", *top_ids),
            struct.pack(f"<{len(tops)}f", *tops),
            extras,
            stats,
        )
    )


def _extra(event: StepEvent) -> dict[str, Any]:
    """What few events have."""
    extra: dict[str, Any] = {"error": event.error} if event.error else {}
    if event.field:
        extra["field"] = event.field
    if entries := event.prompt_logprobs:
        extra["prompt"] = [[e.token for e in entries], [e.top_ids for e in entries], [e.top for e in entries]]
    return extra


def _prompt_logprobs(columns: Any) -> tuple[TokenLogprobs, ...]:
    return tuple(TokenLogprobs(token, tuple(ids), tuple(top)) for token, ids, top in zip(*columns, strict=True))


class _Cursor:
    """Reads packed arrays one after the other."""

    def __init__(self, body: bytes, at: int) -> None:
        self.body, self.at = body, at

    def take(self, count: int, code: str) -> tuple[Any, ...]:
        values = struct.unpack_from(f"<{count}{code}", self.body, self.at)
        self.at += count * struct.calcsize("<" + code)
        return values

    def json(self, size: int) -> Any:
        self.at += size
        return json.loads(self.body[self.at - size : self.at])


def _unpack_step(body: bytes) -> Step:
    n, n_tokens, n_logprobs, n_tops, n_extras, n_stats = STEP.unpack_from(body)
    cursor = _Cursor(body, STEP.size)
    rids, counts, finishes = cursor.take(n, "Q"), cursor.take(n, "I"), cursor.take(n, "B")
    has_logprobs, matched, cached = cursor.take(n, "B"), cursor.take(n, "q"), cursor.take(n, "I")
    tokens = cursor.take(n_tokens, "I")
    values, ks = cursor.take(n_logprobs, "f"), cursor.take(n_logprobs, "H")
    top_ids, tops = cursor.take(n_tops, "I"), cursor.take(n_tops, "f")
    extras = cursor.json(n_extras)
    stats = EngineStats(**cursor.json(n_stats)) if n_stats else None
    if cursor.at != len(body) or sum(counts) != n_tokens or sum(ks) != n_tops:
        raise ValueError("the counts of a step contradict each other")
    logprobs, at = [], 0
    for value, k in zip(values, ks):
        logprobs.append(TokenLogprobs(value, top_ids[at : at + k], tops[at : at + k]))
        at += k
    events, token_at, logprob_at = [], 0, 0
    for i in range(n):
        count, scored = counts[i], counts[i] if has_logprobs[i] else 0
        if not (extras or scored or finishes[i] or cached[i]) and matched[i] < 0:  # nearly all of them
            events.append(StepEvent(rids[i], tokens[token_at : token_at + count]))
            token_at += count
            continue
        extra = extras.get(str(i), {}) if extras else {}
        events.append(
            StepEvent(
                rid=rids[i],
                token_ids=tokens[token_at : token_at + count],
                finish=FinishReason(finishes[i]) if finishes[i] else None,
                matched_stop=None if matched[i] < 0 else matched[i],
                logprobs=tuple(logprobs[logprob_at : logprob_at + scored]),
                error=extra.get("error", ""),
                field=extra.get("field", ""),
                cached_tokens=cached[i],
                prompt_logprobs=_prompt_logprobs(extra.get("prompt", ((), (), ()))),
            )
        )
        token_at += count
        logprob_at += scored
    if logprob_at != n_logprobs:
        raise ValueError("the logprobs of a step do not belong to its tokens")
    return Step(tuple(events), stats)


def _jsoned(cls: Any) -> tuple[Callable[[Any], bytes], Callable[[bytes], Any]]:
    names: Sequence[str] = [field.name for field in dataclasses.fields(cls)]
    return lambda message: _json({name: getattr(message, name) for name in names}), lambda body: cls(**json.loads(body))


_CODEC: dict[type, tuple[Callable[[Any], bytes], Callable[[bytes], Any]]] = {
    Configure: _jsoned(Configure),
    Add: (_pack_add, _unpack_add),
    Abort: (_pack_abort, _unpack_abort),
    Progress: _jsoned(Progress),
    Ready: _jsoned(Ready),
    Failed: _jsoned(Failed),
    Rejected: _jsoned(Rejected),
    Step: (_pack_step, _unpack_step),
    Ask: _jsoned(Ask),
    Answer: _jsoned(Answer),
}
KIND: dict[type, int] = {cls: number for number, cls in enumerate(_CODEC, start=1)}
_NAME = {number: cls.__name__ for cls, number in KIND.items()}
_PACK = {cls: codec[0] for cls, codec in _CODEC.items()}
_UNPACK = {KIND[cls]: codec[1] for cls, codec in _CODEC.items()}
