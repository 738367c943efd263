"""Line charts, as SVG that every browser and GitHub shows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

__all__ = ["line_chart"]

_WIDTH, _HEIGHT = 720, 400
_LEFT, _RIGHT, _TOP, _BOTTOM = 60, 280, 36, 48  # margins; the legend is at the right
_COLOURS = ("#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito's

Points = Sequence[tuple[float, float]]


def line_chart(
    title: str,
    x_label: str,
    y_label: str,
    lines: Mapping[str, Points],
    *,
    x_ticks: Mapping[float, str] | None = None,
    y_max: float | None = None,
) -> str:
    """A chart with one line for each entry of ``lines``, dashed from the eighth on.

    Args:
        title: Above the chart.
        x_label: Below it.
        y_label: Beside it.
        lines: Points by the name of their line; lines without points are left out.
        x_ticks: Where the horizontal axis is marked, and how; by default at round numbers.
        y_max: Points higher than this are not drawn.
    """
    lines = {name: [(x, y) for x, y in points if y_max is None or y <= y_max] for name, points in lines.items()}
    lines = {name: points for name, points in lines.items() if points}
    xs = [x for points in lines.values() for x, _ in points]
    ys = [y for points in lines.values() for _, y in points]
    if x_ticks is None:
        x_ticks = {tick: f"{tick:g}" for tick in _round_numbers(min(xs), max(xs))}
    y_ticks = _round_numbers(min(ys), max(ys))
    x_from, x_to = min(*xs, *x_ticks), max(*xs, *x_ticks)
    y_from, y_to = min(*ys, *y_ticks), max(*ys, *y_ticks)

    def place(x: float, y: float) -> tuple[float, float]:
        right = _LEFT + (x - x_from) / (x_to - x_from) * (_WIDTH - _LEFT - _RIGHT)
        down = _HEIGHT - _BOTTOM - (y - y_from) / (y_to - y_from) * (_HEIGHT - _TOP - _BOTTOM)
        return round(right, 1), round(down, 1)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif"'
        ' font-size="12">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
        f'<text x="{_LEFT}" y="20" font-size="14">{escape(title)}</text>',
        f'<text x="{(_LEFT + _WIDTH - _RIGHT) / 2}" y="{_HEIGHT - 8}" text-anchor="middle">{escape(x_label)}</text>',
        f'<text transform="translate(14 {_HEIGHT / 2}) rotate(-90)" text-anchor="middle">{escape(y_label)}</text>',
    ]
    for tick, label in x_ticks.items():
        x, bottom = place(tick, y_from)
        parts.append(f'<path d="M{x} {_TOP}V{bottom}" stroke="#ddd"/>')
        parts.append(f'<text x="{x}" y="{bottom + 16}" text-anchor="middle">{escape(label)}</text>')
    for tick in y_ticks:
        left, y = place(x_from, tick)
        parts.append(f'<path d="M{left} {y}H{_WIDTH - _RIGHT}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4}" text-anchor="end">{tick:g}</text>')
    for number, (name, points) in enumerate(lines.items()):
        style = f'stroke="{_COLOURS[number % len(_COLOURS)]}" stroke-width="2"'
        style += ' stroke-dasharray="5 3"' * (number >= len(_COLOURS))
        path = " ".join(f"{x},{y}" for x, y in (place(*point) for point in points))
        y = _TOP + 8 + 18 * number
        parts.append(f'<polyline points="{path}" fill="none" {style}/>')
        parts.append(f'<path d="M{_WIDTH - _RIGHT + 12} {y}h20" {style}/>')
        parts.append(f'<text x="{_WIDTH - _RIGHT + 38}" y="{y + 4}">{escape(name)}</text>')
    return "\n".join([*parts, "</svg>\n"])


def _round_numbers(least: float, greatest: float) -> list[float]:
    """About five of them, from ``least`` to ``greatest`` and at most one step beyond each."""
    span = greatest - least or abs(greatest) or 1.0
    power = 10.0 ** math.floor(math.log10(span / 4))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= span / 5)
    first, last = math.floor(least / step), max(math.ceil(greatest / step), math.floor(least / step) + 1)
    return [round(i * step, 10) for i in range(first, last + 1)]
