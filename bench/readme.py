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


TABLES: dict[str, Callable[[], str]] = {"start_line": start_line}


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
