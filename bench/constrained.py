"""What grammar masks cost: decode steps with a constraint on every row, on one row, on none.

    python -m bench.constrained --tokenizer DIR [--scheme w4a16] [--batch 64] [--budget SECONDS] [--out DIR]
    python -m bench.constrained --model-path DIR [--load-format dummy] ...

The first form makes a Llama-3.1-8B-shaped model with random weights and the vocabulary of DIR's tokenizer.json
(`bench/tekken` makes a real one of 131,072 tokens). All kinds run in one process, in turn, through the same forward
programs, at temperature 1 with a seed a row. Each constrained row has a JSON schema of its own (an array of objects,
too long to end), so that no mask is shared. Per kind the best window counts; per step are given the wall clock, the
host's milliseconds by phase (`mask`: computing the masks and dispatching the second half, while the device computes
the logits; `wait`: what is left for the device), and the cost beside the plain rows in percent.
"""

from __future__ import annotations

import argparse
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


def load(args: argparse.Namespace, folder: Path) -> Any:
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
        path, load_format = str(make_checkpoint(folder, args.scheme, **changes)), "dummy"
    context = args.steps + ROOM + 64
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
    runner.programs.variants = (Variant.SAMPLE,)
    runner.buckets = Buckets((args.batch,), (Bucket(args.batch, tiles),))
    always, masked = runner.programs.always(), runner.programs.on_demand()
    wanted = [p for p in always if isinstance(p, Forward | Draw)] + [p for p in masked if isinstance(p, Draw)]
    runner.warm_up(lambda done, total, what: tell(f"compiled {done}/{total}: {what}"), programs=wanted, runs=3)
    runner.prepare().result()
    return engine


def rounds(engine: EngineCore, kind: str, batch: int, steps: int, first: int) -> dict[str, Any]:
    """`batch` new sequences of a kind, numbered from `first`: the mean of `steps` steps in which all of them decode."""
    from jqserve.engine.request import EngineRequest, SamplingParams

    constrained = {"plain": 0, "one row": 1, "every row": batch}[kind]
    for i in range(batch):
        sampling = SamplingParams(
            temperature=1.0,
            seed=i,
            max_new_tokens=steps + ROOM,
            ignore_eos=True,
            constraint=("json_schema", schema(i)) if i < constrained else None,
        )
        engine.add(EngineRequest(first + i, (5 + i, 6, 7, 8), sampling))
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
    parser.add_argument("--scheme", default="w4a16", help="of the model that is made: bf16, fp8, w4a16, ...")
    parser.add_argument("--model-path", help="a model, instead of one that is made")
    parser.add_argument("--load-format", default="auto", help="dummy: random weights, with the directory's tokenizer")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=150, help="of a window")
    parser.add_argument("--budget", type=float, default=30.0, help="seconds of windows, at least one of each kind")
    parser.add_argument("--quick", action="store_true", help="a tiny run, to see that it works")
    parser.add_argument("--out", default=None)
    args = parser.parse_args()
    if not (args.model_path or args.tokenizer):
        parser.error("give --tokenizer (for a model that is made) or --model-path")
    if args.quick:
        args.batch, args.steps, args.budget = min(args.batch, 4), 12, 0.0
    with tempfile.TemporaryDirectory() as folder:
        engine = load(args, Path(folder))
    tell("ready")
    first = 0
    windows: list[dict[str, Any]] = []
    rounds(engine, "every row", args.batch, 2, first)  # grammars compiled
    until = time.perf_counter() + args.budget
    while not windows or time.perf_counter() < until:
        for kind in KINDS:
            first += args.batch
            windows.append(rounds(engine, kind, args.batch, args.steps, first))
            tell(f"{kind:9s} {windows[-1]['step_ms']:.3f} ms a step, host {windows[-1]['host_ms']}")
    rows = []
    for kind in KINDS:
        mine = [w for w in windows if w["kind"] == kind]
        best = min(mine, key=lambda w: float(w["step_ms"]))
        rows.append({**best, "windows": len(mine), "median_ms": statistics.median(w["step_ms"] for w in mine)})
    for row in rows:
        row["cost_percent"] = round(100 * (1 - row["rate"] / rows[0]["rate"]), 2)
        row["median_cost_percent"] = round(100 * (1 - rows[0]["median_ms"] / row["median_ms"]), 2)
        print(f"batch {args.batch}, {row['kind']}: {row['rate']:.0f} tokens/s, masks cost {row['cost_percent']:.1f} %")
    from bench.record import write

    model = args.model_path or f"llama8b {args.scheme}"
    print(write("constrained", rows, args.out, batch=args.batch, model=model, vocabulary=engine.limits.vocab_size))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
