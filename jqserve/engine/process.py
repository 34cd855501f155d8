"""The engine process: `python -m jqserve.engine.process --fd N` loads a model and serves the link until it closes.

`serve` is also what `--frontend inline` runs in a thread. jax is imported after the configuration has come, because
XLA's share of the GPU's memory follows from it and has to be in the environment first.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from jqserve.engine import wire
from jqserve.engine.channel import Channel
from jqserve.engine.config import NO_COMMAND_BUFFERS, EngineConfig
from jqserve.errors import EngineUnavailableError, JqserveError, QueueFullError, RequestError

if TYPE_CHECKING:
    from jqserve.engine.engine import EngineCore
    from jqserve.engine.operator import Operator

log = logging.getLogger(__name__)

STATS_SECONDS = 0.25
Prepare = Callable[[EngineConfig], EngineConfig]


def serve(channel: Channel, prepare: Prepare | None = None) -> int:
    """One session: configuration, loading, requests, until the front end closes the link. Returns an exit status.

    `prepare` may change the configuration before jax is imported.
    """
    try:
        config = EngineConfig.from_json(receive_first(channel).config)
        return run(channel, prepare(config) if prepare is not None else config)
    except EOFError:
        return 0
    except JqserveError as error:
        return _fail(channel, str(error), user=True)
    except Exception as error:
        log.exception("the engine failed")
        return _fail(channel, f"{type(error).__name__}: {error}", user=False)


def receive_first(channel: Channel) -> wire.Configure:
    messages = channel.receive()
    if len(messages) != 1 or not isinstance(messages[0], wire.Configure):
        raise wire.WireError("the first message must be one Configure")
    return messages[0]


def run(channel: Channel, config: EngineConfig) -> int:
    """Loads the engine and serves with it. Raises EOFError when the front end is gone, JqserveError from loading."""
    from jqserve.engine.load import load_engine
    from jqserve.engine.operator import Operator

    engine = load_engine(config, lambda stage, text, detail: channel.send(wire.Progress(stage, text, detail)))
    gc.collect()
    gc.freeze()  # a collection would look at all of jax's objects, some 0.1 s, in the middle of a step
    channel.send(wire.Ready(engine.model_info()))
    operator = Operator(engine, config.profile_dir)
    told, settled = 0.0, True
    while True:
        messages = channel.receive(timeout=0 if engine.has_work() else None)
        began = time.perf_counter()
        for message in messages:
            if isinstance(message, wire.Ask):
                _answer(operator, channel, message)
            else:
                _take(engine, channel, message)
        engine.host_seconds["receive"] += time.perf_counter() - began
        events = engine.step()
        now = time.monotonic()
        idle = not engine.has_work()
        due = now - told >= STATS_SECONDS or (idle and not settled)
        if events or due:
            began = time.perf_counter()
            channel.send(wire.Step(tuple(events), engine.stats() if due else None))
            engine.host_seconds["send"] += time.perf_counter() - began
        told, settled = (now, idle) if due else (told, settled and idle)


def _take(engine: EngineCore, channel: Channel, message: wire.Message) -> None:
    if isinstance(message, wire.Abort):
        for rid in message.rids:
            engine.abort(rid, stopped=message.stopped)
    elif isinstance(message, wire.Add):
        rid = message.request.rid
        try:
            engine.add(message.request)
        except RequestError as error:
            channel.send(wire.Rejected(rid, "request", str(error), error.field))
        except QueueFullError as error:
            channel.send(wire.Rejected(rid, "queue_full", str(error)))
        except EngineUnavailableError as error:
            channel.send(wire.Rejected(rid, "unavailable", str(error)))
    else:
        raise wire.WireError(f"the front end sent a {type(message).__name__}")


def _answer(operator: Operator, channel: Channel, ask: wire.Ask) -> None:
    try:
        channel.send(wire.Answer(ask.number, operator(ask.verb)))
    except JqserveError as error:
        channel.send(wire.Answer(ask.number, error=str(error)))


def _fail(channel: Channel, message: str, *, user: bool) -> int:
    with contextlib.suppress(EOFError):
        channel.send(wire.Failed(message, user=user))
    return 2 if user else 1


def xla_fraction(mem_fraction_static: float) -> float:
    """XLA's share of the GPU: the static share and room for activations; the rest is for CUDA itself and libraries."""
    return min(0.96, mem_fraction_static + max(0.04, 0.6 * (1 - mem_fraction_static)))


def prepare_xla(config: EngineConfig) -> EngineConfig:
    """What of it XLA reads from the environment, and only once: call it in a process that has not used jax yet."""
    fraction = xla_fraction(config.mem_fraction_static)
    os.environ["XLA_CLIENT_MEM_FRACTION"] = f"{fraction:.4f}"
    if config.disable_cuda_graph:
        flags = os.environ.get("XLA_FLAGS", "").split()
        os.environ["XLA_FLAGS"] = " ".join([*flags, NO_COMMAND_BUFFERS])
    return dataclasses.replace(config, xla_fraction=fraction)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="jqserve.engine.process")
    parser.add_argument("--fd", type=int, required=True, help="the inherited socket to the front end")
    channel = Channel.from_fd(parser.parse_args(argv).fd)
    channel.exit_on_hangup()
    return serve(channel, _prepare_process)


def _prepare_process(config: EngineConfig) -> EngineConfig:
    """What a process of its own may do: logging to stderr, in the front end's format; XLA's share of the GPU."""
    logging.basicConfig(level=config.log_level.upper(), format="%(asctime)s %(levelname).1s %(name)s: %(message)s")
    logging.getLogger("jax").setLevel(max(logging.WARNING, logging.root.level))  # it tells at length of absent TPUs
    logging.captureWarnings(True)  # jax's: bare lines between those of the log
    sys.setswitchinterval(0.0005)  # the dispatching thread must not wait 5 ms for the loop to let go of the interpreter
    return prepare_xla(config)


if __name__ == "__main__":
    sys.exit(main())
