"""The pixels of the heat maps."""

import numpy as np
import pytest

from tests.support.expert_records import between, cells
from train.monitor.heat_maps import (
    BOTTOM,
    COLD,
    HOT,
    LEFT,
    NEUTRAL,
    RIGHT,
    SWATCH,
    TOP,
    UNKNOWN,
    load_share,
    paint,
)
from train.monitor.wandb_run import load_histogram


def test_map_of_extreme_loads() -> None:
    load = np.array([[0.0, 0, 0, 0], [0, 0, 64, 0], [5, 5, 5, 5]])
    share = load_share(load)
    assert np.isnan(share[0]).all()
    assert share[1:].tolist() == [[0, 0, 4, 0], [1, 1, 1, 1]]
    picture = paint(share, centre=1, limit=2)
    assert cells(picture, 3, 4) == [[UNKNOWN] * 4, [COLD, COLD, HOT, COLD], [NEUTRAL] * 4]
    counts, edges = load_histogram(load)
    assert (counts.sum(), counts[0], counts[-1], edges[-1]) == (8, 3, 1, 4.0)
    nothing = np.zeros((2, 3))
    assert cells(paint(load_share(nothing), centre=1, limit=2), 2, 3) == [[UNKNOWN] * 3] * 2
    assert load_histogram(nothing)[0].sum() == 0


@pytest.mark.parametrize(
    ("layers", "experts", "cell"), [(80, 32, 8), (2, 4, 32), (1, 1, 32), (60, 256, 8), (40, 8, 16)]
)
def test_cells_of_a_map_are_readable(layers: int, experts: int, cell: int) -> None:
    values = np.linspace(0, 2, layers * experts).reshape(layers, experts)
    picture = paint(values, centre=1, limit=2)
    width = LEFT + max(experts * cell, 5 * SWATCH) + RIGHT
    assert picture.size == (width, TOP + layers * cell + BOTTOM)
    right, bottom = LEFT + experts * cell - 1, TOP + layers * cell - 1
    corner = between(NEUTRAL, HOT, 1.0) if layers * experts > 1 else COLD
    assert picture.getpixel((right - 1, bottom - 1)) == corner
    assert picture.getpixel((right, bottom - 1)) == picture.getpixel((right - 1, bottom)) == (255, 255, 255)
    assert picture.crop((0, TOP, LEFT, TOP + cell)).getcolors(1000) != [(LEFT * cell, (255, 255, 255))]


def test_legend_shows_the_scale() -> None:
    picture = paint(np.ones((2, 2)), centre=1, limit=2)
    row = [picture.getpixel((picture.width - RIGHT - (5 - i) * SWATCH + 3, 6)) for i in range(5)]
    assert row == [COLD, between(NEUTRAL, COLD, 0.5), NEUTRAL, between(NEUTRAL, HOT, 0.5), HOT]
