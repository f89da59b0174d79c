"""Expert load for people: what an offline wandb run holds, when alerts come, the pixels of the heat maps."""

import io
import json
import logging
import math
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import wandb
from PIL import Image
from rich.console import Console
from wandb.proto import wandb_internal_pb2

from train.monitor.dashboards import (
    BOTTOM,
    COLD,
    HOT,
    LEFT,
    NEUTRAL,
    RIGHT,
    SWATCH,
    TOP,
    UNKNOWN,
    Alert,
    Dashboard,
    ExpertWatch,
    WandbConfig,
    WandbMode,
    expert_values,
    heat_map,
    layer_drop_rates,
    load_histogram,
    load_share,
)
from train.monitor.metrics import LogConfig, MetricsWriter

LOAD = [[20, 10, 0, 50], [20, 20, 20, 20]]


def record_of(step: int, **changes: Any) -> dict[str, Any]:
    return {
        "step": step,
        "tokens": step * 4096,
        "loss": 2.5,
        "aux_loss": 1.25,
        "grad_norm": 0.5,
        "lr": 3e-4,
        "tokens_per_second": 1000.0,
        "mfu": None,
        "max_memory_gib": None,
        "drop_rate": 0.0,
        "moved_rate": 0.125,
        "router_entropy": 1.375,
        "z_loss": 0.75,
        "max_violation": 1.5,
        "skipped": 0,
        "stage": step // 4,
        "row_tokens": 256,
        "checkpoint_age_steps": step - 1,
        "spike_score": None,
        **changes,
    }


def experts_of(step: int, load: Any = LOAD, **changes: Any) -> dict[str, Any]:
    layers, experts = len(load), len(load[0])
    return {
        "step": step,
        "load": load,
        "dropped": [[0] * experts] * layers,
        "moved": [20, 0],
        "max_violation": [1.5, 0.0],
        "entropy": [1.25, 1.5],
        "aux_loss": [1.5, 1.0],
        **changes,
    }


def wandb_records(path: Path) -> Iterator[Any]:
    """Decode a .wandb file: 7 bytes of header, then LevelDB's log format in blocks of 32 KiB."""
    data, place, message = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while place < len(data):
        if (room := -place % 2**15) and room < 7:
            place += room  # a record's header does not fit at the end of a block
            continue
        _, length, part = struct.unpack_from("<IHB", data, place)
        message += data[place + 7 : place + 7 + length]
        place += 7 + length
        if part in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(message)
            message = b""
            yield record


def write_run(run_dir: Path, records: list[tuple[dict[str, Any], dict[str, Any]]]) -> list[Any]:
    """Write records as a run does, offline; the records of its .wandb file."""
    writer = MetricsWriter(
        run_dir, log_config=LogConfig(), console=Console(file=io.StringIO()), total_steps=9, step=0
    )
    writer.start_wandb(WandbConfig(mode=WandbMode.offline), name="mine", run_dir=run_dir, config={"a": 1})
    for record, experts in records:
        writer.write(record, experts)
    writer.close()
    wandb.teardown()  # waits for wandb's own process, which writes the file
    (path,) = run_dir.glob("wandb/offline-run-*/*.wandb")
    return list(wandb_records(path))


def history_of(records: list[Any]) -> list[dict[str, Any]]:
    """Logged values of each step by their names; a picture or histogram is a dict."""
    rows: list[dict[str, Any]] = []
    for record in records:
        if record.WhichOneof("record_type") == "history":
            rows.append({})
            for item in record.history.item:
                key, *parts = item.nested_key
                value = json.loads(item.value_json)
                if parts:
                    rows[-1].setdefault(key, {})[parts[0]] = value
                else:
                    rows[-1][key] = value
    return rows


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    """A run whose expert 2 of layer 0 is dead from step 3 on, and which drops at step 4."""
    run_dir = tmp_path_factory.mktemp("run")
    steps = [(record_of(step), experts_of(step)) for step in (1, 2, 3)]
    dropped = experts_of(4, dropped=[[0, 0, 0, 20], [5, 0, 0, 0]])
    steps += [(record_of(4, drop_rate=0.15625), dropped), (record_of(5), experts_of(5))]
    return run_dir, write_run(run_dir, steps)


def test_wandb_has_every_figure(offline: tuple[Path, list[Any]]) -> None:
    history = history_of(offline[1])
    assert [row["_step"] for row in history] == [1, 2, 3, 4, 5]
    shown = {key: value for key, value in history[4].items() if not key.startswith(("_", "moe/"))}
    assert shown == {
        "train/step": 5, "train/tokens": 20480, "train/loss": 2.5, "train/grad_norm": 0.5, "train/lr": 3e-4,
        "speed/tokens_per_second": 1000.0, "speed/mfu": None, "speed/max_memory_gib": None,
        "curriculum/stage": 1, "curriculum/row_tokens": 256, "checkpoint/checkpoint_age_steps": 4,
        "health/skipped": 0, "health/spike_score": None,
    }  # fmt: skip
    row = history[3]
    assert {key: value for key, value in row.items() if key.startswith("moe/") and "_map" not in key} == {
        "moe/drop_rate": 0.15625,
        "moe/max_violation": 1.5,
        "moe/moved_rate": 0.125,
        "moe/router_entropy": 1.375,
        "moe/aux_loss": 1.25,
        "moe/z_loss": 0.75,
        "moe/dead_experts": 1,
        "moe/max_violation/layer_00": 1.5,
        "moe/max_violation/layer_01": 0,
        "moe/drop_rate/layer_00": 0.25,
        "moe/drop_rate/layer_01": 0.0625,
        "moe/entropy/layer_00": 1.25,
        "moe/entropy/layer_01": 1.5,
        "moe/load_histogram": row["moe/load_histogram"],
    }
    bars = row["moe/load_histogram"]
    assert bars["_type"] == "histogram" and (bars["bins"][0], bars["bins"][-1]) == (0, 2.5)
    edges = zip(bars["bins"], bars["values"], strict=False)
    assert {edge: count for edge, count in edges if count} == pytest.approx(
        {0: 1, 0.46875: 1, 0.9765625: 5, 2.4609375: 1}
    )


def test_wandb_draws_over_tokens(offline: tuple[Path, list[Any]]) -> None:
    metrics = [record.metric for record in offline[1] if record.WhichOneof("record_type") == "metric"]
    axes = {metric.glob_name or metric.name: metric.step_metric for metric in metrics}
    panels = {key for key in axes if key.endswith("/*")}
    assert panels == {"train/*", "moe/*", "speed/*", "curriculum/*", "checkpoint/*", "health/*"}
    assert {axes[panel] for panel in panels} == {"train/tokens"}
    assert axes["train/tokens"] == axes["train/step"] == ""


def test_wandb_has_the_maps_as_files(offline: tuple[Path, list[Any]]) -> None:
    history = history_of(offline[1])
    assert [("moe/load_map" in row, "moe/drop_map" in row) for row in history] == [
        (True, step == 4) for step in (1, 2, 3, 4, 5)
    ]
    (files,) = offline[0].glob("wandb/offline-run-*/files")
    colours = {}
    for key in ("moe/load_map", "moe/drop_map"):
        shown = history[3][key]
        assert shown["_type"] == "image-file" and shown["caption"]
        with Image.open(files / shown["path"]) as picture:
            assert picture.format == "PNG" and picture.size == (shown["width"], shown["height"])
            assert picture.size == (LEFT + 5 * SWATCH + RIGHT, TOP + 2 * 32 + BOTTOM)
            colours[key] = cells(picture, 2, 4)
    half_cold, half_hot = between(NEUTRAL, COLD, 0.5), between(NEUTRAL, HOT, 0.5)
    assert colours["moe/load_map"] == [[NEUTRAL, half_cold, COLD, HOT], [NEUTRAL] * 4]
    drops = [[NEUTRAL, NEUTRAL, UNKNOWN, between(NEUTRAL, HOT, 0.8)], [half_hot, *[NEUTRAL] * 3]]
    assert colours["moe/drop_map"] == drops


def test_a_resume_goes_on_with_its_run(offline: tuple[Path, list[Any]], tmp_path: Path) -> None:
    ids = {record.run.run_id for record in offline[1] if record.WhichOneof("record_type") == "run"}
    shutil.copy(offline[0] / "wandb_id", tmp_path / "wandb_id")  # all that a resume finds of it
    again = write_run(tmp_path, [(record_of(6), experts_of(6))])
    assert {record.run.run_id for record in again if record.WhichOneof("record_type") == "run"} == ids
    assert len(ids) == 1 and [row["_step"] for row in history_of(again)] == [6]


def test_wandb_has_the_alerts(offline: tuple[Path, list[Any]]) -> None:
    alerts = [record.alert for record in offline[1] if record.WhichOneof("record_type") == "alert"]
    assert [(alert.title, alert.level) for alert in alerts] == [
        ("Dead experts", "WARN"), ("Many dropped choices", "WARN"),
    ]  # fmt: skip
    dead, drops = (alert.text for alert in alerts)
    assert dead == (
        "step 3: layer 0 expert 2: no choice in 3 intervals (log.dead_after), 1 dead in all; "
        "raise router.aux_loss_coefficient or lower optimizer.lr"
    )
    assert drops == (
        "step 4: 15.6% of the choices were dropped, more than log.max_drop_rate=0.1; "
        "worst is layer 0 with 25.0%; "
        "raise router.capacity_factor (null drops nothing) or router.aux_loss_coefficient"
    )


def test_console_warns_without_wandb(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    writer = MetricsWriter(
        tmp_path, log_config=LogConfig(dead_after=1), console=Console(), total_steps=9, step=0
    )
    writer.start_wandb(WandbConfig(), name="mine", run_dir=tmp_path, config={})
    writer.write(record_of(1), experts_of(1))
    writer.close()
    (warning,) = (entry for entry in caplog.records if entry.levelno == logging.WARNING)
    assert warning.getMessage().startswith("Dead experts at step 1: layer 0 expert 2: no choice")
    assert [path.name for path in tmp_path.iterdir() if "wandb" in path.name] == []


class BrokenRun:
    """A wandb run whose calls fail."""

    def __init__(self) -> None:
        self.calls = 0

    def log(self, *args: Any, **kwargs: Any) -> None:
        self.calls += 1
        raise OSError("disk full")

    alert = finish = log


@pytest.mark.parametrize("call", ["write", "alert", "close"])
def test_wandb_that_fails_is_switched_off(
    call: str, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    dashboard = Dashboard(WandbConfig(), name="mine", run_dir=tmp_path, config={})
    dashboard.run = broken = BrokenRun()
    arguments = {"write": (record_of(1), experts_of(1)), "alert": (Alert("a", "b"),), "close": ()}
    for _ in range(2):
        getattr(dashboard, call)(*arguments[call])
    assert broken.calls == 1 and caplog.text.count("wandb is off") == 1 and "disk full" in caplog.text


def test_our_own_errors_are_not_hidden(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise ZeroDivisionError

    dashboard = Dashboard(WandbConfig(), name="mine", run_dir=tmp_path, config={})
    dashboard.run = BrokenRun()
    for name in ("heat_map", "load_histogram", "expert_values"):
        with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
            patch.setattr(f"train.monitor.dashboards.{name}", fail)
            dashboard.write(record_of(1), experts_of(1))


def test_layer_names_sort_and_older_records_pass() -> None:
    load = np.full((101, 2), 9).tolist()
    values = expert_values({"load": load, "dropped": np.zeros((101, 2)).tolist()})
    curve = [key for key in values if key.startswith("moe/drop_rate/")]
    assert curve == sorted(curve) and curve[0] == "moe/drop_rate/layer_000"
    assert len(values) == 102 and values["moe/dead_experts"] == 0


def test_drop_rate_of_a_layer_without_choices_is_zero() -> None:
    load, dropped = np.array([[0.0, 0], [3, 5], [8, 8]]), np.array([[0.0, 0], [0, 2], [0, 2]])
    assert layer_drop_rates(load, dropped).tolist() == [0, 0.25, 0.125]


BALANCED = [[10, 10], [10, 10]]


def titles(watch: ExpertWatch, *loads: Any, **changes: Any) -> list[list[str]]:
    """Texts of the alerts after each load."""
    return [
        [alert.text for alert in watch.feed(record_of(step, **changes), experts_of(step, load))]
        for step, load in enumerate(loads, start=1)
    ]


def test_a_dead_expert_is_reported_at_each_begin() -> None:
    watch = ExpertWatch(dead_after=2, max_drop_rate=None)
    dead = [[20, 0], [10, 10]]
    texts = titles(watch, BALANCED, dead, dead, dead, BALANCED, dead, dead, dead)
    assert [len(found) for found in texts] == [0, 0, 1, 0, 0, 0, 1, 0]
    assert texts[2][0].startswith("step 3: layer 0 expert 1: no choice in 2 intervals")
    other = [[20, 0], [0, 20]]
    assert [len(found) for found in titles(watch, other, other, other)] == [0, 1, 0]


def test_a_second_death_names_only_the_new_expert() -> None:
    watch = ExpertWatch(dead_after=1, max_drop_rate=None)
    ((first,), (second,)) = titles(watch, [[20, 0], [10, 10]], [[20, 0], [0, 20]])
    assert "layer 0 expert 1:" in first and "1 dead in all" in first
    assert "layer 0" not in second and "layer 1 expert 0:" in second and "2 dead in all" in second


def test_many_dead_experts_are_counted() -> None:
    watch = ExpertWatch(dead_after=1, max_drop_rate=None)
    (((text),),) = titles(watch, [[160] + [0] * 15, [10] * 16])
    assert "layer 0 expert 5 and 10 more: no choice" in text and "expert 6" not in text
    assert "15 dead in all" in text


def test_small_loads_say_nothing_about_silence() -> None:
    watch = ExpertWatch(dead_after=2, max_drop_rate=None)
    small, dead = [[15, 0], [15, 0]], [[16, 0], [15, 0]]
    counts = [len(found) for found in titles(watch, small, small, small, dead, small, dead, small, dead)]
    assert counts == [0, 0, 0, 0, 0, 1, 0, 0]
    alive = [[0, 1], [1, 1]]  # too few choices on average, but there is one
    assert [len(found) for found in titles(watch, alive, dead, dead)] == [0, 0, 1]


def test_drops_are_reported_at_each_begin() -> None:
    watch = ExpertWatch(dead_after=None, max_drop_rate=0.1)
    found = []
    for step, rate in enumerate([0.1, 0.11, 0.2, 0.1, 0.3], start=1):
        experts = experts_of(step, BALANCED, dropped=[[1, 1], [1, 3]])
        found.append([alert.text for alert in watch.feed(record_of(step, drop_rate=rate), experts)])
    assert [len(texts) for texts in found] == [0, 1, 0, 0, 1]
    assert found[1][0].startswith(
        "step 2: 11.0% of the choices were dropped, more than log.max_drop_rate=0.1;"
    )
    assert "worst is layer 1 with 20.0%" in found[1][0]


def test_small_loads_say_nothing_about_drops() -> None:
    watch = ExpertWatch(dead_after=None, max_drop_rate=0.1)
    assert titles(watch, [[7, 8], [7, 8]], drop_rate=0.9) == [[]]
    assert len(titles(watch, [[8, 8], [8, 8]], drop_rate=0.9)[0]) == 1


def test_null_never_warns() -> None:
    watch = ExpertWatch(dead_after=None, max_drop_rate=None)
    assert titles(watch, *[[[90, 0], [90, 0]]] * 5, drop_rate=1.0) == [[]] * 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"every": 0}, "log.every=0 must be at least 1"),
        ({"dead_after": 0}, "log.dead_after=0 must be at least 1, or null"),
        ({"max_drop_rate": 1.5}, r"log.max_drop_rate=1.5 must lie in \[0, 1\], or null"),
        ({"max_drop_rate": math.nan}, r"log.max_drop_rate=nan must lie in \[0, 1\], or null"),
    ],
)
def test_log_config_ranges(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LogConfig(**changes)
    LogConfig(every=1, dead_after=1, max_drop_rate=0.0)
    LogConfig(dead_after=None, max_drop_rate=None)


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


def test_map_of_extreme_loads() -> None:
    load = np.array([[0.0, 0, 0, 0], [0, 0, 64, 0], [5, 5, 5, 5]])
    share = load_share(load)
    assert np.isnan(share[0]).all() and share[1:].tolist() == [[0, 0, 4, 0], [1, 1, 1, 1]]
    picture = heat_map(share, centre=1, limit=2)
    assert cells(picture, 3, 4) == [[UNKNOWN] * 4, [COLD, COLD, HOT, COLD], [NEUTRAL] * 4]
    counts, edges = load_histogram(load)
    assert (counts.sum(), counts[0], counts[-1], edges[-1]) == (8, 3, 1, 4.0)
    nothing = np.zeros((2, 3))
    assert cells(heat_map(load_share(nothing), centre=1, limit=2), 2, 3) == [[UNKNOWN] * 3] * 2
    assert load_histogram(nothing)[0].sum() == 0


@pytest.mark.parametrize(
    ("layers", "experts", "cell"), [(80, 32, 8), (2, 4, 32), (1, 1, 32), (60, 256, 8), (40, 8, 16)]
)
def test_cells_of_a_map_are_readable(layers: int, experts: int, cell: int) -> None:
    values = np.linspace(0, 2, layers * experts).reshape(layers, experts)
    picture = heat_map(values, centre=1, limit=2)
    width = LEFT + max(experts * cell, 5 * SWATCH) + RIGHT
    assert picture.size == (width, TOP + layers * cell + BOTTOM)
    right, bottom = LEFT + experts * cell - 1, TOP + layers * cell - 1
    corner = between(NEUTRAL, HOT, 1.0) if layers * experts > 1 else COLD
    assert picture.getpixel((right - 1, bottom - 1)) == corner
    assert picture.getpixel((right, bottom - 1)) == picture.getpixel((right - 1, bottom)) == (255, 255, 255)
    assert picture.crop((0, TOP, LEFT, TOP + cell)).getcolors(1000) != [(LEFT * cell, (255, 255, 255))]


def test_legend_shows_the_scale() -> None:
    picture = heat_map(np.ones((2, 2)), centre=1, limit=2)
    row = [picture.getpixel((LEFT + (i * SWATCH) + 3, picture.height - BOTTOM + 10)) for i in range(5)]
    assert row == [COLD, between(NEUTRAL, COLD, 0.5), NEUTRAL, between(NEUTRAL, HOT, 0.5), HOT]
