"""`jqserve plan`: what would become of every module, and whether it fits, from headers alone and without a device."""

from __future__ import annotations

import argparse
import json
from typing import Any

DEVICES = ("h200", "h100", "a100", "l40s", "l4", "b200", "cpu")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from jqserve.cli.scheme_flags import add_scheme_flags

    add = parser.add_argument
    add("model", nargs="?", metavar="MODEL", help="a checkpoint directory, .gguf file or Hub id (or --model-path)")
    add("--model-path", metavar="MODEL")
    add("--revision", help="of a Hub id")
    add_scheme_flags(parser)
    add("--dtype", default="auto", help="of activations and unquantized weights")
    add("--activations", choices=("config", "none"), default="config", help="none: leave activations unquantized")
    add("--kv-cache-dtype", "--kv-dtype", default="auto", help="of the KV cache: auto, bf16, fp8_e4m3, fp8_e5m2")
    add("--context-length", type=int, metavar="TOKENS", help="of prompt and answer together")
    add("--max-running-requests", type=int, metavar="N", help="sequences that run at once")
    add("--chunked-prefill-size", type=int, metavar="TOKENS", help="most prompt tokens in one step")
    add("--mem-fraction-static", type=float, default=0.88, metavar="F", help="share of GPU memory for weights and KV")
    add("--page-size", type=int, metavar="TOKENS", help="of a KV page")
    add("--tp", "--tensor-parallel-size", type=int, default=1, metavar="N", help="GPUs to split the weights over")
    add("--device", choices=DEVICES, default="h200", help="the GPU to plan for")
    add("--json", action="store_true", help="one JSON object")


def run(args: argparse.Namespace) -> int:
    from jqserve.cli.plan_report import report
    from jqserve.errors import UnsupportedError

    if (args.model is None) == (args.model_path is None):
        raise UnsupportedError("jqserve plan takes one model: MODEL or --model-path MODEL")
    plan, facts = report(args)
    if args.json:
        print(json.dumps({**plan.to_json(), **facts}, indent=1))
        return 0
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=220)
    console.print(plan.to_table())
    for line in lines(facts):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    return 0


def lines(facts: dict[str, Any]) -> list[str]:
    """The totals in words."""
    gib, device, kv = 2**30, facts["device"], facts["kv_cache"]
    found = [
        f"on {device['name']} ({device['memory_bytes'] / gib:.0f} GiB, {device['bytes_per_second'] / 1e12:.2f} TB/s)"
        + (f", tensor parallel {facts['tp']['size']}" if facts["tp"]["size"] > 1 else ""),
        f"weights            {facts['weight_bytes'] / gib:9.3f} GiB",
        f"peak while loading {facts['peak_device_bytes'] / gib:9.3f} GiB of the device, "
        f"{facts['peak_host_bytes'] / gib:.3f} GiB of the host",
        f"KV cache           {kv['bytes_per_token'] / 1024:9.2f} KiB a token in {kv['dtype']}"
        f"{f' ({kv["scales"]})' if kv['scales'] else ''}; "
        f"about {kv['tokens']:,} tokens fit beside the weights",
        f"bound              {facts['bound_tokens_per_second']:9.1f} tokens/s at batch 1: "
        f"{facts['read_bytes_per_step'] / gib:.3f} GiB of weights are read a step",
        f"compile buckets    decode {', '.join(map(str, facts['buckets']['decode']))}; "
        f"prefill {', '.join(facts['buckets']['mixed'])}",
    ]
    if facts["tp"]["size"] > 1:
        found.append(f"per GPU            {facts['tp']['bytes_per_gpu'] / gib:9.3f} GiB of weights")
    found += [f"unquantized: {name}: {reason}" for name, reason in facts["unquantized"].items()]
    return found + [f"warning: {warning}" for warning in facts["warnings"]]
