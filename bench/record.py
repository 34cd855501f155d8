"""The frame of every result file: what ran, on which device, with which versions, from which commit."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
VERSIONS = (
    "jax",
    "jaxlib",
    "jax-cuda13-plugin",
    "jax-cuda12-plugin",
    "flax",
    "numpy",
    "transformers",
    "grpcio",
    "torch",
)


def commit() -> str:
    """The commit measured; JQSERVE_COMMIT where the tree travels without its .git (a rented GPU machine)."""
    if named := os.environ.get("JQSERVE_COMMIT"):
        return named
    git = ["git", "-C", str(Path(__file__).parent)]
    done = subprocess.run([*git, "describe", "--always", "--dirty", "--abbrev=12"], capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in VERSIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def frame() -> dict[str, Any]:
    """Device, driver, versions, commit, command, date; imports jax, so call it after the environment is set."""
    import jax

    device = jax.devices()[0]
    driver = ""
    if device.platform == "gpu":
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    return {
        "device": device.device_kind,
        "driver": driver,
        "host_cores": os.cpu_count(),
        "versions": versions(),
        "commit": commit(),
        "command": shlex.join([Path(sys.executable).name, *sys.orig_argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def write(name: str, rows: list[dict[str, Any]], out: str | Path | None = None, **more: Any) -> Path:
    """Writes `<out or bench/results>/<name>.json`, whole or not at all; returns its path."""
    folder = Path(out) if out else RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    partial = path.with_suffix(".json.partial")
    partial.write_text(json.dumps({**frame(), **more, "rows": rows}, indent=1) + "\n")
    partial.replace(path)
    return path


def rows_of_this_commit(name: str, out: str | Path | None = None) -> list[dict[str, Any]]:
    """The rows of `<out or bench/results>/<name>.json` where it was written at the commit that is checked out now and
    nothing has changed since; else none."""
    path = (Path(out) if out else RESULTS) / f"{name}.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    here = commit()
    own = found.get("commit") == here and not here.endswith("-dirty") and here != "unknown"
    return list(found["rows"]) if own else []
