"""Line charts and heat maps as HTML strings with inline SVG, and the style and script of their page.

Colours are CSS classes, so one picture serves light and dark. Every shape carries its numbers (`data-series`,
`data-tip`); the script shows them on hover.
"""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

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
class Axis:
    """Maps values of [low, high] to SVG units of [start, end]."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def place(self, values: ArrayLike) -> np.ndarray:
        low, high, at = (np.log10(v) if self.log else np.asarray(v) for v in (self.low, self.high, values))
        return self.start + (at - low) / (high - low) * (self.end - self.start)

    def ticks(self, count: int) -> list[float]:
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
    title: str,
    series: Sequence[Series],
    *,
    width: int = 560,
    height: int = 230,
    zero: bool = False,
    log: bool = False,
    x_title: str = "tokens",
) -> str:
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


def heat_map(
    title: str,
    values: np.ndarray,
    tips: Sequence[Sequence[str]],
    *,
    columns: str,
    labels: Sequence[int],
    centre: float,
    limit: float,
    width: int = 560,
) -> str:
    """Draw a matrix [layers, columns] around a neutral value.

    Args:
        title: what is shown, with the unit.
        values: [layers, columns]; NaN stays neutral.
        tips: the hover text of each cell.
        columns: what a column is.
        labels: one number for each column.
        centre: the neutral value; colours below it run down to 0.
        limit: the value at which the upper colour saturates.
        width: of the drawing, in SVG units.
    """
    rows, cols = values.shape
    top, cell_w, cell_h = 34, (width - LEFT - RIGHT) / cols, min(22.0, max(5.0, 260 / rows))
    right, bottom = width - RIGHT, top + rows * cell_h
    size = f'width="{cell_w:.2f}" height="{cell_h:.2f}"'
    body = [f'<rect class="mid" x="{LEFT}" y="{top}" width="{right - LEFT}" height="{bottom - top:.1f}"/>']
    for r, c in np.ndindex(rows, cols):
        box = f'x="{LEFT + c * cell_w:.2f}" y="{top + r * cell_h:.2f}" {size} data-tip="{escape(tips[r][c])}"'
        body.append(f"<rect {_shade(float(values[r, c]), centre, limit)} {box}/>")
    lines = [f"M{LEFT} {top + r * cell_h:.2f}H{right}" for r in range(1, rows) if cell_h >= 6]
    lines += [f"M{LEFT + c * cell_w:.2f} {top}V{bottom:.2f}" for c in range(1, cols) if cell_w >= 6]
    body.append(f'<path class="gap" d="{"".join(lines)}"/>')
    for r in range(0, rows, max(1, math.ceil(14 / cell_h))):
        body.append(_text(LEFT - 6, top + (r + 0.5) * cell_h + 4, str(r), "end"))
    for c in range(0, cols, max(1, math.ceil(44 / cell_w) if cell_w < 22 else 1)):
        body.append(_text(LEFT + (c + 0.5) * cell_w, bottom + 15, f"{labels[c]:,}"))
    body.append(_text((LEFT + right) / 2, bottom + 30, columns))
    middle = (top + bottom) / 2
    body.append(f'<text transform="rotate(-90 14 {middle:.1f})" x="14" y="{middle:.1f}">layer</text>')
    body.append(_legend(right, centre, limit, cold=bool((values < centre).any())))
    return _figure(title, "", "", width, bottom + 36, "".join(body))


def share_map(
    title: str, shares: np.ndarray, *, rows: tuple[str, Sequence[str]], columns: tuple[str, Sequence[str]]
) -> str:
    """Draw a table of shares, [rows, columns] in [0, 1], each with its per cent; 1 has the full colour.

    Args:
        rows, columns: what one is, and the label of each.
    """
    width, top, cell_w, cell_h = 560, TOP, (560 - LEFT - RIGHT) / shares.shape[1], 26.0
    bottom, body = top + cell_h * len(shares), []
    for r, c in np.ndindex(*shares.shape):
        x, y, share = LEFT + c * cell_w, top + r * cell_h, float(shares[r, c])
        box = f'x="{x:.2f}" y="{y:.2f}" width="{cell_w:.2f}" height="{cell_h:.2f}"'
        tip = escape(f"{rows[0]} {rows[1][r]}, {columns[1][c]} {columns[0]}: {100 * share:.1f} %")
        body.append(
            f'<rect class="mid" {box}/>'
            f'<rect class="good" {box} fill-opacity="{0.7 * share:.2f}" data-tip="{tip}"/>'
        )
        body.append(
            _text(x + cell_w / 2, y + cell_h / 2 + 4, f"{100 * share:.0f}").replace(
                "<text", '<text class="ink"'
            )
        )
    lines = [f"M{LEFT} {top + r * cell_h:.2f}H{width - RIGHT}" for r in range(1, len(shares))]
    lines += [f"M{LEFT + c * cell_w:.2f} {top}V{bottom:.2f}" for c in range(1, shares.shape[1])]
    body.append(f'<path class="gap" d="{"".join(lines)}"/>')
    body += [_text(LEFT - 6, top + (r + 0.5) * cell_h + 4, label, "end") for r, label in enumerate(rows[1])]
    body += [_text(LEFT + (c + 0.5) * cell_w, bottom + 15, label) for c, label in enumerate(columns[1])]
    body.append(_text((LEFT + width - RIGHT) / 2, bottom + 30, columns[0]))
    middle = (top + bottom) / 2
    body.append(
        f'<text transform="rotate(-90 14 {middle:.1f})" x="14" y="{middle:.1f}">{escape(rows[0])}</text>'
    )
    return _figure(title, "", "", width, bottom + 36, "".join(body))


def lone_svg(figure: str) -> str:
    """The drawing of a figure as an SVG file of its own, with the title inside, light and dark."""
    svg = figure[figure.index("<svg") : figure.index("</svg>")]
    head, _, body = svg.partition(">")
    head = re.sub(r' data-series="[^"]*"', "", head)  # for hovering, which needs the page's script
    label, width, height = (
        re.search(pattern, head)[1]  # type: ignore[index]  # _figure wrote them
        for pattern in (r'aria-label="([^"]*)"', r'viewBox="0 0 ([\d.]+) ', r'viewBox="0 0 [\d.]+ (\d+)"')
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 -28 {width} {int(height) + 28}"><style>{STYLE}'
        f".cursor {{ display: none; }} svg text {{ font-family: sans-serif; }}</style>"
        f'<rect class="card" y="-28" width="{width}" height="{int(height) + 28}"/>'
        f'<text class="ink" x="{float(width) / 2:.0f}" y="-8">{label}</text>{body}</svg>\n'
    )


def merge_columns(values: np.ndarray) -> list[tuple[int, int, np.ndarray]]:
    """Join neighbours of [layers, time] by maximum: at most MAX_COLUMNS triples (first, last, column)."""
    groups = np.array_split(np.arange(values.shape[1]), min(MAX_COLUMNS, values.shape[1]))
    # fmax: a NaN column (an interval without choices) does not hide its neighbours.
    return [(int(g[0]), int(g[-1]), np.fmax.reduce(values[:, g], axis=1)) for g in groups]


def _axes(series: Sequence[Series], width: int, height: int, zero: bool, log: bool) -> tuple[Axis, Axis]:
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
    return Axis(x_low, x_high, LEFT, width - RIGHT), Axis(low, high, height - BOTTOM, TOP, log)


def _frame(x_axis: Axis, y_axis: Axis, x_title: str) -> str:
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


def _shade(value: float, centre: float, limit: float) -> str:
    if not math.isfinite(value):
        return 'class="mid"'
    share = (value - centre) / (limit - centre) if value >= centre else (centre - value) / centre
    return f'class="{"hot" if value >= centre else "cold"}" fill-opacity="{min(share, 1.0):.2f}"'


def _legend(right: float, centre: float, limit: float, cold: bool) -> str:
    samples = [*(np.linspace(0, centre, 5)[:-1] if cold else []), *np.linspace(centre, limit, 5)]
    left, parts = right - 20 * len(samples), []
    for i, value in enumerate(samples):
        box = f'x="{left + 20 * i}" y="2" width="20" height="10"'
        parts.append(f'<rect class="mid" {box}/><rect {_shade(value, centre, limit)} {box}/>')
    parts.append(_text(left + 10, 25, number(samples[0])))
    parts.append(_text(left + 90, 25, number(centre)) if cold else "")
    return f'<g class="legend">{"".join(parts)}{_text(right, 25, f"≥ {limit:.3g}", "end")}</g>'


def _text(x: float, y: float, text: str, anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _figure(title: str, keys: str, data: str, width: float, height: float, body: str) -> str:
    label = escape(title)
    svg = f'<svg role="img" aria-label="{label}" viewBox="0 0 {width} {height:.0f}" {data}>{body}</svg>'
    return f"<figure><figcaption><b>{label}</b>{keys}</figcaption>{svg}</figure>"
