"""An evaluation for its readers: the rows of its table (what, the model's, the base's), and JSON."""

from __future__ import annotations

import json
import math
from typing import Any


def rows(result: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Only what was measured."""
    size, text, tasks = result["size"], result["text"], result["tasks"]
    base_scheme = result.get("base_scheme") or ""
    found = [("scheme", str(result["scheme"]), base_scheme), ("size, MiB", _mebi(size["model"]), _mebi(size["base"]))]
    if text:
        found.append(("perplexity", f"{text['perplexity']:.3f}", _number(text["base_perplexity"], ".3f")))
        if text["kl"] is not None:
            found.append(("KL to base, nats", f"{text['kl']:.5f}", "0"))
            found.append(("same most likely token", f"{text['top1_agreement']:.2%}", "100%"))
    if tasks:
        found.append(("task accuracy", f"{tasks['accuracy']:.1%}", _number(tasks["base_accuracy"], ".1%")))
        if len(tasks["by_kind"]) > 1:
            for kind, (right, count) in tasks["by_kind"].items():
                base = (tasks.get("base_by_kind") or {}).get(kind)
                found.append((f"  {kind}", f"{right} of {count}", f"{base[0]} of {base[1]}" if base else ""))
    if result["layers"]:
        worst = min(result["layers"], key=lambda layer: layer["own"])
        decibels = "exact" if worst["own"] >= 999 else f"{worst['own']:.1f}"
        found.append(("worst layer, dB", f"{decibels} (layer {worst['index']})", ""))
    if result["speed"]:
        speed = result["speed"]
        found.append(("tokens a second", _number(speed["model"], ",.0f"), _number(speed["base"], ",.0f")))
    return found


def as_json(result: dict[str, Any], indent: int | None = 1) -> str:
    """JSON has no NaN and no infinity, which a broken model's numbers may be: null."""
    return json.dumps(_finite(result), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _mebi(size: int | None) -> str:
    return "" if size is None else f"{size / 2**20:,.1f}"
