"""A line chart as SVG, by hand: no plotting library is needed to look at a result."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 720, 440, 80, 60, 40, 20
COLORS = ("#1b6ca8", "#c0392b", "#27804b", "#8e44ad", "#b9770e", "#34495e")

Points = Sequence[tuple[float, float]]


def ticks(low: float, high: float, wanted: int = 6) -> list[float]:
    """Round numbers that cover [low, high]."""
    span = max(high - low, 1e-12)
    step = 10 ** math.floor(math.log10(span / wanted))
    step *= next(m for m in (1, 2, 5, 10) if span / (step * m) <= wanted)
    first = math.floor(low / step)
    return [step * i for i in range(first, math.ceil(high / step) + 1)]


def chart(title: str, x_label: str, y_label: str, series: Mapping[str, Points]) -> str:
    """The SVG text of one chart; each series a line with dots, both axes linear."""
    everything = [point for points in series.values() for point in points] or [(0.0, 0.0)]
    xs, ys = ticks(0, max(x for x, _ in everything)), ticks(0, max(y for _, y in everything))
    width, height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def at(x: float, y: float) -> tuple[float, float]:
        return LEFT + width * x / (xs[-1] or 1), TOP + height * (1 - y / (ys[-1] or 1))

    box = f'viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {box}>',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="24" font-size="15">{html.escape(title)}</text>',
        f'<text x="{LEFT + width / 2}" y="{HEIGHT - 16}" text-anchor="middle">{html.escape(x_label)}</text>',
        f'<text transform="translate(18 {TOP + height / 2}) rotate(-90)" text-anchor="middle">'
        f"{html.escape(y_label)}</text>",
    ]
    for x in xs:
        px, py = at(x, 0)
        parts.append(f'<line x1="{px:.1f}" y1="{TOP}" x2="{px:.1f}" y2="{py:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{px:.1f}" y="{py + 16:.1f}" text-anchor="middle">{x:g}</text>')
    for y in ys:
        px, py = at(0, y)
        parts.append(f'<line x1="{px:.1f}" y1="{py:.1f}" x2="{WIDTH - RIGHT}" y2="{py:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{px - 6:.1f}" y="{py + 4:.1f}" text-anchor="end">{y:g}</text>')
    for i, (name, points) in enumerate(series.items()):
        color = COLORS[i % len(COLORS)]
        places = [at(x, y) for x, y in points]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}"/>' for x, y in places]
        label = f'<text x="{WIDTH - RIGHT - 8}" y="{TOP + 16 + 16 * i}" text-anchor="end" fill="{color}">'
        parts.append(f"{label}{html.escape(name)}</text>")
    return "\n".join([*parts, "</svg>"]) + "\n"
