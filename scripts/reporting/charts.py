"""Line charts and heat maps as HTML strings with inline SVG, and the style and script of their page.

Colours are CSS classes, so one picture serves light and dark. Every shape carries its numbers (`data-series`,
`data-tip`); the script shows them on hover.
"""

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from train.monitor.heat_maps import LEGEND, Cell, HeatMap

MAX_POINTS = 2000
LEFT, RIGHT, TOP, BOTTOM = 56, 14, 10, 34  # margins around the plotting area, in SVG units
MAX_COLUMNS = 120

STYLE, SCRIPT = (Path(__file__).with_name(f"report.{kind}").read_text("utf-8") for kind in ("css", "js"))
"""Of the page, so that it needs nothing else."""


@dataclass(frozen=True)
class Series:
    """One curve over tokens; `style` is `line`, `faint` (raw values behind a smoothed line) or `points`."""

    name: str
    x: np.ndarray
    y: np.ndarray
    step: np.ndarray
    style: str = "line"


@dataclass(frozen=True)
class Scale:
    """Maps values of [low, high] to SVG units of [start, end]."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def place(self, values: ArrayLike) -> np.ndarray:
        """Return where values stand, in SVG units."""
        low, high, at = (np.log10(v) if self.log else np.asarray(v) for v in (self.low, self.high, values))
        return self.start + (at - low) / (high - low) * (self.end - self.start)

    def ticks(self, count: int) -> list[float]:
        """Return about `count` round values inside the scale."""
        if self.log:
            first, last = math.ceil(math.log10(self.low)), math.floor(math.log10(self.high))
            return [10.0**k for k in range(first, last + 1, 1 + (last - first) // count)]
        rough = (self.high - self.low) / count
        unit = 10.0 ** math.floor(math.log10(rough))
        unit *= next(m for m in (1, 2, 5, 10) if m * unit >= 0.7 * rough)
        first, last = math.ceil(self.low / unit - 1e-9), math.floor(self.high / unit + 1e-9)
        return [k * unit for k in range(first, last + 1)]


def number(value: float) -> str:
    """Format a number for an axis or a tile: 12500000 -> 12.5M, 0.0003 -> 3e-4."""
    if not math.isfinite(value):
        return str(value)
    for size, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{suffix}"
    if value == 0 or abs(value) >= 1e-3:
        return f"{value:.4g}"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def smooth(values: np.ndarray, half: int) -> np.ndarray:
    """Average the finite values within `half` places; the window shrinks at both ends, so nothing lags."""
    index = np.arange(len(values))
    reach = np.minimum(half, np.minimum(index, len(values) - 1 - index))
    finite = np.isfinite(values)
    total = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    count = np.concatenate([[0], np.cumsum(finite)])
    low, high = index - reach, index + reach + 1
    seen = count[high] - count[low]
    return np.where(seen > 0, (total[high] - total[low]) / np.maximum(seen, 1), np.nan)


def thin(values: np.ndarray, limit: int = MAX_POINTS) -> np.ndarray:
    """Return at most `limit` indices: the ends and each bucket's extremes, so that spikes survive."""
    if len(values) <= limit:
        return np.arange(len(values))
    keep = {0, len(values) - 1}
    for bucket in np.array_split(np.arange(len(values)), limit // 2 - 1):
        finite = bucket[np.isfinite(values[bucket])]
        ends = (
            (finite[values[finite].argmin()], finite[values[finite].argmax()]) if len(finite) else bucket[:1]
        )
        keep.update(int(i) for i in ends)
    return np.array(sorted(keep))


def line_chart(
    title: str, series: Sequence[Series], *, width: int = 560, height: int = 230, zero: bool = False,
    log: bool = False, x_title: str = "tokens",
) -> str:  # fmt: skip
    """Draw curves over tokens; an empty string if there are none.

    Args:
        title: what is shown, with the unit.
        series: curves; NaN and infinity leave a gap and are counted in the caption.
        width: of the drawing, in SVG units.
        height: of the drawing, in SVG units.
        zero: whether the y axis includes 0.
        log: whether the y axis becomes logarithmic when positive values span more than a factor of 100.
        x_title: what the x axis counts.
    """
    series = [s for s in series if len(s.x)]
    if not series:
        return ""
    x_axis, y_axis = _axes(series, width, height, zero, log)
    body, hover = [_frame(x_axis, y_axis, x_title)], []
    for curve in series:
        kept = thin(curve.y)
        x, y, step = curve.x[kept], curve.y[kept], curve.step[kept]
        with np.errstate(invalid="ignore", divide="ignore"):
            px, py = x_axis.place(x), y_axis.place(np.where(np.isfinite(y), y, np.nan))
        body.append(_curve(px, py, curve.style))
        points = [
            [round(float(p), 1), float(tokens), float(s), float(f"{v:.5g}")]
            for p, tokens, s, v in zip(px, x, step, y, strict=True)
            if math.isfinite(v)
        ]
        hover.append({"name": curve.name, "points": points})
    bad = max(int((~np.isfinite(s.y)).sum()) for s in series)
    keys = [f'<span class="key {s.style}">{escape(s.name)}</span>' for s in series] if len(series) > 1 else []
    keys += [f'<span class="warn">{bad} not finite</span>'] if bad else []
    cursor = f'<line class="cursor" y1="{TOP}" y2="{height - BOTTOM}" x1="-9" x2="-9"/>'
    data = escape(json.dumps(hover, separators=(",", ":")))
    return _figure(title, "".join(keys), f'data-series="{data}"', width, height, "".join(body) + cursor)


def draw_heat_map(
    title: str, heat_map: HeatMap, tip: Callable[[int, int], str], *, hue: str = "hot",
    has_numbers: bool = False,
) -> str:  # fmt: skip
    """Draw a heat map.

    Args:
        title: what is shown, with the unit.
        heat_map: the matrix and its labels.
        tip: the hover text of the cell in a row and column.
        hue: CSS class of the upper colour.
        has_numbers: whether each cell shows its value.
    """
    values = heat_map.values
    size = 490 / values.shape[1], 26.0 if has_numbers else min(22.0, max(5.0, 260 / len(values)))
    cells, labels = heat_map.cells(*size), [*heat_map.labels(*size)]
    if has_numbers:  # which say more than the legend
        cells, labels = cells[:-LEGEND], labels[:-LEGEND]
    tips = [f' data-tip="{escape(tip(r, c))}"' for r, c in np.ndindex(*values.shape)]
    tips += [""] * (len(cells) - len(tips))  # of the legend
    body = [
        '<path class="mid" d="',
        *(f"M{x:.2f} {y:.2f}h{width:.2f}v{height:.2f}h-{width:.2f}z" for x, y, width, height, _ in cells),
        f'"/><g class="cells" stroke-width="{int(min(size) >= 6)}">',
        *(_cell(cell, hue, more) for cell, more in zip(cells, tips, strict=True)),
        "</g>",
        *(_text(*label) for label in labels),
    ]
    if has_numbers:
        shown = zip(cells, values.flat, strict=False)
        body += [_text(x + w / 2, y + h / 2 + 4, f"{v:.0f}", style="ink") for (x, y, w, h, _), v in shown]
    return _figure(title, "", "", *heat_map.size(*size), "".join(body))


def _cell(cell: Cell, hue: str, tip: str) -> str:
    kind = hue if cell.strength >= 0 else "cold" if cell.strength < 0 else "unknown"
    opacity = "" if kind == "unknown" else f' fill-opacity="{abs(cell.strength):.2f}"'
    box = f'x="{cell.x:.2f}" y="{cell.y:.2f}" width="{cell.width:.2f}" height="{cell.height:.2f}"'
    return f'<rect class="{kind}"{opacity} {box}{tip}/>'


def lone_svg(figure: str) -> str:
    """Return the drawing of a figure as an SVG file of its own, with the title inside, light and dark."""
    svg = figure[figure.index("<svg") : figure.index("</svg>")]
    head, _, body = svg.partition(">")
    head = re.sub(r' data-series="[^"]*"', "", head)  # for hovering, which needs the page's script
    found = re.search(r'aria-label="([^"]*)" viewBox="0 0 (\d+) (\d+)"', head)
    assert found, "a figure of _figure"
    label, width, height = found[1], int(found[2]), int(found[3]) + 28
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 -28 {width} {height}"><style>{STYLE}'
        f".cursor {{ display: none; }} svg text {{ font-family: sans-serif; }}</style>"
        f'<rect class="card" y="-28" width="{width}" height="{height}"/>'
        f'<text class="ink" x="{width // 2}" y="-8">{label}</text>{body}</svg>\n'
    )


def merge_columns(values: np.ndarray) -> tuple[list[tuple[int, int]], np.ndarray]:
    """Join neighbours of [layers, time] by maximum: the first and last of each, and MAX_COLUMNS columns."""
    groups = np.array_split(np.arange(values.shape[1]), min(MAX_COLUMNS, values.shape[1]))
    # fmax: a NaN column (an interval without choices) does not hide its neighbours.
    merged = np.stack([np.fmax.reduce(values[:, group], axis=1) for group in groups], axis=1)
    return [(int(group[0]), int(group[-1])) for group in groups], merged


def _axes(series: Sequence[Series], width: int, height: int, zero: bool, log: bool) -> tuple[Scale, Scale]:
    x = np.concatenate([s.x for s in series])
    y = np.concatenate([s.y[np.isfinite(s.y)] for s in series])
    y = y if len(y) else np.array([0.0, 1.0])
    x_low, x_high = float(x.min()), float(x.max())
    if x_low == x_high:
        x_low, x_high = x_low - 0.5 * max(abs(x_low), 1), x_high + 0.5 * max(abs(x_high), 1)
    low, high = float(y.min()), float(y.max())
    log = log and low > 0 and high / low > 100
    low = min(low, 0.0) if zero and not log else low
    if log:
        low, high = low / 1.3, high * 1.3
    elif low == high:
        low, high = (low, low + 1.0) if low == 0 else (low - 0.1 * abs(low), high + 0.1 * abs(high))
    else:
        pad = 0.06 * (high - low)
        low, high = (low if zero and low == 0 else low - pad), high + pad
    return Scale(x_low, x_high, LEFT, width - RIGHT), Scale(low, high, height - BOTTOM, TOP, log)


def _frame(x_axis: Scale, y_axis: Scale, x_title: str) -> str:
    parts = []
    for value in y_axis.ticks(5):
        y = float(y_axis.place(value))
        parts.append(f'<path class="rule" d="M{x_axis.start} {y:.1f}H{x_axis.end}"/>')
        parts.append(_text(x_axis.start - 7, y + 4, number(value), "end"))
    floor = y_axis.start
    parts.append(f'<path class="axis" d="M{x_axis.start} {floor}H{x_axis.end}"/>')
    for value in x_axis.ticks(max(3, round((x_axis.end - x_axis.start) / 90))):
        x = float(x_axis.place(value))
        parts.append(f'<path class="axis" d="M{x:.1f} {floor}v4"/>')
        parts.append(_text(x, floor + 16, number(value)))
    return "".join(parts) + _text((x_axis.start + x_axis.end) / 2, floor + 31, x_title)


def _curve(px: np.ndarray, py: np.ndarray, style: str) -> str:
    """Draw a path that breaks at NaN; lone points, and all points of style `points`, become circles."""
    finite = np.isfinite(py)
    commands, circles = [], []
    for i in np.flatnonzero(finite):
        joined = i > 0 and bool(finite[i - 1])
        commands.append(f"{'L' if joined else 'M'}{px[i]:.1f} {py[i]:.1f}")
        if style == "points" or not (joined or (i + 1 < len(py) and finite[i + 1])):
            circles.append(f'<circle class="dot {style}" cx="{px[i]:.1f}" cy="{py[i]:.1f}" r="3.5"/>')
    return f'<path class="curve {style}" d="{"".join(commands)}"/>' + "".join(circles)


def _text(x: float, y: float, text: str, anchor: str = "middle", style: str = "") -> str:
    style = style and f' class="{style}"'
    return f'<text{style} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _figure(title: str, keys: str, data: str, width: float, height: float, body: str) -> str:
    label = escape(title)
    svg = f'<svg role="img" aria-label="{label}" viewBox="0 0 {width:.0f} {height:.0f}" {data}>{body}</svg>'
    return f"<figure><figcaption><b>{label}</b>{keys}</figcaption>{svg}</figure>"
