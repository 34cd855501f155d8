"""README's table of kernels beside their peers."""

from __future__ import annotations

from typing import Any

from bench.bars import MATMUL_BARS, OF_W4A16, PEERS_OF
from bench.readme_table import load, source, table

_SHORT = {"bfloat16": "bf16", "float8_e4m3fn": "fp8"}

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


def w4a16_costs() -> str:
    """What other 4-bit formats take over symmetric groups of 128, timed in one run."""
    result = load("kernels_w4a16")
    if result is None:
        return "Not measured yet."
    sums = {(row["op"], row["m"]): row["us"] for row in result["sums"]}
    ms = sorted({m for op, m in sums if op == "w4a16"})
    lines = [["symmetric, groups of 128", *(f"{sums['w4a16', m]:,.1f} us" for m in ms)]]
    for op, label in OF_W4A16.items():
        known = [(sums.get((op, m)), sums["w4a16", m]) for m in ms]
        lines.append([label, *(f"{us / base - 1:+.0%}" if us else "-" for us, base in known)])
    return (
        f"{table(['four kernels, in a chain', *(f'M={m:,}' for m in ms)], lines)}\n\n{source(result, 'kernels_w4a16')}"
    )


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
