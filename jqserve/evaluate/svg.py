"""Plots as inline SVG: lines, bars and labelled points; no script, no network."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

WIDTH, HEIGHT = 640, 260
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 14, 40
COLOURS = ("#1f5fa8", "#c2571a", "#3d8a4f", "#8a4fa0", "#806a1f", "#4a4a4a", "#b03060")


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers in low .. high, about `count` of them."""
    if not high > low:
        high = low + (abs(low) or 1.0)
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


class Axes:
    """A frame with two linear axes. Text comes out escaped."""

    def __init__(self, x: tuple[float, float], y: tuple[float, float], x_label: str, y_label: str) -> None:
        self._x, self._y = _widened(*x), _widened(*y)
        self._marks: list[str] = []
        self._labels = x_label, y_label

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Data to pixels."""
        across = (x - self._x[0]) / (self._x[1] - self._x[0])
        up = (y - self._y[0]) / (self._y[1] - self._y[0])
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    def line(self, xs: Sequence[float], ys: Sequence[float], colour: str, name: str) -> None:
        points = " ".join("{:.1f},{:.1f}".format(*self.at(x, y)) for x, y in zip(xs, ys))
        title = f"<title>{html.escape(name)}</title>"
        style = f'fill="none" stroke="{colour}" stroke-width="1.6"'
        self._marks.append(f'<polyline points="{points}" {style}>{title}</polyline>')

    def bar(self, x: float, width: float, y: float, colour: str, name: str) -> None:
        left, top = self.at(x - width / 2, y)
        right, bottom = self.at(x + width / 2, max(0.0, self._y[0]))
        box = f'x="{left:.1f}" y="{top:.1f}" width="{right - left:.1f}" height="{max(0.0, bottom - top):.1f}"'
        self._marks.append(f'<rect {box} fill="{colour}"><title>{html.escape(name)}</title></rect>')

    def point(self, x: float, y: float, radius: float, colour: str, name: str) -> None:
        cx, cy = self.at(x, y)
        self._marks.append(f'<circle cx="{cx:.1f}" cy="{cy:.1f}" r="{radius:.1f}" fill="{colour}" opacity="0.8"/>')
        self.text(cx, cy - radius - 4, name, "middle")

    def text(self, x: float, y: float, text: str, anchor: str = "start") -> None:
        self._marks.append(f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(text)}</text>')

    def svg(self, title: str, x_names: Sequence[str] = ()) -> str:
        """`x_names` replace the numbers at 0, 1, 2, ... of the x axis."""
        parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title)}">']
        for value in ticks(*self._y):
            _, y = self.at(self._x[0], value)
            parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
            parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
        named: list[tuple[float, str]] = [(float(i), name) for i, name in enumerate(x_names)] or [
            (value, f"{value:g}") for value in ticks(*self._x, 8)
        ]
        for value, name in named:
            x, _ = self.at(value, self._y[0])
            label = html.escape(str(name))
            parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{label}</text>')
        middle = (LEFT + WIDTH - RIGHT) / 2
        x_label, y_label = map(html.escape, self._labels)
        parts.append(f'<text x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{x_label}</text>')
        turned = f'transform="translate(12 {HEIGHT / 2}) rotate(-90)"'
        parts.append(f'<text {turned} text-anchor="middle">{y_label}</text>')
        return "".join([*parts, *self._marks, "</svg>"])


def _widened(low: float, high: float) -> tuple[float, float]:
    return (low, high) if high > low else (low - 0.5, low + 0.5)


def legend(names: Sequence[str]) -> str:
    spans = [f'<span style="color:{COLOURS[i % len(COLOURS)]}">■ {html.escape(n)}</span>' for i, n in enumerate(names)]
    return f"<p class='legend'>{' '.join(spans)}</p>"
