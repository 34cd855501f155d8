"""The engine's host time per step, by phase, with no device behind it.

    python -m bench.host_loop [--rows 64,256,384] [--input 128] [--output 128] [--steps 400] [--profile] [--out DIR]

A real engine (scheduler, batches, tokens taken over, messages packed for the front end) whose programs are stubs that
give tokens at once. Two kinds of load per number of rows: `decode`, where everybody decodes, and `serve`, a closed loop
of requests of --input and --output tokens, in which an answer that ends makes room for the next prompt. What a step
takes here is a floor of what it takes with a device: milliseconds of the loop's thread, `step_ms` in all.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import sys
import time
from typing import Any

VOCABULARY = 32000


def make_engine(rows: int, context: int) -> Any:
    """A model of one tiny layer, none of whose programs is ever compiled."""
    import jax.numpy as jnp
    import numpy as np

    from jqserve.engine.batch import StepShape
    from jqserve.engine.buckets import make_buckets
    from jqserve.engine.cache import cache_shape
    from jqserve.engine.config import GPU
    from jqserve.engine.engine import EngineCore
    from jqserve.engine.pages import PagePool
    from jqserve.engine.runner import Runner
    from jqserve.engine.sampler import Sampled
    from jqserve.engine.scheduler import Scheduler
    from jqserve.engine.split import Half
    from jqserve.engine.validate import Limits
    from jqserve.models.config import ModelConfig, RopeConfig

    page, tile, tiles = GPU.page_size, GPU.tile_size, -(-GPU.chunked_prefill_size // GPU.tile_size)
    pages = rows * (1 + -(-context // page))
    model = ModelConfig(
        "LlamaForCausalLM", "llama", VOCABULARY, 8, 8, 1, 1, 1, 8, 1e-5, RopeConfig(), context, True, dtype="float32"
    )
    shape = StepShape(rows, page, -(-context // page), tile, 64)  # the slots' state would be large with the vocabulary
    cache = cache_shape(model, page_size=page, pages=1, dtype="float32")
    buckets = make_buckets(rows, tiles, fine=True, steps=1)
    runner = Runner(None, (jnp.zeros(1),), shape, cache, buckets, variants=GPU.variants)  # type: ignore[arg-type]
    tokens = np.random.default_rng(0).integers(3, VOCABULARY, 4096).astype(np.int32)

    def step(program: Any, packed: Any, params: Any, adopted: Any = ()) -> Sampled:
        return Sampled(tokens[: program.bucket.decode_rows])  # type: ignore[arg-type]

    def draw(program: Any, half: Any, mask: Any, params: Any) -> Sampled:
        return Sampled(tokens[: program.rows])  # type: ignore[arg-type]

    runner._step, runner._draw = step, draw  # type: ignore[method-assign]
    runner._forward = lambda *_: Half(None, None, None, None)  # type: ignore[assignment, method-assign, arg-type]
    scheduler = Scheduler(
        PagePool(pages), page_size=page, slots=rows, tile_size=tile, tiles=tiles, conservativeness=1.0,
        fill=buckets.fill,
    )  # fmt: skip
    return EngineCore(runner, scheduler, Limits(VOCABULARY, context, (2,)), max_queued=4 * rows)


def measure(kind: str, rows: int, lengths: tuple[int, int], steps: int) -> dict[str, Any]:
    """Mean milliseconds over `steps` steps; in `serve` the first requests are of all ages, as in a long run."""
    import numpy as np

    from jqserve.engine import wire
    from jqserve.engine.request import EngineRequest, SamplingParams

    prompt, answer = lengths
    engine = make_engine(rows, prompt + max(answer, steps + 64) + 64)
    random, rid = np.random.default_rng(1), 0

    def add(length: int) -> None:
        nonlocal rid
        rid += 1
        ids = tuple(random.integers(3, VOCABULARY, prompt).tolist())
        engine.add(EngineRequest(rid, ids, SamplingParams(temperature=0.0, max_new_tokens=length, ignore_eos=True)))

    for i in range(rows):
        add(steps + 32 if kind == "decode" else 1 + i * answer // rows)
    started: set[int] = set()
    while len(started) < rows:
        for event in engine.step():
            if event.rid <= rows:
                started.add(event.rid)
            if event.finish is not None:
                add(answer)
    for _ in range(8):
        engine.step()
    before, began, sent, tokens, ended = dict(engine.host_seconds), time.perf_counter(), 0.0, 0, 0
    for _ in range(steps):
        events = engine.step()
        clock = time.perf_counter()
        wire.encode(wire.Step(tuple(events), None))
        sent += time.perf_counter() - clock
        for event in events:
            tokens += len(event.token_ids)
            if event.finish is not None:
                ended += 1
                add(answer)
    seconds = time.perf_counter() - began
    phases = {name: (value - before[name]) / steps * 1e3 for name, value in engine.host_seconds.items()}
    phases["send"] = sent / steps * 1e3
    return {
        "kind": kind,
        "rows": rows,
        "step_ms": round(seconds / steps * 1e3, 3),
        "us_per_row": round(seconds / tokens * 1e6, 2),
        "ended_per_step": round(ended / steps, 2),
        "host_ms": {name: round(value, 3) for name, value in phases.items() if value > 0.0005},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="64,256,384")
    parser.add_argument("--input", type=int, default=128)
    parser.add_argument("--output", type=int, default=128)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--repeat", type=int, default=3, help="the fastest counts")
    parser.add_argument("--profile", action="store_true", help="print where the time goes")
    parser.add_argument("--out", default=None)
    args = parser.parse_args()
    sys.setswitchinterval(0.0005)  # as the engine process has it
    rows = []
    for count in (int(n) for n in args.rows.split(",")):
        for kind in ("decode", "serve"):
            profile = cProfile.Profile()
            if args.profile:
                profile.enable()
            found = [measure(kind, count, (args.input, args.output), args.steps) for _ in range(args.repeat)]
            if args.profile:
                profile.disable()
                pstats.Stats(profile).sort_stats("tottime").print_stats(28)
            rows.append(min(found, key=lambda row: float(row["step_ms"])))
            print(json.dumps(rows[-1]), flush=True)
    from bench.record import write

    print(write("host_loop", rows, args.out, input=args.input, output=args.output, steps=args.steps))
    return 0


if __name__ == "__main__":
    sys.exit(main())
