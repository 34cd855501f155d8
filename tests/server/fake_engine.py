"""An engine that speaks the wire and needs no model: it answers a prompt with the prompt, again and again.

`seed` steers it: SLOW takes 10 ms a token instead of nothing, STUCK never answers, BROKEN fails after three tokens,
REFUSED is rejected. Run as a program (`fake_engine.py --fd N`) it is the engine process of the tests of the two deaths.
`Configure.config`: {"token_seconds": s} takes so long a token for everybody, {"fail": text} fails to load,
{"load_seconds": s} takes its time, {"die": true} exits while loading.
"""

from __future__ import annotations

import os
import sys
import time

from jqserve.engine import wire
from jqserve.engine.channel import Channel
from jqserve.engine.request import EngineRequest, EngineStats, FinishReason, StepEvent, TokenLogprobs
from jqserve.engine.validate import Limits, check_request
from jqserve.errors import RequestError

SLOW, STUCK, BROKEN, REFUSED = 1001, 1002, 1003, 1004
EOS = 2
INFO = {
    "model_path": "/models/echo",
    "architecture": "EchoForCausalLM",
    "model_type": "echo",
    "vocab_size": 4096,
    "context_length": 512,
    "max_running_requests": 64,
    "max_queued": 8,
    "eos_token_ids": [EOS],
    "sampling_defaults": {"temperature": 0.5, "repetition_penalty": 1.25},
    "quantization": "echo int4",
    "dtype": "float32",
    "plan": [
        {
            "path": "layers.0.attn.qkv", "source": "model.layers.0", "shape": [768, 256], "scheme": "int4",
            "bits": 4, "group": None, "activation": "none", "dtype": "float16", "bytes": 1000, "surprise": 1,
        }
    ],
    "kv": {"dtype": "float32", "page_size": 16, "pages": 100, "bytes": 12345, "tokens": 1600},
    "device": "fake",
    "scores": True,
}  # fmt: skip


class Running:
    def __init__(self, request: EngineRequest, delay: float = 0.0) -> None:
        self.request, self.tokens, self.last = request, 0, 0.0
        self.delay = 0.01 if request.sampling.seed == SLOW else delay

    def step(self) -> StepEvent | None:
        """The next token, or None when it is not time yet."""
        request, sampling = self.request, self.request.sampling
        if sampling.seed == STUCK or time.monotonic() - self.last < self.delay:
            return None
        self.last = time.monotonic()
        if sampling.max_new_tokens == 0:
            return StepEvent(request.rid, (), FinishReason.LENGTH, prompt_logprobs=self._scores())
        if sampling.seed == BROKEN and self.tokens == 3:
            return StepEvent(request.rid, (), FinishReason.ERROR, error="the fake is broken")
        token = request.prompt[self.tokens % len(request.prompt)]
        self.tokens += 1
        finish = matched = None
        if (token == EOS and not sampling.ignore_eos) or token in sampling.stop_token_ids:
            finish, matched = FinishReason.STOP, token
        elif self.tokens == sampling.max_new_tokens:
            finish = FinishReason.LENGTH
        logprobs: tuple[TokenLogprobs, ...] = ()
        if (k := sampling.logprobs) is not None:
            logprobs = (TokenLogprobs(-0.5, tuple(range(k)), (-0.5,) * k),)
        return StepEvent(request.rid, (token,), finish, matched, logprobs)

    def _scores(self) -> tuple[TokenLogprobs, ...]:
        sampling, tops = self.request.sampling, tuple(range(self.request.sampling.prompt_logprobs or 0))
        entry = TokenLogprobs(-0.5, tops, (-0.5,) * len(tops))
        return (entry,) * (len(self.request.prompt) - sampling.prompt_from)


def serve(channel: Channel) -> None:
    """Until the front end closes the link (EOFError)."""
    (configure,) = channel.receive()
    assert isinstance(configure, wire.Configure)
    config = configure.config
    if "fail" in config:
        channel.send(wire.Failed(config["fail"], user=True))
        return
    channel.send(wire.Progress("plan", "the plan of the echo model"))
    channel.send(wire.Progress("load", "1/1"))
    time.sleep(config.get("load_seconds", 0))
    if config.get("die"):
        os._exit(3)
    delay = config.get("token_seconds", 0.0)  # of every request
    channel.send(wire.Ready({**INFO, **config.get("info", {})}))
    info = {**INFO, **config.get("info", {})}
    limits = Limits(info["vocab_size"], info["context_length"], (EOS,))
    running: dict[int, Running] = {}
    changed, steps = False, 0
    while True:
        idle = not running
        for message in channel.receive(timeout=(0 if changed else None) if idle else 0.002):
            if isinstance(message, wire.Add):
                if message.request.sampling.seed == REFUSED:
                    channel.send(wire.Rejected(message.request.rid, "request", "temperature: is bad", "temperature"))
                    continue
                try:
                    request = check_request(message.request, limits)
                except RequestError as error:
                    channel.send(wire.Rejected(message.request.rid, "request", str(error), error.field))
                    continue
                running[request.rid] = Running(request, delay)
            elif isinstance(message, wire.Abort):
                for rid in message.rids:
                    running.pop(rid, None)
            elif isinstance(message, wire.Ask):
                channel.send(wire.Answer(message.number, {"pages": 7}))
            changed = True
        events = [event for sequence in running.values() if (event := sequence.step())]
        for event in events:
            if event.finish:
                del running[event.rid]
        if events or changed:
            steps += 1
            channel.send(wire.Step(tuple(events), EngineStats(running=len(running), steps=steps)))
        changed = bool(events)


if __name__ == "__main__":
    channel = Channel.from_fd(int(sys.argv[2]))
    channel.exit_on_hangup()
    serve(channel)
