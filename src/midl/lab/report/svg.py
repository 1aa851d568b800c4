"""Small charts as inline SVG: axes, marks and a text alternative; colours come from the page's style sheet."""

from __future__ import annotations

import base64
import dataclasses
import io
import math
from collections.abc import Mapping, Sequence
from xml.sax.saxutils import escape

import numpy as np

__all__ = ["Axis", "Point", "heat_map", "histogram", "intervals", "lines", "mark", "scatter"]

WIDTH, HEIGHT = 360, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 10, 40
_SHAPES = (
    "circle", "ring", "square", "diamond", "cross", "down", "up", "star", "plus", "bow", "hourglass", "hexagon",
    "house", "left", "right",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Point:
    """One mark: its place and half the length of its vertical bar, 0 for none."""

    x: float
    y: float
    spread: float = 0.0


class Axis:
    """Maps numbers to pixels and chooses ticks.

    >>> Axis([0, 9.7], 0, 100).ticks
    [0, 2, 4, 6, 8]
    """

    def __init__(self, values: Sequence[float], start: float, end: float, pad: float = 0.0) -> None:
        low, high = min(values), max(values)
        margin = (high - low) * pad or (abs(high) * 0.05 or 1.0 if high == low else 0.0)
        self._low, self._high, self._start, self._end = low - margin, high + margin, start, end
        span = self._high - self._low
        power = 10 ** math.floor(math.log10(span / 4))
        step = next(s * power for s in (1, 2, 5, 10) if span / (s * power) <= 5.5)
        self.ticks = [
            round(i * step, 12) for i in range(math.ceil(self._low / step), math.floor(self._high / step) + 1)
        ]
        self._digits = max(0, -math.floor(math.log10(step) + 1e-9))

    def __call__(self, value: float) -> float:
        """Return the pixel of a number."""
        share = (value - self._low) / (self._high - self._low)
        return round(self._start + share * (self._end - self._start), 1)

    def label(self, tick: float) -> str:
        """Return a tick's text."""
        return f"{tick:.{self._digits}f}".replace("-", "−")


def mark(shape: int, x: float, y: float, key: str, label: str = "") -> str:
    """Return a mark; marks of different series differ in shape as well as in colour."""
    title = f"<title>{escape(label)}</title>" if label else ""
    kind, name = _SHAPES[shape % len(_SHAPES)], f'class="mark c-{key}"'
    if kind in ("circle", "ring"):
        hollow = " hollow" if kind == "ring" else ""
        return f'<circle class="mark c-{key}{hollow}" cx="{x}" cy="{y}" r="4.2">{title}</circle>'
    if kind in ("cross", "plus"):
        a = 4.0
        path = f"M{-a},{-a}L{a},{a}M{-a},{a}L{a},{-a}" if kind == "cross" else f"M0,{-a - 1}V{a + 1}M{-a - 1},0H{a + 1}"
        return f'<path class="mark c-{key} stroked" transform="translate({x},{y})" d="{path}">{title}</path>'
    path = {
        "square": "M-4,-4H4V4H-4Z",
        "diamond": "M0,-5.5L5.5,0L0,5.5L-5.5,0Z",
        "down": "M-5,-4H5L0,5Z",
        "up": "M-5,4H5L0,-5Z",
        "left": "M4,-5V5L-5,0Z",
        "right": "M-4,-5V5L5,0Z",
        "bow": "M-5,-4.5L5,4.5V-4.5L-5,4.5Z",
        "hourglass": "M-4.5,-5L4.5,5H-4.5L4.5,-5Z",
        "hexagon": "M-5.2,0L-2.6,-4.5H2.6L5.2,0L2.6,4.5H-2.6Z",
        "house": "M-4,4.5V-1L0,-5.5L4,-1V4.5Z",
        "star": "M0,-6L1.6,-1.9L5.8,-1.9L2.4,0.8L3.6,5L0,2.4L-3.6,5L-2.4,0.8L-5.8,-1.9L-1.6,-1.9Z",
    }[kind]
    return f'<path {name} transform="translate({x},{y})" d="{path}">{title}</path>'


def scatter(series: Mapping[str, tuple[int, str, Point]], x_label: str, y_label: str, alternative: str) -> str:
    """Return a scatter plot with one point per series.

    Points that would cover one another are drawn side by side.

    Args:
        series: key (a CSS class) to shape, name and point.
        x_label: with unit.
        y_label: with unit.
        alternative: the chart in words.
    """
    points = [point for _, _, point in series.values()]
    x = Axis([p.x for p in points], _LEFT, WIDTH - _RIGHT, pad=0.1)
    y = Axis([v for p in points for v in (p.y - p.spread, p.y + p.spread)], HEIGHT - _BOTTOM, _TOP, pad=0.06)
    places = _side_by_side([x(p.x) for p in points])
    body = []
    for (key, (shape, name, point)), place in zip(series.items(), places, strict=True):
        if point.spread:
            low, high = y(point.y - point.spread), y(point.y + point.spread)
            body.append(f'<path class="bar c-{key}" d="M{place},{low}V{high}"/>')
        body.append(mark(shape, place, y(point.y), key, f"{name}: {point.y:.2f}"))
    return _chart(body, x, y, x_label, y_label, alternative)


def lines(series: Mapping[str, tuple[int, str, Sequence[Point]]], x_label: str, y_label: str, alternative: str) -> str:
    """Return a line chart; arguments as of :func:`scatter`, with several points per series."""
    points = [point for _, _, line in series.values() for point in line]
    x = Axis([p.x for p in points], _LEFT, WIDTH - _RIGHT)
    y = Axis([p.y for p in points], HEIGHT - _BOTTOM, _TOP, pad=0.06)
    body = []
    for key, (shape, name, line) in series.items():
        path = "L".join(f"{x(p.x)},{y(p.y)}" for p in line)
        body.append(f'<path class="line c-{key}" d="M{path}"/>')
        body += [mark(shape, x(p.x), y(p.y), key, f"{name}: {p.y:.1f} at {p.x:g}") for p in line]
    return _chart(body, x, y, x_label, y_label, alternative)


def intervals(rows: Mapping[str, Mapping[str, tuple[int, float, float, float]]], x_label: str, alternative: str) -> str:
    """Return one line per row with a mark and a horizontal bar for each series.

    Args:
        rows: label to series key to shape, value, low and high.
        x_label: with unit.
        alternative: the chart in words.
    """
    left, step = 100, 38
    height = _TOP + step * len(rows) + _BOTTOM
    numbers = [v for row in rows.values() for _, *values in row.values() for v in values]
    x = Axis([0.0, *numbers], left, WIDTH - _RIGHT, pad=0.03)
    body = _vertical_grid(x, height)
    for i, (label, row) in enumerate(rows.items()):
        middle = _TOP + step * (i + 0.5)
        shown = label if len(label) <= 14 else "…" + label[-13:]
        body.append(f'<text x="{left - 6}" y="{middle + 4}" text-anchor="end">{escape(shown)}</text>')
        for j, (key, (shape, value, low, high)) in enumerate(row.items()):
            y = middle + (j - (len(row) - 1) / 2) * 10
            body.append(f'<path class="bar c-{key}" d="M{x(low)},{y}H{x(high)}"/>')
            body.append(mark(shape, x(value), y, key, f"{label}, {key}: {value:.3f} ({low:.3f} to {high:.3f})"))
    body.append(
        f'<text x="{(left + WIDTH - _RIGHT) / 2}" y="{height - 4}" text-anchor="middle">{escape(x_label)}</text>'
    )
    return _svg(body, height, alternative)


def histogram(edges: Sequence[float], counts: Mapping[str, Sequence[int]], x_label: str, alternative: str) -> str:
    """Return bars of shares of the largest series, one series before the other; ``counts``: key to counts."""
    total = max(sum(values) for values in counts.values()) or 1
    share = {key: [100 * value / total for value in values] for key, values in counts.items()}
    x = Axis([edges[0], edges[-1]], _LEFT, WIDTH - _RIGHT)
    y = Axis([0.0, max(v for values in share.values() for v in values) or 1.0], HEIGHT - _BOTTOM, _TOP)
    body = []
    for key, values in share.items():
        outline = f"M{x(edges[0])},{y(0)}" + "".join(
            f"V{y(value)}H{x(right)}" for value, right in zip(values, edges[1:], strict=True)
        )
        body.append(f'<path class="area c-{key}" d="{outline}V{y(0)}Z"/>')
    return _chart(body, x, y, x_label, "share (%)", alternative)


def heat_map(values: np.ndarray, row_label: str, column_label: str, alternative: str) -> str:
    """Return fractions from 0 to 1, (rows, columns), as colours (cividis, which the colour-blind read as well)."""
    from matplotlib import colormaps
    from PIL import Image

    colours = colormaps["cividis"](np.nan_to_num(values), bytes=True)[..., :3]
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(colours)).save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    rows, columns = values.shape
    left, width, height = 34, WIDTH - 34 - _RIGHT, min(200, max(60, 14 * rows))
    body = [
        f'<image x="{left}" y="{_TOP}" width="{width}" height="{height}" preserveAspectRatio="none" '
        f'class="pixels" href="data:image/png;base64,{data}"/>'
    ]
    for row in sorted({0, rows - 1} if rows > 12 else range(rows)):
        y = _TOP + height * (row + 0.5) / rows
        body.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{row}</text>')
    bottom = _TOP + height
    body += [
        f'<text x="{left}" y="{bottom + 14}">{escape(column_label)}: 1</text>',
        f'<text x="{left + width}" y="{bottom + 14}" text-anchor="end">{columns}</text>',
        f'<text class="axis" transform="translate(10,{_TOP + height / 2}) rotate(-90)" text-anchor="middle">'
        f"{escape(row_label)}</text>",
        *_colour_scale(left, bottom + 22, width),
    ]
    return _svg(body, bottom + 52, alternative)


def _colour_scale(left: float, top: float, width: float) -> list[str]:
    from matplotlib import colormaps, colors

    steps = 20
    boxes = [
        f'<rect x="{left + i * width / steps:.1f}" y="{top}" width="{width / steps + 0.5:.1f}" height="8" '
        f'fill="{colors.to_hex(colormaps["cividis"]((i + 0.5) / steps))}"/>'
        for i in range(steps)
    ]
    texts = ((0, "start", "never"), (0.5, "middle", "half of the time"), (1, "end", "always"))
    return boxes + [
        f'<text x="{left + share * width}" y="{top + 21}" text-anchor="{anchor}">{text}</text>'
        for share, anchor, text in texts
    ]


def _side_by_side(places: list[float], distance: float = 10.0) -> list[float]:
    """Return places with those that lie closer than ``distance`` spread around their middle."""
    order = sorted(range(len(places)), key=lambda i: places[i])
    clusters: list[list[int]] = []
    for i in order:
        if clusters and places[i] - places[clusters[-1][-1]] < distance:
            clusters[-1].append(i)
        else:
            clusters.append([i])
    out = list(places)
    for cluster in clusters:
        width = distance * (len(cluster) - 1)
        middle = sum(places[i] for i in cluster) / len(cluster)
        start = min(max(middle - width / 2, _LEFT + 6), WIDTH - _RIGHT - 6 - width)
        for j, i in enumerate(cluster):
            out[i] = round(start + distance * j, 1) if len(cluster) > 1 else places[i]
    return out


def _chart(body: list[str], x: Axis, y: Axis, x_label: str, y_label: str, alternative: str) -> str:
    bottom, right = HEIGHT - _BOTTOM, WIDTH - _RIGHT
    frame = []
    for tick in y.ticks:
        frame.append(f'<path class="grid" d="M{_LEFT},{y(tick)}H{right}"/>')
        frame.append(f'<text x="{_LEFT - 6}" y="{y(tick) + 4}" text-anchor="end">{y.label(tick)}</text>')
    for tick in x.ticks:
        frame.append(f'<path class="grid" d="M{x(tick)},{bottom}v4"/>')
        frame.append(f'<text x="{x(tick)}" y="{bottom + 16}" text-anchor="middle">{x.label(tick)}</text>')
    frame.append(f'<path class="axis" d="M{_LEFT},{_TOP}V{bottom}H{right}"/>')
    middle_x, middle_y = (_LEFT + right) / 2, (_TOP + bottom) / 2
    frame.append(f'<text x="{middle_x}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>')
    frame.append(
        f'<text transform="translate(11,{middle_y}) rotate(-90)" text-anchor="middle">{escape(y_label)}</text>'
    )
    return _svg(frame + body, HEIGHT, alternative)


def _vertical_grid(x: Axis, height: float) -> list[str]:
    bottom = height - _BOTTOM
    out = []
    for tick in x.ticks:
        out.append(f'<path class="grid" d="M{x(tick)},{_TOP}V{bottom}"/>')
        out.append(f'<text x="{x(tick)}" y="{bottom + 16}" text-anchor="middle">{x.label(tick)}</text>')
    return out


def _svg(body: list[str], height: float, alternative: str) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(alternative, {chr(34): "&quot;"})}">'
        + "".join(body)
        + "</svg>"
    )
