"""One self-contained HTML page of an evaluation: tables and inline SVG."""

from __future__ import annotations

import html
import math
from typing import Any

from jqserve.evaluate.summary import as_json, rows
from jqserve.evaluate.svg import COLOURS, Axes, legend

STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:860px;margin:2rem auto;padding:0 1rem;color:#1b1f24;background:#fff}
h1{font-size:1.4rem}h2{font-size:1.1rem;margin-top:2rem}table{border-collapse:collapse;width:100%}
td,th{padding:.3rem .6rem;border-bottom:1px solid #d8dee4;text-align:right}
td:first-child,th:first-child{text-align:left}
svg{width:100%;height:auto;font:11px system-ui,sans-serif}.grid{stroke:#e4e8ec}.legend span{margin-right:1rem}
.pass,.fail{padding:.6rem 1rem;border-radius:6px;font-weight:600}.pass{background:#e3f4e6}.fail{background:#fbe4e1}
.small{color:#5b6570;font-size:.85rem}
@media(prefers-color-scheme:dark){body{background:#15191e;color:#e3e7ec}.pass{background:#17402a}.fail{background:#54221c}
.grid{stroke:#2b323a}text{fill:#c8d0d8}td,th{border-color:#2b323a}}
""".strip()


def page(result: dict[str, Any]) -> str:
    """The page; `result` of `run.evaluate` is in it as JSON too."""
    verdict = result["verdict"]
    made = result["made"]
    body = [
        f"<h1>{html.escape(str(result['model']))}</h1>",
        f"<p class='{'pass' if verdict['passed'] else 'fail'}'>{html.escape(verdict['line'])}</p>",
        *(f"<p class='fail'>{html.escape(warning)}</p>" for warning in result.get("warnings", ())),
        _table(result),
    ]
    for title, plot, words in (
        ("Error by layer", _layers(result), "Signal to error in dB; higher is better. Own: what the layer adds, given "
         "the base's input. Accumulated: the residual stream after it."),
        ("Error by Linear", _linears(result), "Signal to error of the weights in dB, folded scales taken back."),
        ("KL divergence by position", _positions(result), "KL(base || model) in nats, mean over windows, smoothed."),
        ("Accuracy by task", _tasks(result), "Share of exact answers."),
        ("Size, speed, quality", _chart(result), "Size on disk against what is lost; a larger disc is faster."),
    ):  # fmt: skip
        if plot:
            body.append(f"<h2>{title}</h2><p class='small'>{words}</p>{plot}")
    body.append(
        f"<p class='small'>jqserve {made['jqserve']}, jax {made['jax']}, {html.escape(made['device'])}, "
        f"{made['date']}</p>"
    )
    data = as_json(result, None).replace("<", "\\u003c")
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width,initial-scale=1'>"
        f"<title>jqserve eval: {html.escape(str(result['model']))}</title><style>{STYLE}</style></head>"
        f"<body>{''.join(body)}<script type='application/json' id='result'>{data}</script></body></html>\n"
    )


def _table(result: dict[str, Any]) -> str:
    cells = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{html.escape(own)}</td><td>{html.escape(base)}</td></tr>"
        for name, own, base in rows(result)
    )
    return f"<table><tr><th></th><th>model</th><th>base</th></tr>{cells}</table>"


def _layers(result: dict[str, Any]) -> str:
    layers = result["layers"]
    if not layers:
        return ""
    series = {key: [min(layer[key], 80.0) for layer in layers] for key in ("own", "accumulated")}
    xs = [layer["index"] for layer in layers]
    every = [value for values in series.values() for value in values]
    axes = Axes((0, max(xs)), (min(0.0, *every), max(every)), "layer", "dB")
    for colour, (name, values) in zip(COLOURS, series.items()):
        axes.line(xs, values, colour, name)
    return axes.svg("Error by layer") + legend(list(series))


def _linears(result: dict[str, Any]) -> str:
    layers = result["layers"]
    if not layers:
        return ""
    names = list(layers[0]["weights"])
    series = {name: [min(layer["weights"][name], 80.0) for layer in layers] for name in names}
    xs = [layer["index"] for layer in layers]
    every = [value for values in series.values() for value in values]
    axes = Axes((0, max(xs)), (min(every), max(every)), "layer", "dB")
    for colour, name in zip(COLOURS, names):
        axes.line(xs, series[name], colour, name)
    return axes.svg("Error by Linear") + legend(names)


def _positions(result: dict[str, Any]) -> str:
    kl = (result["text"] or {}).get("kl_by_position")
    if not kl or not all(map(math.isfinite, kl)):
        return ""
    width = max(1, len(kl) // 64)
    means = [sum(kl[i : i + width]) / len(kl[i : i + width]) for i in range(0, len(kl), width)]
    xs = [i * width + 1.0 for i in range(len(means))]
    axes = Axes((0, len(kl)), (0, max(means)), "position in the window", "nats")
    axes.line(xs, means, COLOURS[0], "KL")
    return axes.svg("KL divergence by position")


def _tasks(result: dict[str, Any]) -> str:
    tasks = result["tasks"]
    if not tasks:
        return ""
    kinds = list(tasks["by_kind"])
    axes = Axes((-0.6, len(kinds) - 0.4), (0, 1), "", "accuracy")
    sides = [("by_kind", "model"), ("base_by_kind", "base")] if tasks.get("base_by_kind") else [("by_kind", "model")]
    for i, (key, name) in enumerate(sides):
        for j, kind in enumerate(kinds):
            right, count = tasks[key].get(kind, (0, 1))
            x = j + (i - (len(sides) - 1) / 2) * 0.36
            axes.bar(x, 0.34, right / count, COLOURS[i], f"{name}, {kind}: {right} of {count}")
    return axes.svg("Accuracy by task", kinds) + legend([name for _, name in sides])


def _chart(result: dict[str, Any]) -> str:
    size, text = result["size"], result["text"]
    if not size["base"] or not text or text["kl"] is None or not math.isfinite(text["kl"]):
        return ""
    speed = result["speed"] or {}
    fastest = max([value for value in speed.values() if value] or [1.0])
    axes = Axes((0, size["base"] * 1.15 / 2**20), (-0.15 * text["kl"], text["kl"] * 1.4), "MiB", "KL to base, nats")
    for colour, key, kl in ((COLOURS[0], "model", text["kl"]), (COLOURS[1], "base", 0.0)):
        rate = speed.get(key)
        note = f", {rate:,.0f} tokens/s" if rate else ""
        radius = 5 + 7 * (rate / fastest if rate else 0)
        axes.point(size[key] / 2**20, kl, radius, colour, f"{key}: {size[key] / 2**20:,.1f} MiB{note}")
    return axes.svg("Size, speed, quality")
