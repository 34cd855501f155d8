"""Checkpoints with reference answers, generated on this device through the engine: the kernels as they are wired.

    python -m bench.device_check FOLDER [--only NAME,...] [--out DIR]

FOLDER holds fixtures (../shared/fixtures): checkpoint directories with a ref.npz of prompts, greedy tokens and their
margins by the peers' own dequantization in fp32. All four prompts run at once, greedily, in the device's own dtype.
A token may differ from the reference only where the reference's margin is below `--tolerance` of the largest logit
(0.02: some ten times bf16's rounding over six layers); what follows such a place is not compared. Exit 1 if one does.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np


def check(folder: Path, tolerance: float, new: int = 16) -> dict[str, Any]:
    """One fixture: compared and agreeing tokens, and the largest reference margin at which one differs."""
    import jqserve

    began = time.perf_counter()
    engine = jqserve.Engine(
        str(folder), max_running_requests=8, chunked_prefill_size=128, context_length=256, num_pages=128
    )
    with np.load(folder / "ref.npz") as archive:
        reference = {name: archive[name] for name in archive.files}
    kind = "qdq" if "greedy_qdq_0" in reference else "wdq"
    prompts = [reference[f"prompt_{i}"].tolist() for i in range(4)]
    sampling = jqserve.SamplingParams(temperature=0.0, max_new_tokens=new, ignore_eos=True)
    answers = engine.generate(prompts, sampling, progress=False)
    compared = agreeing = 0
    worst = 0.0
    for i, answer in enumerate(answers):
        largest = float(np.abs(reference[f"logits_{kind}_{i}"]).max())
        expected, margins = reference[f"greedy_{kind}_{i}"], reference[f"margin_{kind}_{i}"] / largest
        for token, wanted, margin in zip(answer.token_ids, expected.tolist(), margins.tolist()):
            compared += 1
            if token != wanted:
                worst = max(worst, margin)
                break
            agreeing += 1
    kernels = sorted({row["kernel"] for row in engine.core.model_info().get("plan", []) if row.get("kernel")})
    return {
        "fixture": folder.name,
        "ok": compared > 0 and worst < tolerance,
        "compared": compared,
        "agreeing": agreeing,
        "margin_of_the_worst_difference": round(worst, 5),
        "kernels": kernels,
        "seconds": round(time.perf_counter() - began, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", help="names of fixtures; default: every folder with a ref.npz")
    parser.add_argument("--tolerance", type=float, default=0.02, help="of the largest |logit|")
    parser.add_argument("--out", help="folder of the result file (default bench/results)")
    args = parser.parse_args()
    folders = sorted(p.parent for p in args.folder.glob("*/ref.npz"))
    if args.only:
        folders = [args.folder / name for name in args.only.split(",")]
    rows = []
    for folder in folders:
        try:
            rows.append(check(folder, args.tolerance))
        except Exception as error:  # the others are still worth knowing
            rows.append({"fixture": folder.name, "ok": False, "failed": f"{type(error).__name__}: {error}"[:300]})
        print(json.dumps(rows[-1]), flush=True)
    from bench.record import write

    print(write("device_check", rows, args.out, tolerance=args.tolerance))
    if not rows or not all(row["ok"] for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
