"""What grammar masks cost: decode steps with a constraint on every row, on one row, on none.

    python -m bench.constrained --tokenizer DIR [--schemes w4a16,fp8] [--contexts 1024,4] [--batch 64] [--out DIR]
    python -m bench.constrained --model-path DIR [--load-format dummy] ...

The first form makes Llama-3.1-8B-shaped models with random weights and the vocabulary of DIR's tokenizer.json
(`bench/tekken` makes a real one of 131,072 tokens). Prompts are declared to be in the prefix cache, as in bench.decode;
windows start at each of the contexts. All kinds run in one process, in turn, through the same forward
programs, at temperature 1 with a seed a row. Each constrained row has a JSON schema of its own (an array of objects,
too long to end), so that no mask is shared. Per kind the best window counts; per step are given the wall clock, the
host's milliseconds by phase (`mask`: computing the masks and dispatching the second half, while the device computes
the logits; `wait`: what is left for the device), and the cost beside the plain rows in percent.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jqserve.engine.engine import EngineCore

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 30},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {
            "type": "array",
            "items": {"enum": ["a", "b", "c", "long enough to be several tokens"]},
            "maxItems": 4,
        },
        "at": {"type": "string", "format": "date-time"},
    },
    "required": ["name", "age", "tags", "at"],
    "additionalProperties": False,
}
ITEMS = 1000  # at least so many in the array: no answer ends by itself
KINDS = ("plain", "one row", "every row")
TILES = 8  # of the one prefill program
LEAD = 8  # steps before the clock runs
ROOM = 600  # tokens more than are timed: the first rows decode while the grammars of the last are compiled


def schema(number: int) -> str:
    """Every row has its own grammar, so that nothing is shared between the rows."""
    return json.dumps({"type": "array", "items": PERSON, "minItems": ITEMS + number})


def load(args: argparse.Namespace, scheme: str, folder: Path) -> Any:
    """An engine with two forward programs (with and without prefill) and their draws, with and without masks."""
    from bench.llama8b import QUICK, make_checkpoint
    from jqserve.engine.buckets import Bucket, Buckets
    from jqserve.engine.config import EngineConfig
    from jqserve.engine.load import load_engine
    from jqserve.engine.programs import Draw, Forward
    from jqserve.engine.variant import Variant

    path, load_format = args.model_path, args.load_format
    if path is None:
        vocabulary = len(json.loads((Path(args.tokenizer) / "tokenizer.json").read_text())["model"]["vocab"])
        changes = (QUICK if args.quick else {}) | {"vocab_size": vocabulary, "eos_token_id": 2, "bos_token_id": 1}
        path, load_format = str(make_checkpoint(folder, scheme, **changes)), "dummy"
    context = max(args.contexts) + args.steps + ROOM + 64
    engine = load_engine(
        EngineConfig(
            model_path=path,
            load_format=load_format,
            tokenizer_path=args.tokenizer,
            max_running_requests=args.batch,
            context_length=context,
            num_pages=args.batch * (1 + -(-context // 16)),  # given, for to find it out compiles a program
            schedule_conservativeness=0.0,
            disable_warmup=True,
            self_test=False,
            num_continuous_decode_steps=1,  # a window counts a token a row and step
        )
    )
    runner = engine.runner
    tiles = min(TILES, engine.scheduler.tiles)
    engine.scheduler.tiles = engine.scheduler.decode_tiles = tiles
    runner.programs.variants = (Variant.PLAIN,)
    runner.buckets = Buckets((args.batch,), (Bucket(args.batch, tiles),))
    always, masked = runner.programs.always(), runner.programs.on_demand()
    wanted = [p for p in always if isinstance(p, Forward | Draw)] + [p for p in masked if isinstance(p, Draw)]
    runner.warm_up(lambda done, total, what: tell(f"compiled {done}/{total}: {what}"), programs=wanted, runs=3)
    runner.prepare().result()
    return engine


def rounds(engine: EngineCore, kind: str, batch: int, steps: int, first: int, context: int) -> dict[str, Any]:
    """`batch` new sequences of a kind, numbered from `first`, behind prompts of `context` tokens: the mean of `steps`
    steps in which all of them decode."""
    from bench.decode import pretend_cached
    from jqserve.engine.request import EngineRequest, SamplingParams

    constrained = {"plain": 0, "one row": 1, "every row": batch}[kind]
    engine.scheduler.pool.forget()
    for i in range(batch):
        sampling = SamplingParams(
            temperature=1.0,
            seed=i,
            max_new_tokens=steps + ROOM,
            ignore_eos=True,
            constraint=("json_schema", schema(i)) if i < constrained else None,
        )
        prompt = (5 + i, *(6 + (i + j) % 500 for j in range(context - 1)))
        if context > 2 * engine.scheduler.page_size:
            pretend_cached(engine, prompt)
        engine.add(EngineRequest(first + i, prompt, sampling))
    started: set[int] = set()
    while len(started) < batch:
        started |= {event.rid for event in step(engine)}
    for _ in range(LEAD):
        step(engine)
    before, count, began = dict(engine.host_seconds), 0, time.perf_counter()
    for _ in range(steps):
        count += sum(len(event.token_ids) for event in step(engine))
    seconds = time.perf_counter() - began
    for rid in range(first, first + batch):
        engine.abort(rid)
    while engine.has_work():
        engine.step()
    if count != batch * steps:
        raise RuntimeError(f"{kind}: {count} tokens in {steps} steps of {batch} rows")
    host = {phase: round((value - before[phase]) / steps * 1e3, 4) for phase, value in engine.host_seconds.items()}
    return {
        "kind": kind,
        "step_ms": round(seconds / steps * 1e3, 4),
        "rate": round(count / seconds, 1),
        "host_ms": host,
    }


def step(engine: EngineCore) -> list[Any]:
    events = engine.step()
    if failed := [event for event in events if event.error]:
        raise RuntimeError(failed[0].error)
    return list(events)


def tell(text: str, began: float = time.perf_counter()) -> None:
    print(f"{time.perf_counter() - began:6.1f} s  {text}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", help="a folder with tokenizer.json, if it is not the model's")
    parser.add_argument("--schemes", default="w4a16", help="of the models that are made: bf16,fp8,w4a16, ...")
    parser.add_argument("--contexts", default="1024,4", help="tokens before the answers")
    parser.add_argument("--model-path", help="a model, instead of one that is made")
    parser.add_argument("--load-format", default="auto", help="dummy: random weights, with the directory's tokenizer")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=150, help="of a window")
    parser.add_argument(
        "--budget", type=float, default=15.0, help="seconds of windows at each context, at least one of each kind"
    )
    parser.add_argument("--quick", action="store_true", help="a tiny run, to see that it works")
    parser.add_argument("--out", default=None)
    args = parser.parse_args()
    if not (args.model_path or args.tokenizer):
        parser.error("give --tokenizer (for a model that is made) or --model-path")
    args.contexts = [int(context) for context in args.contexts.split(",")]
    if args.quick:
        args.batch, args.steps, args.budget, args.contexts = min(args.batch, 4), 12, 0.0, [40, 4]
    rows: list[dict[str, Any]] = []
    for scheme in [args.model_path] if args.model_path else args.schemes.split(","):
        with tempfile.TemporaryDirectory() as folder:
            engine = load(args, scheme, Path(folder))
        tell(f"{scheme} is ready")
        first, vocabulary = 0, engine.limits.vocab_size
        rounds(engine, "every row", args.batch, 2, first, args.contexts[0])  # grammars compiled
        for context in args.contexts:
            windows: list[dict[str, Any]] = []
            until = time.perf_counter() + args.budget
            while not windows or time.perf_counter() < until:
                for kind in KINDS:
                    first += args.batch
                    windows.append(rounds(engine, kind, args.batch, args.steps, first, context))
                    tell(f"{kind:9s} {windows[-1]['step_ms']:.3f} ms a step, host {windows[-1]['host_ms']}")
            for row in judged(windows):
                rows.append({"scheme": scheme, "context": context, **row})
                said = f"{row['rate']:.0f} tokens/s, masks cost {row['cost_percent']:.1f} %"
                tell(f"{scheme}, batch {args.batch} at {context}, {row['kind']}: {said}")
        del engine
        gc.collect()
    from bench.record import write

    print(write("constrained", rows, args.out, batch=args.batch, vocabulary=vocabulary))
    return 0


def judged(windows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The best window of each kind, and what it costs beside the plain one's."""
    rows: list[dict[str, Any]] = []
    for kind in KINDS:
        mine = [w for w in windows if w["kind"] == kind]
        best = min(mine, key=lambda w: float(w["step_ms"]))
        rows.append({**best, "windows": len(mine), "median_ms": statistics.median(w["step_ms"] for w in mine)})
    for row in rows:
        row["cost_percent"] = round(100 * (1 - row["rate"] / rows[0]["rate"]), 2)
        row["median_cost_percent"] = round(100 * (1 - rows[0]["median_ms"] / row["median_ms"]), 2)
    return rows


if __name__ == "__main__":
    raise SystemExit(main())
