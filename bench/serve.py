"""Serving under load: throughput and latency over gRPC, and beside it on the bare engine.

    python -m bench.serve [--scheme fp8] [--workload random:1000/1000] [--concurrency 1,8,64,256,512 | --rate 2,4,8]
                          [--mode grpc,engine] [--requests-per-slot 4] [--budget SECONDS] [--quick] [--out DIR]
                          [-- FLAGS OF jqserve-server]

Workloads (several: with commas), EOS ignored: `random:IN/OUT` (SGLang's random; --range-ratio 1 fixes the lengths) and
`shared:GROUPSxQUESTIONS:PREFIX+QUESTION/OUT` (its generated-shared-prefix). Modes: `grpc` starts jqserve-server and
loads it from --clients processes; `engine` runs the same requests in process. A row per mode and level:

    output_tokens_per_second, ...   from the first request sent to the last one ended
    ttft_ms, tpot_ms, itl_ms        mean, P50, P99 as the client sees them (over gRPC tokens come in small groups, so
                                    its ITL is mostly 0; the engine mode's is on the engine's own clock)
    server_ttft_ms, server_tpot_ms  by the server's clock
    grpc_cost                       1 - throughput over gRPC / on the engine, where both modes ran

Without --model-path the model has Llama-3.1-8B's shape and random weights in `--scheme`. Writes serve.json, serve.svg.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.latency import summarize
from bench.svg import chart
from bench.workload import Item, random_items, shared_prefix_items

#: vLLM 0.25.1's output tokens/s on an H200 at saturating concurrency, and TensorRT-LLM's published ones (KERNELS.md B)
PEERS = {
    ("fp8", "random:1000/1000"): {"vllm": 11634, "trtllm_fp8_kv": 17744},
    ("bf16", "random:1000/1000"): {"vllm": 9680},
    ("w4a16", "random:1000/1000"): {"vllm": 9043},
    ("fp8", "random:128/128"): {"vllm": 25167},
    ("fp8", "random:128/2048"): {"trtllm_fp8_kv": 26221},
    ("fp8", "random:2048/128"): {"trtllm_fp8_kv": 3538},
    ("fp8", "random:2048/2048"): {"trtllm_fp8_kv": 12194},
}
QUICK_FLAGS = [
    "--max-running-requests",
    "4",
    "--context-length",
    "128",
    "--disable-warmup",
    "--chunked-prefill-size",
    "32",
]


def peers(scheme: str, workload: str, vllm: str | None) -> dict[str, Any]:
    """`vllm` is of the same call where --vllm names its result (`beside` is true then), else of another day's H200."""
    known: dict[str, Any] = dict(PEERS.get((scheme, workload), {}))
    if vllm is not None:
        from bench.peer_vllm import throughputs

        if (measured := throughputs(vllm).get((scheme, workload))) is not None:
            known |= {"vllm": round(measured), "beside": True}
    return known


def items_of(workload: str, count: int, vocabulary: int, ratio: float, seed: int) -> list[Item]:
    """Raises SystemExit for a name that is none."""
    kind, _, rest = workload.partition(":")
    try:
        if kind == "random":
            input_len, output_len = (int(n) for n in rest.split("/"))
            return random_items(count, input_len, output_len, vocabulary=vocabulary, ratio=ratio, seed=seed)
        if kind == "shared":
            shape, lengths = rest.split(":")
            groups, questions = (int(n) for n in shape.split("x"))
            inputs, output = lengths.split("/")
            prefix, question = (int(n) for n in inputs.split("+"))
            return shared_prefix_items(
                groups, questions, prefix, question, int(output), vocabulary=vocabulary, seed=seed
            )
    except ValueError:
        pass
    raise SystemExit(f"--workload {workload}: expected random:IN/OUT or shared:GROUPSxQUESTIONS:PREFIX+QUESTION/OUT")


Keep = Callable[[list[dict[str, Any]]], object]  # what there is of a sweep's rows


class Served:
    """jqserve-server in a process of its own."""

    def __init__(self, model: str, flags: list[str], folder: Path) -> None:
        ready = folder / "ready.json"
        command = [sys.executable, "-m", "jqserve.cli.server", "--model-path", model, "--port", "0"]
        command += ["--ready-file", str(ready), *flags]
        began = time.monotonic()
        self.log = (folder / "server.log").open("w+")
        self.process = subprocess.Popen(command, stdout=self.log, stderr=subprocess.STDOUT)
        while not ready.exists():
            if self.process.poll() is not None:
                raise RuntimeError(f"the server ended while starting:\n{Path(self.log.name).read_text()[-3000:]}")
            time.sleep(0.05)
        self.start_seconds = round(time.monotonic() - began, 2)
        self.target = "127.0.0.1:{port}".format(**json.loads(ready.read_text()))

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.log.close()


def levels(args: argparse.Namespace) -> list[dict[str, Any]]:
    if args.rate:
        return [{"rate": float(rate), "concurrency": None} for rate in args.rate.split(",")]
    return [{"rate": None, "concurrency": int(n)} for n in args.concurrency.split(",")]


def requests_for(level: dict[str, Any], args: argparse.Namespace) -> int:
    if args.requests:
        return args.requests
    if level["rate"] is not None:
        return max(16, round(level["rate"] * args.seconds))
    return max(args.least_requests, level["concurrency"] * args.requests_per_slot)


def cases(args: argparse.Namespace) -> list[tuple[str, dict[str, Any]]]:
    """(workload, level): all levels of a workload, or the one behind its "@". SystemExit for what is no level."""
    found: list[tuple[str, dict[str, Any]]] = []
    for asked in args.workload.split(","):
        workload, _, at = asked.partition("@")
        if not at:
            found += [(workload, level) for level in levels(args)]
        elif match := re.fullmatch(r"([1-9]\d*)|(\d+(?:\.\d+)?)/s", at):
            rate, concurrency = match[2] and float(match[2]), match[1] and int(match[1])
            found.append((workload, {"rate": rate, "concurrency": concurrency}))
        else:
            raise SystemExit(f"--workload {asked}: behind the @, expected requests at once (64) or a second (2.5/s)")
    return found


def sweep(
    drive: Any, vocabulary: int, args: argparse.Namespace, mode: str, deadline: float, keep: Keep
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    todo = cases(args)
    # As many at once as will be, so that every program has been recorded into its CUDA graph; the same in both modes.
    most = max([4, *(int(level["concurrency"] or 4) for _, level in todo)])
    warm = items_of(todo[0][0], most, vocabulary, args.range_ratio, 999)[:most]
    drive([Item(item.prompt, min(8, item.output)) for item in warm], concurrency=most, rate=None)
    for i, (workload, level) in enumerate(todo):
        facts = {"mode": mode, "workload": workload, **{k: v for k, v in level.items() if v is not None}}
        if time.monotonic() > deadline:
            rows.append(facts | {"skipped": "budget"})
            continue
        items = items_of(workload, requests_for(level, args), vocabulary, args.range_ratio, i)
        rows.append(facts | summarize(drive(items, **level)))
        print(json.dumps(rows[-1]), flush=True)
        keep(rows)
    return rows


def over_grpc(
    model: str, flags: list[str], args: argparse.Namespace, budget: float, keep: Keep
) -> list[dict[str, Any]]:
    from bench.load_client import drive
    from jqserve.client import Client

    with tempfile.TemporaryDirectory() as folder:
        served = Served(model, flags, Path(folder))
        try:
            with Client(served.target) as client:
                vocabulary = client.model_info().vocab_size

            def run(items: list[Item], **level: Any) -> Any:
                return drive(served.target, items, processes=args.clients, **level)

            rows = sweep(run, vocabulary, args, "grpc", time.monotonic() + budget, keep)
            return [row | {"start_seconds": served.start_seconds} for row in rows]
        finally:
            served.stop()


def in_process(model: str, flags: list[str], args: argparse.Namespace, budget: float) -> list[dict[str, Any]]:
    """In this process, which must not have touched jax before: what XLA reads from the environment is set here."""
    from jqserve.cli.server import parser, server_config
    from jqserve.engine.config import EngineConfig
    from jqserve.engine.process import prepare_xla

    args_of_server = parser().parse_args(["--model-path", model, *flags])
    config = prepare_xla(EngineConfig.from_json(server_config(args_of_server).engine))

    from bench.load_inprocess import drive
    from jqserve.engine.load import load_engine

    engine = load_engine(config)

    def run(items: list[Item], **level: Any) -> Any:
        before, began = engine.stats(), time.perf_counter()
        records = drive(engine, items, **level)
        after, seconds = engine.stats(), time.perf_counter() - began
        host = {k: (after.host_seconds[k] - before.host_seconds[k]) / seconds for k in after.host_seconds}
        print(json.dumps({"host_share": {k: round(v, 4) for k, v in host.items()}}), file=sys.stderr)
        return records

    extra = []
    if args.first_token:
        from bench.first_token import rows

        extra = rows(engine)
        print(json.dumps(extra), flush=True)
    return extra + sweep(run, engine.limits.vocab_size, args, "engine", time.monotonic() + budget, lambda _: None)


def with_costs(rows: list[dict[str, Any]]) -> None:
    """What gRPC costs, level by level."""
    level = lambda r: (r.get("workload"), r.get("concurrency"), r.get("rate"))  # noqa: E731
    bare = {level(r): r for r in rows if r["mode"] == "engine"}
    for row in rows:
        other = bare.get(level(row))
        if row["mode"] == "grpc" and other and {"output_tokens_per_second"} <= row.keys() & other.keys():
            share = row["output_tokens_per_second"] / other["output_tokens_per_second"]
            row["grpc_cost"] = round(1 - share, 4)


def picture(rows: list[dict[str, Any]], title: str) -> str:
    series: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row.get("tpot_ms"):
            name = ", ".join(filter(None, (row["mode"], row.get("workload"))))
            series.setdefault(name, []).append((row["tpot_ms"]["p50"], row["output_tokens_per_second"]))
    return chart(title, "time per output token, P50 (ms)", "output tokens/s", series)


def arguments() -> tuple[argparse.Namespace, list[str]]:
    own, flags = sys.argv[1:], []
    if "--" in own:
        own, flags = own[: own.index("--")], own[own.index("--") + 1 :]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scheme", default="fp8", help="a key of bench.llama8b.SCHEMES, for random weights")
    parser.add_argument("--model-path", help="a real checkpoint instead")
    parser.add_argument(
        "--workload", default="random:1000/1000", help="several, with commas; NAME@64 or NAME@2.5/s: at that level only"
    )
    parser.add_argument("--range-ratio", type=float, default=1.0, help="of random: lengths from ratio * length up")
    parser.add_argument("--concurrency", default="1,2,4,8,16,32,64,128,256,512", help="closed loop: levels")
    parser.add_argument("--rate", help="open loop instead: requests per second, several")
    parser.add_argument("--seconds", type=float, default=30, help="of an open-loop level")
    parser.add_argument("--requests", type=int, help="of a level; default: requests-per-slot times the concurrency")
    parser.add_argument("--requests-per-slot", type=int, default=4)
    parser.add_argument("--least-requests", type=int, default=8)
    parser.add_argument("--mode", default="grpc,engine")
    parser.add_argument("--clients", type=int, default=4, help="processes that send")
    parser.add_argument("--budget", type=float, default=600, help="seconds of load after which levels are skipped")
    parser.add_argument("--first-token", action="store_true", help="in engine mode rows of bench.first_token as well")
    parser.add_argument("--vllm", help="peer_vllm.json that bench.peer_vllm wrote on this machine just now")
    parser.add_argument("--quick", action="store_true", help="a tiny model and two levels: checks the script")
    parser.add_argument("--name", default="serve", help="of the result files")
    parser.add_argument("--out", help="folder of the result files (default bench/results)")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args(own)
    if args.quick:
        args.workload = "random:24/8" if args.workload == parser.get_default("workload") else args.workload
        args.concurrency, args.least_requests, args.requests_per_slot, args.clients = "2", 4, 2, 1
        flags = QUICK_FLAGS + flags
    return args, flags


def save(rows: list[dict[str, Any]], flags: list[str], args: argparse.Namespace) -> Path:
    """After every level, so that a run that is stopped keeps what it has."""
    from bench.record import write

    more = {"scheme": args.scheme, "model_path": args.model_path, "workload": args.workload, "server_flags": flags}
    more["peers"] = {w: peers(args.scheme, w, args.vllm) for w, _ in cases(args)}
    path = write(args.name, rows, args.out, **more)
    path.with_suffix(".svg").write_text(picture(rows, f"{args.scheme}, {args.workload}"))
    return path


def main() -> None:
    args, flags = arguments()
    if args.one:
        print("ROWS " + json.dumps(in_process(args.one, flags, args, args.budget)))
        return
    from bench.llama8b import QUICK, make_checkpoint

    cases(args)  # whether they make sense, before a server starts
    rows: list[dict[str, Any]] = []
    budget = args.budget * (0.5 if "engine" in args.mode and "grpc" in args.mode else 1)
    with tempfile.TemporaryDirectory() as folder:
        model = args.model_path
        if model is None:
            model = str(make_checkpoint(Path(folder) / args.scheme, args.scheme, **(QUICK if args.quick else {})))
            flags = ["--load-format", "dummy", *flags]
        if "grpc" in args.mode:
            rows += over_grpc(model, flags, args, budget, lambda found: save(found, flags, args))
        if "engine" in args.mode:
            own = sys.argv[1 : sys.argv.index("--")] if "--" in sys.argv else sys.argv[1:]
            command = [sys.executable, "-m", "bench.serve", *own, "--one", model, "--budget", f"{budget:.0f}"]
            command += ["--", *flags]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
            for line in done.stdout.splitlines():
                if line.startswith("ROWS "):
                    rows += json.loads(line[5:])
            if done.returncode:
                rows.append({"mode": "engine", "failed": done.returncode})
    with_costs(rows)
    path = save(rows, flags, args)
    print(path)
    if any("failed" in row and row["failed"] for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
