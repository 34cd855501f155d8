"""README's tables of the engine: decode steps, serving, start-up."""

from __future__ import annotations

from typing import Any

from bench.readme_table import load, source, table


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


def summary() -> str:
    """Decode at the first glance: a line per scheme, a column per batch, as many steps a dispatch as by default."""
    found = [result for name in DECODE_RESULTS if (result := load(name)) is not None]
    if not found:
        return "Not measured yet."
    rows: dict[tuple[str, int], dict[str, Any]] = {}  # of the first file that has one
    for result in found:
        known = [r for r in result["rows"] if r.get("vllm")]  # other contexts and caches have no figure to set beside
        for row in sorted(known, key=lambda r: r["decode_steps"] != (2 if r["batch"] <= 8 else 1)):
            rows.setdefault((row["scheme"], row["batch"]), row)
    batches = sorted({batch for _, batch in rows if batch in (1, 64, 256)})
    labels = {"bf16": "bf16", "fp8": "FP8 weights and activations", "w4a16": "4-bit weights, group 128"}
    lines = []
    for scheme, label in labels.items():
        mine = [rows.get((scheme, batch)) for batch in batches]
        cells = [f"**{row['tokens_per_second']:,.0f}** ({_peer(row)})" if row else "-" for row in mine]
        lines.append([label, *cells])
    header = [f"tokens/s, {found[0]['device']} (vLLM 0.25.1)", *(f"batch {batch}" for batch in batches)]
    return table(header, lines)


def _peer(row: dict[str, Any]) -> str:
    """vLLM's figure; our ratio to it only where both were measured in the same run."""
    ratio = f": {row['tokens_per_second'] / row['vllm']:.2f} x" if row.get("vllm_beside") else ""
    return f"{row['vllm']:,.0f}{ratio}"


DECODE_RESULTS = ("decode", "decode_steps4", "decode_steps2")


def decode() -> str:
    """Decode steps of the engine, in process: each case from the newest file that has it, then the files."""
    found = {name: result for name in DECODE_RESULTS if (result := load(name)) is not None}
    if not found:
        return "Not measured yet."
    shown: set[tuple[Any, ...]] = set()
    rows = [row for result in found.values() for row in _decode_rows(result, shown)]
    header = ["weights", "KV", "sequences x context", "K", "tokens/s (vLLM 0.25.1)", "step ms", "its kernels ms"]
    header += ["kernels", "host ms", "of the bound"]
    return table(header, rows) + "\n\n" + "\n".join(source(result, name) for name, result in found.items())


def _decode_rows(result: dict[str, Any], shown: set[tuple[Any, ...]]) -> list[list[str]]:
    """The rows that no file before has shown."""
    rows = []
    for row in result["rows"]:
        case = tuple(row.get(key) for key in ("scheme", "kv_dtype", "batch", "context", "decode_steps"))
        if "step_ms" not in row or case in shown:
            continue
        shown.add(case)
        peer = f" ({_peer(row)})" if row.get("vllm") else ""
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


#: What a decode step's kernels do, by a part of their names (4-bit ones were called "body" until 2026-11-28).
KERNEL_KINDS = {
    "matmuls of the layers": ("scaled_matmul", "body_mosaic", "a16_"),
    "attention": ("paged_decode",),
    "the head, bf16 by cuBLAS": ("nvjet", "gemm"),
    "residual + norm (+ quantize)": ("residual_norm",),
    "rotary embedding + KV write": ("rope_write",),
    "SiLU x up (+ quantize)": ("quantize_silu",),
    "quantize (attention's output)": ("quantize_rows",),
}


def decode_kernels() -> str:
    """Where a quantized decode step's time goes: a line per kind of kernel, ms and share by scheme and batch."""
    result = load("decode")
    steps = (
        [r for r in result["rows"] if r.get("decode_steps") == 1 and r["scheme"] in ("fp8", "w4a16")] if result else []
    )
    if result is None or not steps:
        return "Not measured yet."
    lines = []
    for kind, names in KERNEL_KINDS.items():
        cells = []
        for row in steps:
            mine = [k for k in row["costliest"] if any(name in k["kernel"] for name in names)]
            ms, count = sum(k["us"] for k in mine) / 1000, sum(k["launches"] for k in mine)
            cells.append(f"{ms:.2f} ({ms / row['kernel_ms']:.0%}, {count:.0f})" if mine else "")
        lines.append([kind, *cells])
    known = [name for names in KERNEL_KINDS.values() for name in names]
    rest = [
        r["kernel_ms"] - sum(k["us"] for k in r["costliest"] if any(n in k["kernel"] for n in known)) / 1000
        for r in steps
    ]
    lines.append(["the rest", *(f"{ms:.2f} ({ms / row['kernel_ms']:.0%})" for ms, row in zip(rest, steps))])
    header = ["ms (share, kernels)", *(f"{r['scheme']}, {r['batch']} x {r['context']:,}" for r in steps)]
    return table(header, lines) + "\n\n" + source(result, "decode")


def step_gaps() -> str:
    """Idle time of the GPU between two dispatches: a line per scheme and K, a column per batch."""
    result = load("step_gaps")
    if result is None:
        return "Not measured yet."
    points = list(dict.fromkeys((row["batch"], row["context"]) for row in result["rows"]))
    found = {(row["scheme"], row["decode_steps"], row["batch"], row["context"]): row for row in result["rows"]}
    lines = []
    for scheme, k in dict.fromkeys((row["scheme"], row["decode_steps"]) for row in result["rows"]):
        mine = [found.get((scheme, k, *point)) for point in points]
        cells = [f"{row['between_us']:.0f} ({row['between_share']:.1%})" if row else "-" for row in mine]
        lines.append([scheme, str(k), *cells])
    header = ["us (share of a dispatch)", "K", *(f"{batch} x {context:,}" for batch, context in points)]
    return table(header, lines) + "\n\n" + source(result, "step_gaps")


def sampling() -> str:
    """What a draw costs by batch: a line per way, microseconds by wall clock."""
    result = load("sampling")
    if result is None:
        return "Not measured yet."
    timed = {(row["way"], row["rows"]): row["us"] for row in result["rows"] if "us" in row}
    batches = sorted({rows for _, rows in timed})
    ways = list(dict.fromkeys(way for way, _ in timed))
    lines = [[way, *(f"{timed[way, n]:,.0f}" if (way, n) in timed else "-" for n in batches)] for way in ways]
    return table(["us", *(f"{n} rows" for n in batches)], lines) + "\n\n" + source(result, "sampling")


def startup() -> str:
    """From the command to the first token."""
    found = {name: result for name in ("startup", "startup_before") if (result := load(name)) is not None}
    if not found:
        return "Not measured yet."
    phases = list(next(iter(found.values()))["rows"][0]["phases"])
    rows = []
    for result in found.values():
        for row in result["rows"]:
            name = row["run"] + (f", {result['note']}" if "note" in result and row["run"] == "cold" else "")
            rows.append([name, *(f"{row['phases'][phase]:.1f}" for phase in phases), f"**{row['total']:.1f}**"])
    header = ["compile cache", *(p.replace("_", " ") for p in phases), "seconds"]
    return table(header, rows) + "\n\n" + "\n".join(source(result, name) for name, result in found.items())


SERVE_RESULTS = (
    "serve_beside", "serve_h200", "serve_fp8_kv8", "serve_int4", "serve_bf16", "serve_128", "serve_128_512",
    "serve_128_768", "serve_2048", "serve_sweep", "serve_first",
)  # fmt: skip


def serve() -> str:
    """Throughput and latency of a loaded engine, and the first token of an idle one."""
    header = ["GPU", "weights, KV", "path", "tokens in/out", "streams", "output tokens/s (vLLM 0.25.1, H200)"]
    header += ["TTFT ms P50 / P99", "TPOT ms P50 / P99", "ITL ms P50 / P99"]
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
            known = result["peers"].get(row["workload"]) or {}
            beside = ""
            if "vllm" in known and (gpu, kv) == ("H200", "bf16"):
                ours = {"tokens_per_second": row["output_tokens_per_second"], "vllm_beside": known.get("beside")}
                beside = f" ({_peer(ours | {'vllm': known['vllm']})})"
            elif "trtllm_fp8_kv" in known and gpu == "H200" and kv.startswith("fp8"):
                beside = f" (TensorRT-LLM {known['trtllm_fp8_kv']:,})"
            streams = str(row["concurrency"]) if "concurrency" in row else f"{row['rate']:g} requests/s"
            cells = [gpu, f"{result['scheme']}, {kv}", row["mode"], row["workload"], streams]
            cells.append(f"{row['output_tokens_per_second']:,.0f}{beside}")
            latencies = (row["ttft_ms"], row["tpot_ms"], row["itl_ms"])
            rows.append(cells + [f"{one['p50']:.1f} / {one['p99']:.1f}" for one in latencies])
        idle += [f"{gpu}: {line}" for line in _grpc_costs(result["rows"])]
        idle += [f"{gpu}: {line}" for line in _first_tokens(result["rows"])]
        sources.append(source(result, name))
    return "\n\n".join([table(header, rows), "\n".join(idle), "\n".join(sources)]) if rows else "Not measured yet."


def _grpc_costs(rows: list[dict[str, Any]]) -> list[str]:
    """What the front end costs: the same load over gRPC and on the bare engine, one after the other."""
    return [
        f"Over gRPC {row['workload']} at {row['concurrency']} streams gives {abs(row['grpc_cost']):.1%} "
        f"{'fewer' if row['grpc_cost'] > 0 else 'more'} output tokens than on the engine alone."
        for row in rows
        if "grpc_cost" in row
    ]


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
