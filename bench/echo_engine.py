"""An engine without a model, for `bench.frontend_cpu`: every `step_seconds` all of its sequences get a token at once.

python -m bench.echo_engine STEP_SECONDS --fd N      as a server's engine process
"""

from __future__ import annotations

import sys
import time

from jqserve.engine import wire
from jqserve.engine.channel import Channel
from jqserve.engine.request import EngineRequest, EngineStats, FinishReason, StepEvent

INFO = {
    "model_path": "echo",
    "architecture": "EchoForCausalLM",
    "vocab_size": 32000,
    "context_length": 8192,
    "max_running_requests": 1024,
    "max_queued": 1024,
    "eos_token_ids": [2],
    "plan": [],
    "device": "none",
}
STATS_SECONDS = 0.25  # as the real one


def serve(channel: Channel, step_seconds: float) -> None:
    """Until the front end closes the link (EOFError)."""
    channel.receive()
    channel.send(wire.Ready(INFO))
    running: dict[int, tuple[EngineRequest, int]] = {}
    due, told, steps = time.monotonic(), 0.0, 0
    while True:
        timeout = max(0.0, due - time.monotonic()) if running else None
        for message in channel.receive(timeout=timeout):
            if isinstance(message, wire.Add):
                running[message.request.rid] = message.request, 0
            elif isinstance(message, wire.Abort):
                for rid in message.rids:
                    running.pop(rid, None)
        now = time.monotonic()
        if now < due:
            continue
        due = max(due + step_seconds, now)
        events = []
        for rid, (request, count) in running.items():
            token = request.prompt[count % len(request.prompt)]
            ends = count + 1 == request.sampling.max_new_tokens
            events.append(StepEvent(rid, (token,), FinishReason.LENGTH if ends else None))
            running[rid] = request, count + 1
        for event in events:
            if event.finish:
                del running[event.rid]
        steps += 1
        stats = None
        if now - told > STATS_SECONDS:
            told, stats = now, EngineStats(running=len(running), steps=steps)
        if events or stats:
            channel.send(wire.Step(tuple(events), stats))


if __name__ == "__main__":
    channel = Channel.from_fd(int(sys.argv[3]))
    channel.exit_on_hangup()
    serve(channel, float(sys.argv[1]))
