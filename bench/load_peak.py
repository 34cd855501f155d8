"""Memory while an unquantized model is quantized on its way in: peak on the device and on the host, for every scheme.

    python -m bench.load_peak --layers 32 [--schemes fp8 int4 ...] [--mem-fraction 0.12] --out DIR

The checkpoint is Llama-3.1-8B's shape in bfloat16 as a sparse file (all zeros: the sizes are what matters), made in a
temporary folder. Each scheme loads in a process of its own, for the device's peak counter cannot be reset;
--mem-fraction caps what XLA may allocate, to show that a model loads where it would not fit unquantized.

awq and gptq calibrate, which zeros do not allow: for them random weights are written, and calibrated on random tokens.
The file is written after every scheme; with --at-once N, as many schemes load side by side, each with its part of the
device's memory.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.header_checkpoint import write_headers
from bench.startup import write_checkpoint

#: The two largest modules of a layer-wise load: gate and up together, and the embedding or the head.
SLACK = 64 << 20
CALIBRATED = ("awq", "gptq")
CALIBRATED_ON = (32, 2048)  # random tokens: two chunks of the quantizers


def measure(folder: str, scheme: str) -> dict[str, Any]:
    """Loads in this process; bytes."""
    import jax
    import numpy as np

    from jqserve.checkpoint.convert import load
    from jqserve.checkpoint.forecast import forecast
    from jqserve.checkpoint.open import open_checkpoint
    from jqserve.checkpoint.opening import open_model
    from jqserve.engine.calibrated import open_asked
    from jqserve.ops.relayout import place

    source: Any = folder
    if scheme in CALIBRATED:
        tokens = Path(folder) / f"calibration_{scheme}.npy"  # they may load side by side
        np.save(tokens, np.random.default_rng(0).integers(0, 500, CALIBRATED_ON))
        source, _ = open_asked(folder, scheme, str(tokens))
    asked = None if scheme in CALIBRATED else scheme
    # what calibrates is a checkpoint already, which loading closes
    with contextlib.nullcontext(source) if scheme in CALIBRATED else open_checkpoint(folder) as opened:
        planned = forecast(open_model(opened, None, "config", asked))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    loaded = load(source, quantization=asked, device_put=place, decode="device")
    jax.block_until_ready(loaded.params)
    stats = jax.devices()[0].memory_stats() or {}
    final = sum(leaf.nbytes for leaf in jax.tree.leaves(loaded.params))
    peak = stats.get("peak_bytes_in_use")
    return {
        "scheme": scheme,
        "final_bytes": final,
        "peak_device_bytes": peak,
        "over_final_bytes": None if peak is None else peak - final,
        "two_largest_modules_bytes": planned.largest,
        "calibration_bytes": planned.working[0],
        "within_bound": None if peak is None else peak - final <= planned.largest + SLACK,
        "host_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--layers", type=int, default=32)
    add("--schemes", nargs="+", default=["none", "fp8", "fp8_block", "w8a8_int8", "int8", "int4", "torchao:int4wo-128"])
    add("--mem-fraction", type=float, help="of the device's memory that XLA may allocate")
    add("--at-once", type=int, default=1, help="schemes that load side by side")
    add("--name", default="load_peak", help="of the result file")
    add("--quick", action="store_true", help="awq and gptq on a tiny model: checks the script")
    add("--out", help="default: bench/results")
    add("--one", nargs=2, metavar=("FOLDER", "SCHEME"), help="(what the command runs for each scheme)")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(*args.one)))
        return
    if args.mem_fraction is None and args.at_once > 1:
        args.mem_fraction = round(0.5 / args.at_once, 3)
    environment = dict(os.environ)
    if args.mem_fraction:
        environment["XLA_CLIENT_MEM_FRACTION"] = str(args.mem_fraction)
    from bench import record

    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder, concurrent.futures.ThreadPoolExecutor(args.at_once) as pool:
        zeros, random = Path(folder) / "zeros", Path(folder) / "random"
        write_headers(zeros, "bf16", shards=1, num_hidden_layers=args.layers)
        if set(args.schemes) & set(CALIBRATED):
            write_checkpoint(random, "bf16", args.quick, num_hidden_layers=args.layers)

        def load_apart(scheme: str) -> dict[str, Any]:
            path = random if scheme in CALIBRATED else zeros
            command, began = [sys.executable, "-m", "bench.load_peak", "--one", str(path), scheme], time.monotonic()
            done = subprocess.run(command, capture_output=True, text=True, env=environment)
            last = (done.stdout.strip().splitlines() or [""])[-1]
            row = json.loads(last) if done.returncode == 0 else {"scheme": scheme, "failed": done.stderr[-400:]}
            return row | {"seconds": round(time.monotonic() - began, 1)}

        for each in concurrent.futures.as_completed([pool.submit(load_apart, scheme) for scheme in args.schemes]):
            rows.append(each.result())
            print(json.dumps(rows[-1]), flush=True)
            path = record.write(args.name, rows, args.out, layers=args.layers, mem_fraction=args.mem_fraction)
    print(path)


if __name__ == "__main__":
    main()
