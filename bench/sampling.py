"""What drawing a token costs: greedy, plain, with top-k and top-p by XLA and by the kernel, at 128,256 tokens.

    python -m bench.sampling [--rows 1,16,64,256] [--no-xla] [--no-check] [--quick] [--out DIR]

First every case of `pallas_kernels.sample.cases` runs on the device and is held against a sort in float64; then each
way is timed (`bench.timing`: a chain by wall clock, its kernels by CUPTI) and its tokens are compared with XLA's. The
logits of a chain's calls alternate between two arrays: as behind a head that has just written them, they are in L2 up
to 16 rows, half of them at 64, and come from HBM at 256. `bound_us` is one reading of them from HBM at 4.6 TB/s.
"sampler" is all of the engine's `sample` variant: penalties and biases before the op, the logprob behind it. With torch
here, or in the system's Python, its sort-based top-k and top-p is timed too, as vLLM's fallback does it
(`bench.peer_sampling`). Exits 1 where a check fails.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pallas_kernels.sample.cases import CASES, Case, logits

HBM = 4.6e12  # bytes a second that an H200 reads: /work/shared/KERNELS.md, measured
SETS = 2

#: (position int32 [R], `unasked`, the op's arguments) -> tokens, which are the next call's positions
Way = Callable[[Any, dict[str, Any], dict[str, Any]], Any]

#: name -> (kind of logits, temperature, top_k, top_p, min_p)
ASKED = {
    "top-p": ("peaked", 0.6, 0, 0.9, 0.0),  # Llama 3's defaults
    "top-k+top-p": ("peaked", 0.7, 20, 0.8, 0.0),  # Qwen 3's
    "min-p": ("peaked", 1.0, 0, 1.0, 0.05),
    "top-p, wide": ("normal", 2.0, 0, 0.95, 0.0),  # some 50,000 tokens in the nucleus: the longest search and draw
}


def given(rows: int, vocabulary: int, asked: str, at: int) -> dict[str, Any]:
    """The op's arguments, on the device."""
    import jax
    import numpy as np

    kind, *cuts = ASKED[asked]
    row = functools.partial(logits, Case(kind, vocabulary))
    distinct = np.stack([row(seed=1000 * at + i) for i in range(min(rows, 16))])
    rng = np.random.default_rng(at)
    full = lambda value, dtype: np.full(rows, value, dtype)  # noqa: E731
    return jax.device_put(
        {
            "logits": np.resize(distinct, (rows, vocabulary)),
            "temperature": full(cuts[0], np.float32),
            "top_k": full(cuts[1], np.int32),
            "top_p": full(cuts[2], np.float32),
            "min_p": full(cuts[3], np.float32),
            "seed": rng.integers(0, 2**32, (rows, 2), dtype=np.uint32),
            "position": np.arange(rows, dtype=np.int32),
        }
    )


def unasked(rows: int, vocabulary: int) -> dict[str, Any]:
    """What `RowParams` has beside the op's arguments, of rows that ask for nothing of it; on the device."""
    import jax
    import numpy as np

    zero, entries = np.zeros(rows, np.float32), (rows, 336)
    return jax.device_put(
        {
            "repetition": zero + 1,
            "presence": zero,
            "frequency": zero,
            "top_logprobs": np.full(rows, -1, np.int32),
            "bias_ids": np.full(entries, 2**31 - 1, np.int32),
            "bias_values": np.zeros(entries, np.float32),
            "bias_until": np.zeros(entries, np.int32),
            "generated": np.zeros((rows, vocabulary), np.int16),
            "prompted": np.zeros((rows, vocabulary), bool),
        }
    )


def ways(asked: str, with_xla: bool) -> dict[str, Way]:
    from jqserve.engine import sampler
    from pallas_kernels.sample.api import sample

    def sampled(position: Any, more: dict[str, Any], g: dict[str, Any], plain: bool) -> Any:
        own = {name: array for name, array in g.items() if name not in ("logits", "position")}
        params = sampler.RowParams(position=position, **own, **more)
        out = sampler.sample(g["logits"], params, scored=False, plain=plain)
        assert out.logprob is not None
        return out.tokens + (out.logprob > 1)  # none is: both are computed

    def op(implementation: str | None) -> Way:
        return lambda at, _, g: sample(**(g | {"position": at}), implementation=implementation)[0]

    found: dict[str, Way] = {}
    if asked == "top-p":
        found["greedy"] = lambda at, more, g: sampler.greedy(g["logits"]).tokens + (at < -1)  # never: but a chain
        found["plain"] = lambda at, more, g: sampled(at, more, g, plain=True)
        found["top-p sampler"] = lambda at, more, g: sampled(at, more, g, plain=False)
    found[f"{asked} op"] = op(None)
    if with_xla:
        found[f"{asked} XLA"] = op("xla")
    return found


@functools.cache
def _jitted() -> Any:
    import jax

    from pallas_kernels import sample

    return jax.jit(lambda **arrays: sample(**arrays))


def once(case: Case) -> float:
    """One case on this device; 0, or AssertionError."""
    import numpy as np

    from tests.pallas_kernels.sample_oracle import arguments, check

    arrays = arguments(case)
    token, total, threshold = (np.asarray(a)[0] for a in _jitted()(**arrays))
    try:
        check(case, arrays, int(token), float(total), float(threshold))
    except AssertionError as error:
        raise AssertionError(f"{case}: token {token}, total {total}, threshold {threshold}: {error}"[:300]) from None
    return 0.0


def checked() -> dict[str, Any]:
    """All cases."""
    wrong = []
    for case in CASES:
        try:
            once(case)
        except AssertionError as error:
            wrong.append(str(error))
    return {"cases": len(CASES), "wrong": wrong}


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    import jax
    import numpy as np

    from bench.timing import chain, kernel_durations, time_chain
    from pallas_kernels import explain

    # (rows, asked, way, calls, fixed and rotated arguments, the chain, one call alone)
    jobs: list[tuple[int, str, str, int, Any, Any, Any, Any]] = []
    for rows in args.rows:
        more = unasked(rows, args.vocabulary)
        for asked in ASKED:
            sets = [given(rows, args.vocabulary, asked, at) for at in range(SETS)]
            fixed, rotated = (sets[0]["position"], more), tuple((g,) for g in sets)
            for name, way in ways(asked, args.xla and asked in ("top-p", "top-k+top-p")).items():
                rounds = 1 if "XLA" in name or args.quick else 4
                run = chain(way, carried=True, rounds=rounds)
                jobs.append((rows, asked, name, SETS * rounds, fixed, rotated, run, jax.jit(way)))

    def compiled(job: Any) -> Any:
        *_, fixed, rotated, run, alone = job
        return run.lower(fixed, rotated).compile(), alone.lower(*fixed, *rotated[0]).compile()

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        programs = list(pool.map(compiled, jobs))
    result: list[dict[str, Any]] = []
    tokens: dict[tuple[int, str], Any] = {}
    for (rows, asked, name, calls, fixed, rotated, _, _), (run, alone) in zip(jobs, programs):
        timing = time_chain(lambda run=run, a=(fixed, rotated): run(*a), calls, repeats=3 if args.quick else 5)
        launches = len(kernel_durations(lambda alone=alone, a=(*fixed, *rotated[0]): alone(*a)))
        bound = rotated[0][0]["logits"].nbytes / HBM * 1e6
        row = {"rows": rows, "way": name, **timing.row(), "launches": launches, "bound_us": round(bound, 2)}
        drawn = np.asarray(alone(*fixed, *rotated[0]))
        if name.endswith(" op"):
            row["implementation"] = explain("sample", **rotated[0][0]).chosen
            tokens[rows, asked] = drawn
        if name.endswith("XLA"):
            row["tokens_unlike_the_ops"] = int((drawn != tokens[rows, asked]).sum())
        result.append(row)
        print(json.dumps(row), flush=True)
    return result


def peers(args: argparse.Namespace) -> list[dict[str, Any]]:
    from bench.peer_tasks import python_with_torch

    python = None if args.quick else python_with_torch()
    if python is None:
        return []
    command = [python, "-m", "bench.peer_sampling", "--rows", ",".join(map(str, args.rows))]
    command += ["--vocabulary", str(args.vocabulary)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=Path(__file__).parents[1])
    if done.returncode:
        return [{"way": "torch", "failed": done.stderr[-300:]}]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=lambda text: [int(n) for n in text.split(",")], default=[1, 16, 64, 256])
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--no-xla", dest="xla", action="store_false", help="XLA's thresholds compile for seconds each")
    parser.add_argument("--no-check", dest="check", action="store_false")
    parser.add_argument("--no-peer", dest="peer", action="store_false")
    parser.add_argument("--quick", action="store_true", help="small, on a CPU: whether the script works")
    parser.add_argument("--out", help="folder of the result file (default bench/results)")
    args = parser.parse_args()
    if args.quick:
        args.rows, args.vocabulary = [1, 2], 4096
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch has the GPU beside us

    from bench.record import write

    found = peers(args) if args.peer else []  # alone on the GPU
    checks = checked() if args.check and not args.quick else None
    print(json.dumps(checks), flush=True)
    rows = [*measure(args), *found]
    for row in found:
        print(json.dumps(row), flush=True)
    print(write("sampling", rows, args.out, vocabulary=args.vocabulary, check=checks))
    differing = sum(row.get("tokens_unlike_the_ops", 0) for row in rows)
    if differing > 0.01 * sum(row["rows"] for row in rows if "tokens_unlike_the_ops" in row):
        sys.exit(f"{differing} tokens are not XLA's")
    if checks and checks["wrong"]:
        sys.exit(f"{len(checks['wrong'])} cases are wrong")


if __name__ == "__main__":
    main()
