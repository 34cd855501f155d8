"""Writes README's tables from the result files, between its `bench:` markers; `--check` only compares.

python -m bench.readme [--check]
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path

from bench.readme_kernels import kernels, w4a16_costs
from bench.readme_serving import decode, decode_kernels, sampling, serve, start_line, startup, step_gaps, summary
from bench.readme_table import load, source, table

README = Path(__file__).parent.parent / "README.md"


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
    return "\n\n".join([table(header, rows), *_differences(), source(result, "quantize_quality")])


def _differences() -> list[str]:
    """How sure the perplexities' order is."""
    result = load("quantize_differences")
    if result is None:
        return []
    each = [f"{row['name']} {1000 * row['nats']:+.1f} +- {1000 * row['standard_error']:.1f}" for row in result["rows"]]
    text = (
        "Of the perplexities, the difference of ours to the peer's on the same windows, thousandths of a nat a token "
    )
    return [f"{text}(mean +- standard error): {'; '.join(each)}. {source(result, 'quantize_differences')}"]


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
    rows: dict[tuple[str, str], list[str]] = {}
    sources = []
    for name in (
        "load_peak",
        "load_peak_more",
        "load_peak_torchao",
        "load_peak_capped",
        "load_peak_gptq",
        "load_peak_awq",
    ):
        result = load(name)
        if result is None:
            continue
        memory = f"{result['mem_fraction']:.0%}" if result["mem_fraction"] else "all"
        for row in result["rows"]:
            device = [row[f"{key}_bytes"] for key in ("final", "peak_device", "over_final", "two_largest_modules")]
            gib = [f"{size / 2**30:.2f}" for size in (*device, row["host_peak_bytes"])]
            if name == "load_peak_more" and row["scheme"] in ("awq", "gptq"):
                continue  # four layers, placed as soon as calibrated, which is no longer done; measured again since
            rows[row["scheme"], memory] = [row["scheme"], memory, *gib]
        sources.append(source(result, name))
    if not rows:
        return "Not measured yet."
    header = ["--quantization", "of the GPU's memory", "final GiB", "peak", "over the final", "allowed", "host peak"]
    return table(header, list(rows.values())) + "\n\n" + "\n".join(sources)


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
    "decode_kernels": decode_kernels,
    "step_gaps": step_gaps,
    "serve": serve,
    "quantize_speed": quantize_speed,
    "startup": startup,
    "sampling": sampling,
    "load_peak": load_peak,
    "kernels": kernels,
    "w4a16_costs": w4a16_costs,
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
