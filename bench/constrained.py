"""What grammar masks cost: decode throughput with and without a constraint on every row, the same lengths.

    python -m bench.constrained --model-path DIR [--batch 64] [--tokens 256] [--quick]

Each row gets a JSON schema of its own (an array of objects, long enough not to end), temperature 1, its own seed; the
plain run has the same seeds and ignores EOS. Both run after a warm-up of the same kind. Prints and writes tokens/s, the
host's seconds by phase (`mask` is the time in llguidance and in dispatching the second half), and the cost in percent.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

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


def schema(number: int) -> str:
    """Every row has its own grammar, so that nothing is shared between the rows."""
    return json.dumps({"type": "array", "items": PERSON, "minItems": ITEMS + number})


def measure(engine: Any, batch: int, tokens: int, constrained: bool) -> dict[str, Any]:
    from jqserve import SamplingParams

    core = engine.core
    prompts = [[5 + i, 6, 7, 8] for i in range(batch)]
    sampling = [
        SamplingParams(
            temperature=1.0,
            seed=i,
            max_new_tokens=tokens,
            ignore_eos=True,
            constraint=("json_schema", schema(i)) if constrained else None,
        )
        for i in range(batch)
    ]
    before, began = dict(core.host_seconds), time.perf_counter()
    answers = engine.generate(prompts, sampling, progress=False)
    seconds = time.perf_counter() - began
    total = sum(len(answer.token_ids) for answer in answers)
    phases = {name: round(value - before[name], 4) for name, value in core.host_seconds.items()}
    return {"constrained": constrained, "tokens": total, "seconds": seconds, "rate": total / seconds, "host": phases}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", required=True)
    parser.add_argument("--load-format", default="auto", help="dummy: random weights, with the directory's tokenizer")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a tiny run, to see that it works")
    parser.add_argument("--out", default=None)
    args = parser.parse_args()
    if args.quick:
        args.batch, args.tokens, args.repeats = 4, 12, 1
    from bench.record import write
    from jqserve import Engine

    engine = Engine(
        args.model_path,
        load_format=args.load_format,
        max_running_requests=args.batch,
        context_length=args.tokens + 64,
        disable_warmup=args.quick,
        constraint_warmup=not args.quick,
    )
    rows = []
    for constrained in (False, True):
        measure(engine, args.batch, min(32, args.tokens), constrained)  # grammars compiled, programs warm
    for _ in range(args.repeats):
        rows += [measure(engine, args.batch, args.tokens, constrained) for constrained in (False, True)]
    best = {kind: max(row["rate"] for row in rows if row["constrained"] is kind) for kind in (False, True)}
    cost = 100 * (1 - best[True] / best[False])
    print(
        f"batch {args.batch}: {best[False]:.0f} tokens/s plain, {best[True]:.0f} constrained: masks cost {cost:.1f} %"
    )
    print(write("constrained", rows, args.out, batch=args.batch, cost_percent=round(cost, 2), model=args.model_path))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
