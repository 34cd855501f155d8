"""A result file as a table of README, and where its figures come from."""

from __future__ import annotations

import json
from typing import Any

from bench.record import RESULTS


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
