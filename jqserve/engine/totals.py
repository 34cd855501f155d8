"""The totals under a load plan, in words: what `jqserve plan` foretells, and the server prints when it has loaded."""

from __future__ import annotations

import resource
from typing import TYPE_CHECKING, Any

from jqserve.checkpoint.plan import LoadPlan
from jqserve.engine.buckets import Buckets
from jqserve.ops.device import KNOWN_DEVICES, Device

if TYPE_CHECKING:
    from jqserve.engine.engine import EngineCore  # plans are made without jax

#: Data-sheet memory in bytes (GB are 10^9) and bytes a second.
MEMORY: dict[str, tuple[float, float]] = {
    "h200": (141e9, 4.8e12),
    "h100": (80e9, 3.35e12),
    "a100": (80e9, 2.039e12),
    "l40s": (48e9, 0.864e12),
    "l4": (24e9, 0.3e12),
    "b200": (180e9, 8.0e12),
    "cpu": (16e9, 0.05e12),
}


def bucket_facts(buckets: Buckets, tile_size: int) -> dict[str, Any]:
    return {
        "decode": list(buckets.decode),
        "steps": buckets.steps,
        "steps_rows": buckets.decode[-1] if buckets.steps_rows is None else buckets.steps_rows,
        "mixed": [f"{b.decode_rows}+{b.tiles * tile_size}" for b in buckets.mixed],
    }


def bytes_read(plan: LoadPlan, weights: int) -> int:
    """Of `weights` bytes, by a step of one row: all but an embedding that is looked up only."""
    head = any(row.path == "lm_head" for row in plan.rows)
    return weights - (sum(row.bytes for row in plan.rows if row.path == "embed") if head else 0)


def peaks(device: Any) -> dict[str, int]:
    """The most bytes that this process has had at once, on jax's `device` (0: it does not tell) and on the host."""
    stats = device.memory_stats() or {}
    host = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"peak_device_bytes": int(stats.get("peak_bytes_in_use", 0)), "peak_host_bytes": host}


def measured(engine: EngineCore, plan: LoadPlan, device: Device, loading: dict[str, int]) -> dict[str, Any]:
    """The facts of a loaded engine, under the names of `jqserve plan --json`; `loading`: the `peaks` when its weights
    were there. Of an unknown device no data sheet is known."""
    runner, info = engine.runner, engine.model_info()
    name = next((name for name, known in KNOWN_DEVICES.items() if known.kind == device.kind), "")
    stats = runner.device.memory_stats() or {}
    memory, speed = MEMORY.get(name, (float(stats.get("bytes_limit", 0)), 0.0))
    weights = sum(leaf.nbytes for leaf in runner.leaves)
    read, kv = bytes_read(plan, weights), info["kv"]
    return {
        "device": {"name": name or device.kind, "memory_bytes": memory, "bytes_per_second": speed},
        "weight_bytes": weights,
        **loading,
        "kv_cache": {
            "dtype": kv["dtype"],
            "bytes_per_token": runner.cache_shape.page_bytes // runner.cache_shape.page_size,
            "tokens": kv["tokens"],
            "pages": kv["pages"],
            "scales": kv.get("scales", ""),
        },
        "read_bytes_per_step": read,
        "bound_tokens_per_second": speed / read,
        "buckets": bucket_facts(runner.buckets, runner.shape.tile_size),
    }


def lines(facts: dict[str, Any]) -> list[str]:
    """For people; what is not known (0, or not there) is left out."""
    gib, device, kv, buckets = 2**30, facts["device"], facts["kv_cache"], facts["buckets"]
    size, speed = device["memory_bytes"], device["bytes_per_second"]
    known = [f"{size / gib:.0f} GiB"] * bool(size) + [f"{speed / 1e12:.2f} TB/s"] * bool(speed)
    peaks = {"device": facts["peak_device_bytes"], "host": facts["peak_host_bytes"]}
    fit = f"{kv['tokens']:,} tokens fit"
    found = [
        f"on {device['name']}{f' ({", ".join(known)})' if known else ''}"
        + (f", tensor parallel {n}" if (n := facts.get("tp", {}).get("size", 1)) > 1 else ""),
        f"weights            {facts['weight_bytes'] / gib:9.3f} GiB",
        "peak while loading "
        + ", ".join(f"{value / gib:9.3f} GiB of the {of}" for of, value in peaks.items() if value),
        f"KV cache           {kv['bytes_per_token'] / 1024:9.2f} KiB a token in {kv['dtype']}"
        f"{f' ({kv["scales"]})' if kv['scales'] else ''}; "
        + (f"{fit} in {kv['pages']:,} pages" if "pages" in kv else f"about {fit} beside the weights"),
    ]
    if bound := facts["bound_tokens_per_second"]:
        found.append(
            f"bound              {bound:9.1f} tokens/s at batch 1: "
            f"{facts['read_bytes_per_step'] / gib:.3f} GiB of weights are read a step"
        )
    found.append(
        f"compile buckets    decode {', '.join(map(str, buckets['decode']))}"
        f"{f' (up to {buckets["steps_rows"]} also of {buckets["steps"]} steps)' if buckets['steps'] > 1 else ''}; "
        f"prefill {', '.join(buckets['mixed'])}"
    )
    return found
