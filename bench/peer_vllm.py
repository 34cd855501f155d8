"""vLLM 0.25.1 on this machine, to set beside bench.decode and bench.serve in the same call.

    python -m bench.peer_vllm --peers DIR [--schemes fp8,w4a16,bf16] [--batches 1,64,256] [--throughput 256,1000,1000]
                              [--budget SECONDS] [--out DIR]
    python -m bench.decode --vllm DIR/peer_vllm.json ...      python -m bench.serve --vllm DIR/peer_vllm.json ...

--peers: a folder with `kernels/`, `vllm/` and bench_peer_vllm.py of /work/shared/peers; they are unpacked into /tmp.
Llama-3.1-8B's shape, dummy weights, greedy, CUDA graphs of the batches asked; `fp8` is per channel and token, `w4a16`
symmetric in groups of 128, as ours. Its prefix cache is on, as by default and as ours: it makes the prompts of the
second and later runs of a batch cheap, and the decode rate is the difference of two such runs.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SCHEMES = {"bf16": "bf16", "fp8": "fp8", "w4a16": "ct4", "int8": "int8"}  # ours: the script's
SITE, SCRIPT = "/tmp/vsite", "bench_peer_vllm.py"
CACHE_OFF, CACHE_ON = "enable_prefix_caching=False", "enable_prefix_caching=True"


def unpack(peers: Path) -> Path:
    """The script to run, after vLLM has been unpacked."""
    for part in ("kernels", "vllm"):
        subprocess.run(["bash", str(peers / part / "unpack.sh")], check=True, stdout=sys.stderr)
    text = (peers / SCRIPT).read_text()
    if CACHE_OFF not in text:
        raise SystemExit(f"{peers / SCRIPT} is not the script this was written for: it has no {CACHE_OFF}")
    script = Path("/tmp") / SCRIPT
    script.write_text(text.replace(CACHE_OFF, CACHE_ON))
    return script


def measure(script: Path, scheme: str, args: argparse.Namespace, seconds: float) -> list[dict[str, Any]]:
    command = [sys.executable, str(script), "--scheme", SCHEMES[scheme], "--batches", args.batches, "--hi", "112"]
    if args.throughput and scheme in (args.throughput_schemes or args.schemes).split(","):
        command += ["--tp", args.throughput]
    env = {**os.environ, "PYTHONPATH": SITE}
    began = time.monotonic()
    try:
        done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, timeout=seconds)
        text, ended = done.stdout, f"exit status {done.returncode}"
    except subprocess.TimeoutExpired as error:
        text = error.stdout.decode() if isinstance(error.stdout, bytes) else str(error.stdout or "")
        ended = f"stopped after {seconds:.0f} s"
    rows = rows_of(scheme, text)
    if not rows or ended != "exit status 0":
        rows.append({"scheme": scheme, "failed": ended})
    rows.append({"scheme": scheme, "seconds": round(time.monotonic() - began, 1)})
    return rows


def rows_of(scheme: str, text: str) -> list[dict[str, Any]]:
    """The script's lines in our words."""
    rows: list[dict[str, Any]] = []
    for line in text.splitlines():
        if not line.startswith("{"):
            continue
        said = json.loads(line)
        if "batch" in said:
            known = {"batch": said["batch"], "context": said["ctx"], "step_ms": said["tpot_ms"]}
            rows.append({"scheme": scheme, **known, "tokens_per_second": said["tok_s_decode"]})
        elif "out_tok_s" in said:
            known = {"requests": said["n"], "workload": f"random:{said['inp']}/{said['out']}"}
            rows.append({"scheme": scheme, **known, "output_tokens_per_second": said["out_tok_s"]})
        else:
            rows.append({"scheme": scheme, "startup_seconds": said.get("startup_s"), "applied": said})
    return rows


def decode_rates(path: str) -> dict[tuple[str, int, int], float]:
    """{(scheme, batch, context): tokens/s} of a result of this script."""
    rows = json.loads(Path(path).read_text())["rows"]
    return {(r["scheme"], r["batch"], r["context"]): r["tokens_per_second"] for r in rows if "batch" in r}


def throughputs(path: str) -> dict[tuple[str, str], float]:
    """{(scheme, workload): output tokens/s}, the best of what was run."""
    found: dict[tuple[str, str], float] = {}
    for row in json.loads(Path(path).read_text())["rows"]:
        if "workload" in row:
            key = (row["scheme"], row["workload"])
            found[key] = max(found.get(key, 0.0), row["output_tokens_per_second"])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, required=True)
    parser.add_argument("--schemes", default="fp8,w4a16,bf16")
    parser.add_argument("--batches", default="1,64,256")
    parser.add_argument("--throughput", default="", help="REQUESTS,IN,OUT; several with semicolons")
    parser.add_argument("--throughput-schemes", help="of --schemes; default: all")
    parser.add_argument("--budget", type=float, default=420, help="seconds")
    parser.add_argument("--out")
    args = parser.parse_args()
    until = time.monotonic() + args.budget
    script = unpack(args.peers)
    rows: list[dict[str, Any]] = []
    for scheme in args.schemes.split(","):
        left = until - time.monotonic()
        rows += [{"scheme": scheme, "skipped": "budget"}] if left < 60 else measure(script, scheme, args, left)
        print(json.dumps([r for r in rows if r["scheme"] == scheme]), flush=True)
    shutil.rmtree("/tmp/vcache", ignore_errors=True)
    from bench.record import write

    print(write("peer_vllm", rows, args.out))


if __name__ == "__main__":
    main()
