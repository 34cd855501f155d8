"""Writes README's tables from the result files, between its `bench:` markers; `--check` only compares.

python -m bench.readme [--check]
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.bars import MATMUL_BARS, PEERS_OF
from bench.record import RESULTS

README = Path(__file__).parent.parent / "README.md"


def load(name: str) -> dict[str, Any] | None:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def source(result: dict[str, Any], name: str) -> str:
    versions = result["versions"]
    return (
        f"{result['device']}, jax {versions.get('jax')}, commit {result['commit']}, {result['date'][:10]}; "
        f"`{result['command']}`, in [{name}.json](bench/results/{name}.json)."
    )


def start_line() -> str:
    """Load and generate, in process."""
    result = load("start_line")
    if result is None:
        return "Not measured yet."
    rows = []
    for row in result["rows"]:
        if "failed" in row:
            rows.append([row["case"], "failed", "", "", "", ""])
            continue
        cells = [row["case"], f"{row['weight_gib']:.2f}", f"{row['load_seconds']}", f"{row['peak_gib']}"]
        for key in sorted((k for k in row if k.startswith("batch_")), key=lambda k: int(k[6:])):
            measured = row[key]
            bound = measured["bound_step_ms"]
            share = f" ({bound / measured['step_ms']:.0%})" if bound else ""
            cells.append(f"{measured['decode_tokens_per_second']:,.0f}{share}")
        rows.append(cells)
    batches = [k[6:] for k in result["rows"][0] if k.startswith("batch_")]
    header = ["model", "weights GiB", "load s", "peak GiB", *(f"tokens/s at batch {b}" for b in batches)]
    return table(header, rows) + "\n\n" + source(result, "start_line")


_LABELS = {
    "w4a16": "4-bit weights, group 128",
    "fp8_row": "fp8 x fp8, per token x per channel",
    "fp8_block": "fp8 x fp8, 1x128 by 128x128 blocks",
    "int8_row": "int8 x int8, per token x per channel",
    "w8a16": "int8 weights, group 128",
}


def kernels() -> str:
    """The four products of a Llama-3.1-8B layer, summed; paged attention; each beside the best peer of the same run."""
    result = load("kernels")
    if result is None:
        return "Not measured yet."
    sums = {(row["op"], row["m"]): row for row in result["sums"]}
    ms = sorted({m for op, m in sums if op in MATMUL_BARS})
    lines = []
    for op, label in _LABELS.items():
        cells = [label]
        for m in ms:
            ours = sums.get((op, m))
            peers = [(sums[p, m]["us"], p) for p in {p for p, n in sums if n == m} if p.startswith(PEERS_OF[op])]
            cell = "-"
            if ours:
                cell = f"{ours['us']:,.0f}" + (f" / {ours['kernel_us']:,.0f}" if "kernel_us" in ours else "")
            if peers:
                us, name = min(peers)
                cell += f" ({us:,.0f} {name.split('_mm')[0].replace('_', ' ')})"
            cells.append(cell)
        lines.append(cells)
    bandwidth = (result.get("hbm_bytes_per_second") or 0) / 1e12
    text = table(
        ["us of four kernels: in a chain / their own by CUPTI (best peer, graph replay)", *(f"M={m:,}" for m in ms)],
        lines,
    )
    if result.get("note"):
        text += f"\n\n{result['note']}"
    return f"{text}\n\n{_attention(result['rows'])}\n\nMemory read at {bandwidth:.2f} TB/s. {source(result, 'kernels')}"


def _attention(rows: list[dict[str, Any]]) -> str:
    lines = []
    good = [row for row in rows if "us" in row and row.get("ok", True)]
    for row in good:
        if row["op"] == "prefill_attention" and not row.get("config"):
            same = [r for r in good if r["op"] == "peer" and r.get("kind") == row["kind"]]
            best = max(same, key=lambda r: r["tflops"], default=None)
            peer = f"{best['tflops']} {best['peer'].replace('_', ' ')}" if best else "-"
            name = f"prefill {row['context']:,}, {row['kind']}, {_SHORT[row['kv']]} pages"
            lines.append([name, f"{row['tflops']} TFLOP/s", peer])
        elif row["op"] == "decode_attention" and not row.get("config"):
            shape = (row["rows"], row["context"])
            same = [r for r in good if r["op"] == "peer" and (r.get("rows"), r.get("context")) == shape]
            best = min((r for r in same if "paged" in r["peer"]), key=lambda r: r["us"], default=None)
            peer = f"{best['us']:,.1f} {best['peer'].replace('_', ' ')}" if best and row["kv"] == "bfloat16" else "-"
            name = f"decode {row['rows']} x {row['context']:,}, {_SHORT[row['kv']]} pages"
            lines.append([name, f"{row['us']:,.1f} us", peer])
    return table(["paged attention, 32/8 heads of 128", "ours", "best peer"], lines)


def summary() -> str:
    """Decode at the first glance: a line per scheme, a column per batch, one step a dispatch."""
    result = load("decode")
    if result is None:
        return "Not measured yet."
    measured = [r for r in result["rows"] if "step_ms" in r and r["decode_steps"] == 1]
    rows = {(r["scheme"], r["batch"]): r for r in measured if r["vllm"]}  # other contexts and caches have no figure
    batches = sorted({batch for _, batch in rows})
    labels = {"bf16": "bf16", "fp8": "FP8 weights and activations", "w4a16": "4-bit weights, group 128"}
    lines = []
    for scheme, label in labels.items():
        found = [rows.get((scheme, batch)) for batch in batches]
        cells = [f"**{row['tokens_per_second']:,.0f}** ({row['vllm']:,})" if row else "-" for row in found]
        lines.append([label, *cells])
    header = [f"tokens/s, {result['device']} (vLLM 0.25.1)", *(f"batch {batch}" for batch in batches)]
    return table(header, lines)


DECODE_RESULTS = ("decode", "decode_steps2")


def decode() -> str:
    """Decode steps of the engine, in process: the rows of every file, then where each comes from."""
    found = {name: result for name in DECODE_RESULTS if (result := load(name)) is not None}
    if not found:
        return "Not measured yet."
    rows = [row for result in found.values() for row in _decode_rows(result)]
    header = ["weights", "KV", "sequences x context", "K", "tokens/s (vLLM 0.25.1)", "step ms", "its kernels ms"]
    header += ["kernels", "host ms", "of the bound"]
    return table(header, rows) + "\n\n" + "\n".join(source(result, name) for name, result in found.items())


def _decode_rows(result: dict[str, Any]) -> list[list[str]]:
    rows = []
    for row in result["rows"]:
        if "step_ms" not in row:
            continue
        peer = f" ({row['vllm']:,})" if row.get("vllm") else ""
        host = sum(row["host_ms"][phase] for phase in ("schedule", "launch", "emit"))
        share = row.get("share_of_bound")
        what = [row["scheme"], row["kv_dtype"], f"{row['batch']} x {row['context']:,}", str(row["decode_steps"])]
        times = [
            f"{row['step_ms']:.2f}",
            f"{row.get('kernel_ms', 0):.2f}",
            f"{row.get('kernels', 0):.0f}",
            f"{host:.2f}",
        ]
        rows.append([*what, f"{row['tokens_per_second']:,.0f}{peer}", *times, f"{share:.0%}" if share else ""])
    return rows


def startup() -> str:
    """From the command to the first token."""
    result = load("startup")
    if result is None:
        return "Not measured yet."
    phases = list(result["rows"][0]["phases"])
    rows = [
        [row["run"], *(f"{row['phases'][phase]:.1f}" for phase in phases), f"**{row['total']:.1f}**"]
        for row in result["rows"]
    ]
    return (
        table(["compile cache", *(p.replace("_", " ") for p in phases), "seconds"], rows)
        + "\n\n"
        + source(result, "startup")
    )


def plan_time() -> str:
    """How long a plan takes: one sentence."""
    result = load("plan_time")
    if result is None:
        return "Not measured yet."
    times = {row["case"]: row for row in result["rows"]}
    small, large = times["demo"], next(row for case, row in times.items() if case.startswith("8B shape, gptq"))
    tensors = large["case"].split(", ")[-1]
    took = [f"{row['wall_seconds']:.2f} s ({row['cpu_seconds']:.2f} of the processor)" for row in (small, large)]
    return (
        f"A plan imports no jax: it takes {took[0]} for the demo model, {took[1]} for a GPTQ checkpoint with an 8B "
        f"model's {tensors} (medians of {large['runs']} runs; the load of the {result['host_cores']} cores was "
        f"{result['load_average']:.1f}). {source(result, 'plan_time')}"
    )


SERVE_RESULTS = (
    "serve_h200", "serve_fp8_kv8", "serve_int4", "serve_bf16", "serve_128", "serve_128_512", "serve_128_768",
    "serve_2048", "serve_sweep", "serve_first", "serve",
)  # fmt: skip


def serve() -> str:
    """Throughput and latency of a loaded engine, and the first token of an idle one; H200 rows first."""
    header = ["GPU", "weights, KV", "path", "tokens in/out", "streams", "output tokens/s (vLLM 0.25.1, H200)"]
    header += ["TTFT ms P50 / P99", "TPOT ms P50 / P99"]
    rows, idle, sources = [], [], []
    for name in SERVE_RESULTS:
        result = load(name)
        if result is None:
            continue
        flags, gpu = result["server_flags"], result["device"].split()[1]
        kv = flags[flags.index("--kv-cache-dtype") + 1] if "--kv-cache-dtype" in flags else "bf16"
        for row in result["rows"]:
            if "output_tokens_per_second" not in row:
                continue
            peer = result["peers"].get(row["workload"], {}).get("vllm") if (gpu, kv) == ("H200", "bf16") else None
            beside = f" ({peer:,})" if peer else ""
            cells = [gpu, f"{result['scheme']}, {kv}", row["mode"], row["workload"], str(row["concurrency"])]
            cells.append(f"{row['output_tokens_per_second']:,.0f}{beside}")
            rows.append(cells + [f"{row[key]['p50']:.1f} / {row[key]['p99']:.1f}" for key in ("ttft_ms", "tpot_ms")])
        idle += [f"{gpu}: {line}" for line in _first_tokens(result["rows"])]
        sources.append(source(result, name))
    return "\n\n".join([table(header, rows), "\n".join(idle), "\n".join(sources)]) if rows else "Not measured yet."


def _first_tokens(rows: list[dict[str, Any]]) -> list[str]:
    lines = []
    for row in rows:
        if "ttft_to_prefill" in row:
            lines.append(
                f"An idle engine's first token of a {row['prompt']:,}-token prompt comes after "
                f"{row['ttft_ms']:.1f} ms, {row['ttft_to_prefill']:.2f} times its step programs alone."
            )
        elif "speedup" in row:
            lines.append(
                f"With {row['cached']:,} of {row['prompt']:,} prompt tokens cached it comes after "
                f"{row['ttft_ms']:.1f} ms instead of {row['ttft_ms_without']:.1f}."
            )
    return lines


def quantize_speed() -> str:
    """Time and memory of the quantizers at the 8B shape."""
    rows, sources = [], []
    for scheme in ("gptq", "awq"):
        result = load(f"quantize_llama8b_{scheme}")
        if result is None:
            continue
        *layers, total = result["rows"]
        stages = ", ".join(f"{name} {seconds:.1f}" for name, seconds in layers[-1]["stages"].items())
        rows.append(
            [
                scheme.upper(),
                f"{total['seconds'] / 60:.1f} min",
                f"{layers[0]['seconds']:.1f} s",
                f"{layers[-1]['seconds']:.1f} s ({stages})",
                f"{layers[-1]['matmul_share']:.0%}",
                f"{layers[-1]['peak_gib']:.1f} GiB",
            ]
        )
        sources.append(source(result, f"quantize_llama8b_{scheme}"))
    if not rows:
        return "Not measured yet."
    header = ["", "32 layers", "first (compiles)", "a further layer (stages, s)", "in matmuls", "peak on the device"]
    return "\n\n".join([table(header, rows), *sources])


_SHORT = {"bfloat16": "bf16", "float8_e4m3fn": "fp8"}


def support() -> str:
    """Which kernel a scheme takes on which device."""
    from bench.support import COLUMNS, support_rows

    return table(["scheme", *COLUMNS], support_rows())


def quantize_quality() -> str:
    """Our quantizers beside the peers'."""
    result = load("quantize_quality")
    if result is None:
        return "Not measured yet."
    header = ["weights alone", "made by", "perplexity", "KL to base", "tasks", "KL over the peer's"]
    rows = []
    for row in result["rows"]:
        maker = row["maker"].partition(":")[0]
        ratio = f"{row['kl_ratio']:.2f}" if "kl_ratio" in row else ""
        accuracy = f"{row['task_accuracy']:.1%}" if "task_accuracy" in row else ""
        rows.append([row["name"], maker, f"{row['perplexity']:.2f}", f"{row['kl']:.4f}", accuracy, ratio])
    return table(header, rows) + "\n\n" + source(result, "quantize_quality")


def host() -> str:
    """What the two processes need of the host, without a device; beside it, of the code that the tables above ran."""
    names = ("host_loop", "host_loop_before", "frontend_cpu", "frontend_cpu_before")
    found = {name: result for name in names if (result := load(name)) is not None}
    if len(found) < len(names):
        return "Not measured yet."
    loop, loop_before = ({r["rows"]: r for r in found[name]["rows"] if r["kind"] == "serve"} for name in names[:2])
    front, front_before = ({r["streams"]: r for r in found[name]["rows"] if "efficiency" in r} for name in names[2:])
    rows = [
        [
            str(count),
            f"{loop[count]['step_ms']:.1f} ({loop_before[count]['step_ms']:.1f})",
            f"{front[count]['core']:.0%} ({front_before[count]['core']:.0%})",
            f"{front[count]['tokens_per_second']:,.0f} ({front_before[count]['tokens_per_second']:,.0f})",
            f"{front[count]['tokens_per_message']:.1f} ({front_before[count]['tokens_per_message']:.1f})",
        ]
        for count in sorted(loop.keys() & front.keys())
    ]
    header = ["sequences", "engine's loop, ms a step (before)", "front end's core", "at tokens/s", "tokens a message"]
    return "\n\n".join([table(header, rows), *(source(result, name) for name, result in found.items())])


def online_schemes() -> str:
    """What each scheme costs in quality that is made while loading."""
    result = load("online_schemes")
    if result is None:
        return "Not measured yet."
    header = ["`--quantization`", "perplexity", "KL to bf16", "same first choice", "tasks", "of the base's"]
    header += ["lost, won", "MiB"]
    names: dict[tuple[str, ...], list[str]] = {}  # two names of one scheme share a line
    for row in result["rows"]:
        cells = [f"{row['perplexity']:.2f}", f"{row['kl']:.4f}", f"{row['top1_agree']:.1%}"]
        if "task_accuracy" in row:
            cells += [f"{row['task_accuracy']:.1%}", f"{row['task_recovery']:.1%}"]
            cells.append(f"{row['tasks_lost']}, {row['tasks_won']}")
        else:
            cells += ["", "", ""]
        cells.append(f"{row['weight_bytes'] / 2**20:.1f}")
        name = row["scheme"].replace("torchao:", "`--torchao-config` ")
        names.setdefault(tuple(cells), []).append(name)
    rows = [[", ".join(which), *cells] for cells, which in names.items()]
    tasks = f"{result['tasks']:,} tasks; lost: right unquantized and wrong here, won: the other way round."
    return f"{table(header, rows)}\n\n{tasks} {source(result, 'online_schemes')}"


def load_peak() -> str:
    """Device and host memory while quantizing online."""
    rows, sources = [], []
    for name in ("load_peak", "load_peak_more", "load_peak_torchao", "load_peak_capped"):
        result = load(name)
        if result is None:
            continue
        capped = re.search(r"--mem-fraction (\S+)", result["command"])
        memory = f"{float(capped[1]):.0%}" if capped else "all"
        for row in result["rows"]:
            allowed = row["two_largest_modules_bytes"] + row.get("calibration_bytes", 0)
            device = (row["final_bytes"], row["peak_device_bytes"], row["over_final_bytes"], allowed)
            gib = [f"{size / 2**30:.2f}" for size in (*device, row["host_peak_bytes"])]
            scheme = row["scheme"] + " (4 layers)" * (row["scheme"] in ("awq", "gptq"))
            rows.append([scheme, memory, *gib])
        sources.append(source(result, name))
    if not rows:
        return "Not measured yet."
    header = ["--quantization", "of the GPU's memory", "final GiB", "peak", "over the final", "allowed", "host peak"]
    return table(header, rows) + "\n\n" + "\n".join(sources)


def constrained() -> str:
    """What grammar masks cost a decode step."""
    result = load("constrained")
    if result is None:
        return "Not measured yet."
    rows = []
    for row in result["rows"]:
        cost = "" if row["kind"] == "plain" else f"{row['cost_percent']:.1f}% ({row['median_cost_percent']:.1f}%)"
        cells = [row["scheme"], f"{row['context']:,}", row["kind"], f"{row['rate']:,.0f}"]
        rows.append([*cells, cost, f"{row['host_ms']['mask']:.1f}", f"{row['host_ms']['dispatch']:.1f}"])
    header = ["weights", "context", f"of {result['batch']} rows with a grammar", "tokens/s", "cost (of the medians)"]
    header += ["masks, host ms", "launches, ms"]
    return f"{table(header, rows)}\n\n{source(result, 'constrained')}"


TABLES: dict[str, Callable[[], str]] = {
    "constrained": constrained,
    "summary": summary,
    "quantize_quality": quantize_quality,
    "online_schemes": online_schemes,
    "host": host,
    "support": support,
    "plan_time": plan_time,
    "start_line": start_line,
    "decode": decode,
    "serve": serve,
    "quantize_speed": quantize_speed,
    "startup": startup,
    "load_peak": load_peak,
    "kernels": kernels,
}


def rendered(text: str) -> str:
    """`text` with what stands between `<!-- bench:NAME -->` and `<!-- /bench -->` made anew."""

    def fill(match: re.Match[str]) -> str:
        return f"<!-- bench:{match[1]} -->\n{TABLES[match[1]]()}\n<!-- /bench -->"

    return re.sub(r"<!-- bench:(\w+) -->\n.*?<!-- /bench -->", fill, text, flags=re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit 1 when README differs from the result files")
    args = parser.parse_args()
    text = README.read_text()
    wanted = rendered(text)
    if args.check and wanted != text:
        sys.exit("README.md's tables differ from bench/results; run: python -m bench.readme")
    if not args.check:
        README.write_text(wanted)


if __name__ == "__main__":
    main()
