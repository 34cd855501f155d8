"""What a grammar's mask costs a core, with llguidance's own token slices and with ours.

    python -m bench.mask_time --tokenizer DIR [--steps 200] [--grammars 6] [--out DIR]

The answers of bench.constrained's schemas, drawn at random from what each mask allows: the same tokens for every kind
of slices. A row a kind: microseconds a mask in the mean, at the median, the 99th percentile and the most.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np


def walk(matchers: list[Any], words: int, steps: int, tokens: list[list[int]] | None) -> tuple[list[float], Any]:
    """(seconds of every mask, the tokens taken): `tokens` are drawn where there are none yet."""
    mask, rng = np.zeros((1, words), np.int32), np.random.default_rng(0)
    seconds, taken = [], tokens or [[] for _ in matchers]
    for matcher, mine in zip(matchers, taken):
        for step in range(steps):
            began = time.perf_counter()
            matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
            seconds.append(time.perf_counter() - began)
            if tokens is None:
                mine.append(int(rng.choice(np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")))))
            matcher.consume_token(mine[step])
    return seconds, taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, help="a folder with tokenizer.json")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--grammars", type=int, default=6)
    parser.add_argument("--out")
    args = parser.parse_args()

    import llguidance

    from bench.constrained import schema
    from bench.record import write
    from jqserve.engine.constraint import SLICES, build

    text = (Path(args.tokenizer) / "tokenizer.json").read_text()
    rows: list[dict[str, Any]] = []
    tokens = None
    for name, slices in (("llguidance's", llguidance.LLTokenizer.general_slices()), ("ours", SLICES)):
        tokenizer = llguidance.LLTokenizer(text, slices=slices)
        matchers = [build(tokenizer, ("json_schema", schema(i))) for i in range(args.grammars)]
        seconds, tokens = walk(matchers, -(-tokenizer.vocab_size // 32), args.steps, tokens)
        us = np.asarray(seconds) * 1e6
        figures = {"mean": us.mean(), "p50": np.median(us), "p99": np.percentile(us, 99), "max": us.max()}
        rows.append({"slices": name, "masks": len(us), **{f"{k}_us": round(float(v), 1) for k, v in figures.items()}})
        print(rows[-1], flush=True)
    print(write("mask_time", rows, args.out, vocabulary=tokenizer.vocab_size))


if __name__ == "__main__":
    main()
