"""Heat maps: laid out once, painted as pixels here and written as SVG by scripts/reporting/charts.py."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw

LOAD_LIMIT, DROP_LIMIT = 2.0, 0.5
"""Values at which the red of a map is full, fixed so that steps can be compared."""
COLD, NEUTRAL, HOT, UNKNOWN = (42, 111, 214), (237, 237, 234), (208, 59, 59), (176, 176, 180)
INK = (70, 70, 76)
LEFT, TOP, RIGHT, BOTTOM = 56, 34, 14, 36
"""Margins of a map, in pixels or SVG units."""
LEGEND, SWATCH = 5, 34
"""Samples in the legend, and the width of one."""

AxisLabels = tuple[str, Sequence[object]]
"""What an axis counts, and the label of each row or column."""


class Cell(NamedTuple):
    """A coloured rectangle, in pixels or SVG units."""

    x: float
    y: float
    width: float
    height: float
    strength: float
    """-1 = coldest, 0 = neutral, 1 = hottest, NaN = unknown."""


class Label(NamedTuple):
    """A text with the place of its baseline's middle or, with the anchor `end`, of its end."""

    x: float
    y: float
    text: str
    anchor: str = "middle"


class HeatMap(NamedTuple):
    """A matrix to be drawn around a neutral value."""

    values: np.ndarray
    """[rows, columns]; NaN is unknown."""
    rows: AxisLabels
    columns: AxisLabels
    centre: float
    """Neutral value; colours below it run down to 0."""
    limit: float
    """Value at which the upper colour is full."""

    def size(self, width: float, height: float) -> tuple[float, float]:
        """Width and height of the drawing with cells of a given size."""
        rows, columns = self.values.shape
        return LEFT + max(columns * width, LEGEND * SWATCH) + RIGHT, TOP + rows * height + BOTTOM

    def cells(self, width: float, height: float) -> list[Cell]:
        """Those of the matrix, row by row, then the samples of the legend."""
        strengths, places = self._strengths(self.values).flat, np.ndindex(*self.values.shape)
        boxes = [(LEFT + c * width, TOP + r * height, width, height) for r, c in places]
        boxes += [(x, 2, SWATCH, 10) for x, _ in self._samples(width)]
        samples = self._strengths(np.array([value for _, value in self._samples(width)]))
        return [Cell(*box, float(each)) for box, each in zip(boxes, [*strengths, *samples], strict=True)]

    def labels(self, width: float, height: float) -> Iterator[Label]:
        """Names and labels of both axes, as many as there is room for, and those of the legend."""
        bottom = TOP + len(self.values) * height
        yield Label(LEFT - 6, TOP - 6, self.rows[0], "end")
        yield Label(LEFT + self.values.shape[1] * width / 2, bottom + 30, self.columns[0])
        rows, columns = (list(map(str, labels)) for _, labels in (self.rows, self.columns))
        for r in range(0, len(rows), math.ceil(14 / height)):
            yield Label(LEFT - 6, TOP + (r + 0.5) * height + 4, rows[r], "end")
        for c in range(0, len(columns), math.ceil((7 * max(map(len, columns)) + 4) / width)):
            yield Label(LEFT + (c + 0.5) * width, bottom + 15, columns[c])
        for x, value in self._samples(width):
            more = "+" if value == self.limit and (self.values > value).any() else ""
            yield Label(x + SWATCH / 2, 25, f"{value:.{2 if value < 10 else 3}g}{more}")

    def _samples(self, width: float) -> list[tuple[float, float]]:
        """Left side and value of each sample of the legend, which ends with the drawing."""
        right = self.size(width, 0)[0] - RIGHT
        return [(right - (LEGEND - i) * SWATCH, self.limit * i / (LEGEND - 1)) for i in range(LEGEND)]

    def _strengths(self, values: np.ndarray) -> np.ndarray:
        span = np.where(values >= self.centre, self.limit - self.centre, self.centre or 1)
        return ((values - self.centre) / span).clip(-1, 1)


def paint(values: np.ndarray, *, centre: float, limit: float) -> Image.Image:
    """Paint a heat map of a matrix, [layers, experts], pixel by pixel."""
    layers, experts = values.shape
    heat_map = HeatMap(values, ("layer", range(layers)), ("expert", range(experts)), centre, limit)
    side = max(8, min(32, 640 // max(layers, experts)))
    width, height = heat_map.size(side, side)
    picture = Image.new("RGB", (round(width), round(height)), "white")
    draw = ImageDraw.Draw(picture)
    for x, y, w, h, strength in heat_map.cells(side, side):
        # White lines on the far sides keep neighbours apart.
        draw.rectangle((x - 1, y - 1, x + w - 1, y + h - 1), _colour(strength), "white")
    for x, y, text, anchor in heat_map.labels(side, side):
        draw.text((x, y), text, INK, anchor="rs" if anchor == "end" else "ms")
    return picture


def _colour(strength: float) -> tuple[int, ...]:
    if math.isnan(strength):
        return UNKNOWN
    end = HOT if strength > 0 else COLD
    return tuple(round(a + abs(strength) * (b - a)) for a, b in zip(NEUTRAL, end, strict=True))


def expert_maps(experts: Mapping[str, Any]) -> dict[str, tuple[Image.Image, str]]:
    """Pictures under `moe/` with captions: loads, and drops where there are any."""
    load, dropped = (np.array(experts[key], dtype=float) for key in ("load", "dropped"))
    maps = {"moe/load_map": (paint(load_share(load), centre=1, limit=LOAD_LIMIT), "choices / layer mean")}
    if dropped.any():
        maps["moe/drop_map"] = (paint(ratio(dropped, load), centre=0, limit=DROP_LIMIT), "dropped / choices")
    return maps


def load_share(load: np.ndarray) -> np.ndarray:
    """Load / layer mean, [layers, experts]; 1 is balanced, NaN a layer without choices."""
    return ratio(load, np.broadcast_to(load.mean(axis=1, keepdims=True), load.shape))


def ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Part / whole, NaN where whole is 0."""
    return np.divide(part, whole, out=np.full(part.shape, np.nan), where=whole > 0)
