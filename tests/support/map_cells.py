"""The pixels of a heat map."""

from typing import Any

from PIL import Image

from train.monitor.heat_maps import BOTTOM, LEFT, TOP


def between(a: tuple[int, ...], b: tuple[int, ...], share: float) -> tuple[int, ...]:
    return tuple(round(x + share * (y - x)) for x, y in zip(a, b, strict=True))


def cells(picture: Image.Image, layers: int, experts: int) -> list[list[Any]]:
    """The colour inside each cell; the cells fill what the margins leave."""
    size = (picture.height - TOP - BOTTOM) // layers
    pixels = picture.convert("RGB")
    return [
        [pixels.getpixel((LEFT + c * size + size // 2, TOP + r * size + size // 2)) for c in range(experts)]
        for r in range(layers)
    ]
