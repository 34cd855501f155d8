"""From the command to the first token, by phase: cold (no compiled program is kept) and warm (all are).

    python -m bench.startup [--scheme fp8] [--runs cold,warm] [--budget SECONDS] [--quick] [--out DIR] [-- ENGINE FLAGS]

Writes a checkpoint of Llama-3.1-8B's shape with random weights to local disk first (its page cache is warm then), so
that reading and relaying weights is real; `--quick` takes a tiny one. Every run is a process of its own:

    import      Python, jax and our modules          device   the first use of the GPU
    load        weights: read, sent, relaid          self_test  each kernel once
    pages       pool and state, sizing it
    warm_up     step programs compiled or read back, and run (`compiled`, `from_cache`: how many)
    first_token of a 128-token prompt                total    all of it, from exec
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def write_checkpoint(folder: Path, scheme: str, quick: bool, **changes: Any) -> int:
    """A real checkpoint: config.json and safetensors of random values; returns its bytes. `changes` override fields of
    config.json."""
    import numpy as np
    from safetensors.numpy import save_file

    from bench.llama8b import LLAMA_3_1_8B, QUICK, make_checkpoint

    if scheme not in ("bf16", "fp8"):
        raise SystemExit(f"--scheme {scheme}: bf16 and fp8 checkpoints can be written")
    import ml_dtypes

    changes = (QUICK if quick else {}) | changes
    config: dict[str, Any] = {**LLAMA_3_1_8B, **changes}
    make_checkpoint(folder, scheme, **changes)
    hidden, ffn, dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    rng = np.random.default_rng(0)
    # One block of random values, cut to size: drawing eight billion takes longer than all else together.
    block = (rng.standard_normal(2**22) * 0.02).astype(ml_dtypes.bfloat16)

    def dense(*shape: int) -> np.ndarray:
        size = int(np.prod(shape))
        return np.resize(block, size).reshape(shape)

    def linear(name: str, n: int, k: int) -> dict[str, np.ndarray]:
        if scheme == "bf16":
            return {f"{name}.weight": dense(n, k)}
        values = np.resize((block.astype(np.float32) * 2000).astype(ml_dtypes.float8_e4m3fn), n * k)
        return {
            f"{name}.weight": values.reshape(n, k),
            f"{name}.weight_scale": np.full((n, 1), 5e-4, ml_dtypes.bfloat16),
        }

    def layer(i: int) -> dict[str, np.ndarray]:
        at = f"model.layers.{i}"
        tensors = {f"{at}.{name}.weight": np.ones(hidden, ml_dtypes.bfloat16) for name in NORMS}
        for name, n in (("q", heads * dim), ("k", kv_heads * dim), ("v", kv_heads * dim)):
            tensors |= linear(f"{at}.self_attn.{name}_proj", n, hidden)
        tensors |= linear(f"{at}.self_attn.o_proj", hidden, heads * dim)
        tensors |= linear(f"{at}.mlp.gate_proj", ffn, hidden) | linear(f"{at}.mlp.up_proj", ffn, hidden)
        return tensors | linear(f"{at}.mlp.down_proj", hidden, ffn)

    vocabulary = config["vocab_size"]
    ends = {"model.embed_tokens.weight": dense(vocabulary, hidden), "lm_head.weight": dense(vocabulary, hidden)}
    ends["model.norm.weight"] = np.ones(hidden, ml_dtypes.bfloat16)
    layers, per_file, total = config["num_hidden_layers"], 8, 0
    where: dict[str, str] = {}
    groups: list[list[int]] = [list(range(i, min(i + per_file, layers))) for i in range(0, layers, per_file)]
    for number, group in enumerate([*groups, []]):
        tensors = ends if not group else {k: v for i in group for k, v in layer(i).items()}
        name = f"model-{number + 1:05d}.safetensors"
        save_file(tensors, folder / name)
        where |= dict.fromkeys(tensors, name)
        total += sum(t.nbytes for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


NORMS = ("input_layernorm", "post_attention_layernorm")


def start(model: str, cache: str, began: float, flags: list[str]) -> dict[str, Any]:
    """One start in this process. `began`: time.time() just before it was created."""
    from jqserve.cli.server import parser, server_config
    from jqserve.engine.config import EngineConfig
    from jqserve.engine.process import prepare_xla

    args = parser().parse_args(["--model-path", model, "--compilation-cache-dir", cache, *flags])
    config = prepare_xla(EngineConfig.from_json(server_config(args).engine))
    phases: dict[str, float] = {}
    clock = [began]

    def done(phase: str) -> None:
        now = time.time()
        phases[phase] = round(phases.get(phase, 0.0) + now - clock[0], 3)
        clock[0] = now

    logging.basicConfig(format="%(relativeCreated)d ms %(message)s", level=logging.INFO)  # to stderr
    logging.getLogger("jqserve.engine.compile_cache").setLevel(logging.DEBUG)  # seconds by program

    import jax

    from jqserve.engine.load import load_engine
    from jqserve.engine.request import EngineRequest, SamplingParams

    done("import")
    jax.devices()
    done("device")
    ended = {"plan": "load", "cache": "pages"}

    def report(stage: str, text: str, detail: dict[str, Any]) -> None:
        if stage in ended or text.startswith("self-test"):
            done("self_test" if text.startswith("self-test") else ended[stage])

    engine = load_engine(config, report)
    done("warm_up")
    prompt = tuple(3 + i % (engine.limits.vocab_size - 8) for i in range(min(128, engine.limits.context_length // 2)))
    engine.add(EngineRequest(0, prompt, SamplingParams(max_new_tokens=2, temperature=0.0, ignore_eos=True, seed=0)))
    while not engine.step():
        pass
    done("first_token")
    info = engine.model_info()
    return {
        "phases": phases,
        "total": round(time.time() - began, 3),
        "compiled": info["programs_compiled"],
        "from_cache": info["programs_from_cache"],
        "programs": len(engine.runner.programs.always()),
        "weight_gib": round(sum(x.nbytes for x in engine.runner.leaves) / 2**30, 3),
    }


def caches(runs: str, flags: list[str], scratch: Path) -> list[tuple[str, str]]:
    """(kind, folder of compiled programs) of each run: an empty one for "cold", the one before it for "warm"."""
    found: list[tuple[str, str]] = []
    for kind in runs.split(","):
        if kind not in ("cold", "warm"):
            raise SystemExit(f"--runs: {kind} is neither cold nor warm")
        if kind == "warm" and not found:
            raise SystemExit("--runs: the first run finds no compiled programs, so it is not warm; give cold,warm")
        found.append((kind, found[-1][1] if kind == "warm" else str(scratch / f"cache-{len(found)}")))
    if any(flag.startswith("--compilation-cache-dir") for flag in flags):
        raise SystemExit("--compilation-cache-dir: the folder is chosen here, or a cold run might find programs there")
    return found


def main() -> None:
    own, flags = sys.argv[1:], []
    if "--" in own:
        own, flags = own[: own.index("--")], own[own.index("--") + 1 :]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scheme", default="fp8", help="bf16 or fp8")
    parser.add_argument("--model-path", help="a checkpoint instead of a written one")
    parser.add_argument("--runs", default="cold,warm")
    parser.add_argument("--budget", type=float, default=600, help="seconds after which runs are skipped")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--name", default="startup")
    parser.add_argument("--out")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args(own)
    if args.one:
        print("ROW " + json.dumps(start(args.one[0], args.one[1], float(args.one[2]), flags)))
        return
    began = time.monotonic()
    rows: list[dict[str, Any]] = []
    more: dict[str, Any] = {}
    if args.quick:
        flags = ["--max-running-requests", "2", "--context-length", "64", "--chunked-prefill-size", "32", *flags]
    with tempfile.TemporaryDirectory() as scratch:
        model, runs = args.model_path, caches(args.runs, flags, Path(scratch))
        if model is None:
            model = str(Path(scratch) / args.scheme)
            more["checkpoint_bytes"] = write_checkpoint(Path(model), args.scheme, args.quick)
            more["write_seconds"] = round(time.monotonic() - began, 2)
        for kind, cache in runs:
            if time.monotonic() - began > args.budget:
                rows.append({"run": kind, "skipped": "budget"})
                continue
            command = [sys.executable, "-m", "bench.startup", "--one", model, cache, repr(time.time()), "--", *flags]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
            found = [line[4:] for line in done.stdout.splitlines() if line.startswith("ROW ")]
            rows.append({"run": kind} | (json.loads(found[-1]) if found else {"failed": done.returncode}))
            print(json.dumps(rows[-1]), flush=True)
    from bench.record import write

    print(write(args.name, rows, args.out, scheme=args.scheme, model_path=args.model_path, flags=flags, **more))
    if any("failed" in row for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
