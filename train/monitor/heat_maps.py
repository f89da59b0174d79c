"""Pictures of expert load, for wandb and TensorBoard."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

LOAD_LIMIT, DROP_LIMIT = (
    2.0,
    0.5,
)  # the values at which a map's red is full, fixed so that steps can be compared
COLD, NEUTRAL, HOT, UNKNOWN = (42, 111, 214), (237, 237, 234), (208, 59, 59), (176, 176, 180)
INK = (70, 70, 76)
LEFT, TOP, RIGHT, BOTTOM = 34, 32, 12, 36  # margins of a map in pixels
SWATCH = 34  # width of one sample in the legend


def expert_maps(experts: Mapping[str, Any]) -> dict[str, tuple[Image.Image, str]]:
    """Pictures under `moe/` with captions: loads, and drops where there are any."""
    load, dropped = (np.array(experts[key], dtype=float) for key in ("load", "dropped"))
    picture = heat_map(load_share(load), centre=1, limit=LOAD_LIMIT)
    maps = {"moe/load_map": (picture, "choices / layer mean")}
    if dropped.any():
        picture = heat_map(_ratio(dropped, load), centre=0, limit=DROP_LIMIT)
        maps["moe/drop_map"] = (picture, "dropped / choices")
    return maps


def load_share(load: np.ndarray) -> np.ndarray:
    """Load / layer mean, [layers, experts]; 1 is balanced, NaN a layer without choices."""
    return _ratio(load, np.broadcast_to(load.mean(axis=1, keepdims=True), load.shape))


def heat_map(values: np.ndarray, *, centre: float, limit: float) -> Image.Image:
    """Draw a matrix with a row a layer and a column an expert, their numbers, and a legend.

    Args:
        values: [layers, experts]; NaN is grey.
        centre: the neutral value; colours below it run down to 0.
        limit: the value at which the upper colour is full.
    """
    layers, experts = values.shape
    cell = max(8, min(32, 640 // max(layers, experts)))
    samples = np.linspace(0, limit, 5)
    bottom = TOP + layers * cell
    width = LEFT + max(experts * cell, len(samples) * SWATCH) + RIGHT
    picture = Image.new("RGB", (width, bottom + BOTTOM), "white")
    picture.paste(Image.fromarray(_cells(shade(values, centre, limit), cell, cell)), (LEFT, TOP))
    legend = _cells(shade(samples[None], centre, limit), 10, SWATCH)
    picture.paste(Image.fromarray(legend), (LEFT, bottom + 8))
    draw = ImageDraw.Draw(picture)
    draw.text((LEFT, 2), "layers down, experts across", INK)
    for layer in range(0, layers, math.ceil(12 / cell)):
        draw.text((LEFT - 5, TOP + (layer + 0.5) * cell), str(layer), INK, anchor="rm")
    for expert in range(0, experts, math.ceil(24 / cell)):
        draw.text((LEFT + (expert + 0.5) * cell, TOP - 3), str(expert), INK, anchor="mb")
    for place, sample in enumerate(samples):
        text = f"{sample:.2g}" + ("+" if sample == limit else "")
        draw.text((LEFT + (place + 0.5) * SWATCH, bottom + 21), text, INK, anchor="mt")
    return picture


def shade(values: np.ndarray, centre: float, limit: float) -> np.ndarray:
    """RGB bytes, [..., 3]: neutral at `centre`, blue towards 0, red up to `limit`, grey for NaN."""
    above = values >= centre
    strength = np.where(above, (values - centre) / (limit - centre), (centre - values) / (centre or 1))
    end = np.where(above[..., None], HOT, COLD)
    colour = np.array(NEUTRAL) + strength.clip(0, 1)[..., None] * (end - np.array(NEUTRAL))
    return np.where(np.isnan(values)[..., None], UNKNOWN, colour).round().astype(np.uint8)


def _cells(colours: np.ndarray, height: int, width: int) -> np.ndarray:
    """Blow each colour up to a cell; a white line on the far sides keeps neighbours apart."""
    pixels = colours.repeat(height, axis=0).repeat(width, axis=1)
    pixels[height - 1 :: height] = 255
    pixels[:, width - 1 :: width] = 255
    return pixels


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """part / whole, NaN where whole is 0."""
    return np.divide(part, whole, out=np.full(part.shape, np.nan), where=whole > 0)
