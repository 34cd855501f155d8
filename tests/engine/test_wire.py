"""The link's codec: every message survives the trip, in pieces of any size, and a broken stream is named."""

from __future__ import annotations

import random
import socket
import struct
import threading

import pytest

from jqserve.engine import wire
from jqserve.engine.channel import Channel
from jqserve.engine.request import EngineRequest, EngineStats, FinishReason, SamplingParams, StepEvent, TokenLogprobs

SAMPLING = SamplingParams(
    max_new_tokens=7,
    temperature=0.0,
    logit_bias=((5, -1.5), (9, 2.0)),
    seed=2**62,
    stop=("END", "ü"),
    constraint=("json_schema", '{"type": "object"}'),
    prompt_logprobs=2,
    stop_token_ids=(3,),
)
MESSAGES: list[wire.Message] = [
    wire.Configure({"model_path": "/ä", "context_length": None}),
    wire.Add(EngineRequest(2**40, (1, 2, 2**32 - 1), SAMPLING)),
    wire.Add(EngineRequest(1, (5,), SamplingParams())),
    wire.Abort((1, 2**63)),
    wire.Abort(()),
    wire.Abort((7, 8), stopped=True),
    wire.Progress("load", "3/42", {"rows": [1, 2]}),
    wire.Ready({"vocab_size": 4096}),
    wire.Failed("no such file", user=True),
    wire.Rejected(7, "request", "must be positive", "temperature"),
    wire.Step(()),
    wire.Step(
        (
            StepEvent(1, (4, 5)),
            StepEvent(2, (), FinishReason.ERROR, error="müde", field="constraint"),
            StepEvent(
                3, (6,), FinishReason.STOP, matched_stop=2, logprobs=(TokenLogprobs(-0.5, (6, 7), (-0.5, -2.0)),)
            ),
            StepEvent(
                5, (1,), prompt_logprobs=(TokenLogprobs(-0.5), TokenLogprobs(-0.1, (3,), (-0.25,))), cached_tokens=7
            ),
            StepEvent(4, (8, 9), logprobs=(TokenLogprobs(-1.0), TokenLogprobs(-0.25, (9,), (-0.25,)))),
        ),
        EngineStats(running=3, mean_batch=2.5),
    ),
    wire.Ask(3, "flush_cache"),
    wire.Answer(3, {"pages": 5}),
    wire.Answer(4, error="no profiler runs"),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
def test_round_trip(message: wire.Message) -> None:
    assert wire.Decoder().feed(wire.encode(message)) == [message]


@pytest.mark.parametrize("seed", range(5))
def test_pieces_of_any_size(seed: int) -> None:
    stream = b"".join(map(wire.encode, MESSAGES))
    rng, decoder, at, got = random.Random(seed), wire.Decoder(), 0, []
    while at < len(stream):
        size = rng.choice((1, 3, 50, 1000))
        got += decoder.feed(stream[at : at + size])
        at += size
    assert got == MESSAGES


def test_a_broken_stream_raises_wire_error() -> None:
    rng = random.Random(0)
    stream = wire.encode(next(m for m in reversed(MESSAGES) if isinstance(m, wire.Step)))
    for _ in range(300):
        damaged = bytearray(stream)
        for _ in range(rng.randint(1, 4)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        try:
            for message in wire.Decoder().feed(bytes(damaged)):
                assert isinstance(message, wire.Message)
        except wire.WireError:
            pass
    with pytest.raises(wire.WireError, match="kind 99"):
        wire.Decoder().feed(struct.pack("<IB", 0, 99))
    with pytest.raises(wire.WireError, match="bad frame"):
        wire.Decoder().feed(struct.pack("<IB", wire.MAX_BODY + 1, 1))


def test_logprobs_must_match_tokens() -> None:
    with pytest.raises(ValueError, match="1 logprobs for 2 tokens"):
        wire.encode(wire.Step((StepEvent(1, (4, 5), logprobs=(TokenLogprobs(-1.0),)),)))


def test_channel_talks_waits_and_notices_the_end() -> None:
    ours, theirs = (Channel(sock) for sock in socket.socketpair())
    assert ours.receive(timeout=0) == []
    for message in MESSAGES:
        theirs.send(message)
    assert ours.receive() == MESSAGES
    gone = threading.Event()
    ours.on_hangup(gone.set)
    theirs.send(MESSAGES[0])
    theirs.close()
    assert ours.receive() == [MESSAGES[0]]
    with pytest.raises(EOFError):
        ours.receive()
    with pytest.raises(EOFError):
        ours.send(MESSAGES[0])
    ours.close()
    assert gone.wait(5)
