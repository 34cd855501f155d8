"""Load and generate, in process: load seconds, peak device memory, tokens/s at batch 1 and 64.

The shipped 4-bit model from its files, and models of Llama-3.1-8B's shape with random weights in bf16, FP8 (per channel
weights, per token activations) and AWQ form. Beside each rate stands the bound that reading the weights once a step
sets at the device's memory bandwidth.

    python -m bench.start_line [--cases demo,bf16,fp8,awq] [--batches 1,64] [--quick] [--out DIR]

`--quick` shrinks the models until a CPU gets through in seconds: it checks the script, its figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jqserve.engine.engine import EngineCore

DEMO = Path(__file__).parent.parent / "jqserve" / "demo" / "model"
PAGES = 1088  # of 64 tokens on a GPU: 64 sequences of up to 1,024 tokens, 8.5 GiB of bf16 KV at the 8B shape


def measure(case: str, batches: list[int], prompt: int, new: int, quick: bool = False) -> dict[str, Any]:
    """One case in this process; returns its row."""
    import jax

    from bench.bandwidth import read_bandwidth
    from bench.llama8b import QUICK, make_checkpoint
    from jqserve.engine.buckets import Bucket, Buckets
    from jqserve.engine.config import EngineConfig
    from jqserve.engine.load import load_engine

    bandwidth = read_bandwidth()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        path = DEMO if case == "demo" else make_checkpoint(Path(folder), case, **(QUICK if quick else {}))
        config = EngineConfig(
            model_path=str(path),
            load_format="auto" if case == "demo" else "dummy",
            max_running_requests=max(batches),
            context_length=1024,
            chunked_prefill_size=1024,
            num_pages=None if quick else PAGES,
            disable_warmup=True,
        )
        engine = load_engine(config)
    device = jax.devices()[0]
    # Three programs instead of a server's dozens: the clock here is on decoding, not on compiling.
    runner = engine.runner
    mixed = Bucket(max(batches), runner.buckets.mixed[-1].tiles)
    runner.buckets = Buckets(tuple(batches), (mixed,))
    compiling = time.perf_counter()
    runner.warm_up(programs=[p for bucket in runner.buckets.all() for p in runner.programs.cheapest(bucket)], runs=3)
    compile_seconds = time.perf_counter() - compiling
    info = engine.model_info()
    row: dict[str, Any] = {
        "case": case,
        "start_seconds": round(time.perf_counter() - began, 2),
        "load_seconds": info.get("load_seconds"),
        "compile_seconds": round(compile_seconds, 2),
        "read_tb_per_second": round(bandwidth / 1e12, 3) if bandwidth else None,
        "weight_gib": round(sum(x.nbytes for x in engine.runner.leaves) / 2**30, 3),
    }
    weight_bytes = sum(x.nbytes for x in engine.runner.leaves) - engine.runner.leaves[0].nbytes
    for batch in batches:
        generate(engine, batch, prompt, 16)
        ttft, decode = generate(engine, batch, prompt, new)
        row[f"batch_{batch}"] = {
            "prefill_tokens_per_second": round(batch * prompt / ttft, 1),
            "decode_tokens_per_second": round(batch * (new - 1) / decode, 1),
            "step_ms": round(decode / (new - 1) * 1e3, 3),
            "bound_step_ms": round(weight_bytes / bandwidth * 1e3, 3) if bandwidth else None,
        }
    stats = device.memory_stats() or {}
    row["peak_gib"] = round(stats.get("peak_bytes_in_use", 0) / 2**30, 2)
    row["kv_gib"] = round(info["kv"]["bytes"] / 2**30, 2)
    row["compilations_while_serving"] = runner.compilations_after_warmup
    row["host_seconds"] = {k: round(v, 3) for k, v in engine.host_seconds.items()}
    return row


def generate(engine: EngineCore, batch: int, prompt: int, new: int) -> tuple[float, float]:
    """Seconds until every sequence has its first token, and from there to the end."""
    from jqserve.engine.request import EngineRequest, SamplingParams

    vocabulary = engine.limits.vocab_size
    for i in range(batch):
        tokens = tuple((7 + 31 * i + 13 * j) % (vocabulary - 8) + 4 for j in range(prompt))
        sampling = SamplingParams(max_new_tokens=new, temperature=0.0, ignore_eos=True, seed=0)
        engine.add(EngineRequest(i, tokens, sampling))
    began = time.perf_counter()
    first, waiting = 0.0, set(range(batch))
    while engine.has_work():
        for event in engine.step():
            if event.error:
                raise RuntimeError(event.error)
            waiting.discard(event.rid)
        if not waiting and not first:
            first = time.perf_counter()
    return first - began, time.perf_counter() - first


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="demo,bf16,fp8,awq")
    parser.add_argument("--batches", default="1,64")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of each prompt")
    parser.add_argument("--new", type=int, default=128, help="tokens generated per sequence")
    parser.add_argument("--out", help="folder of the result file (default bench/results)")
    parser.add_argument("--quick", action="store_true", help="tiny models: a check of this script")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    batches = [int(b) for b in args.batches.split(",")]
    if args.one:
        print(json.dumps(measure(args.one, batches, args.prompt, args.new, args.quick)))
        return
    rows = []
    for case in args.cases.split(","):
        # A process a case: peak memory is per process. The GPU pool is the one that the server would take.
        environment = {**os.environ, "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.75"}
        command = [sys.executable, "-m", "bench.start_line", "--one", case, "--batches", args.batches]
        command += ["--prompt", str(args.prompt), "--new", str(args.new), *["--quick"] * args.quick]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
        if done.returncode:
            rows.append({"case": case, "failed": done.returncode})
        else:
            rows.append(json.loads(done.stdout.strip().splitlines()[-1]))
        print(json.dumps(rows[-1]), flush=True)
    from bench.record import write

    print(write("start_line", rows, args.out, prompt_tokens=args.prompt, new_tokens=args.new))
    if any("failed" in row for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
