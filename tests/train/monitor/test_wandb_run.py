"""What an offline wandb run holds, and what happens when wandb fails."""

import io
import json
import logging
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

from tests.support.expert_records import between, cells, experts_of, record_of
from train.monitor.alerts import Alert
from train.monitor.heat_maps import BOTTOM, COLD, HOT, LEFT, NEUTRAL, RIGHT, SWATCH, TOP, UNKNOWN
from train.monitor.metrics import LogConfig, MetricsWriter
from train.monitor.wandb_run import Dashboard, WandbConfig, WandbMode, expert_values


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
    assert bars["_type"] == "histogram"
    assert (bars["bins"][0], bars["bins"][-1]) == (0, 2.5)
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
        assert shown["_type"] == "image-file"
        assert shown["caption"]
        with Image.open(files / shown["path"]) as picture:
            assert picture.format == "PNG"
            assert picture.size == (shown["width"], shown["height"])
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
    assert len(ids) == 1
    assert [row["_step"] for row in history_of(again)] == [6]


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
    assert broken.calls == 1
    assert caplog.text.count("wandb is off") == 1
    assert "disk full" in caplog.text


def test_our_own_errors_are_not_hidden(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise ZeroDivisionError

    dashboard = Dashboard(WandbConfig(), name="mine", run_dir=tmp_path, config={})
    dashboard.run = BrokenRun()
    for name in ("expert_maps", "load_histogram", "expert_values"):
        with monkeypatch.context() as patch:
            patch.setattr(f"train.monitor.wandb_run.{name}", fail)
            with pytest.raises(ZeroDivisionError):
                dashboard.write(record_of(1), experts_of(1))


def test_layer_names_sort_and_older_records_pass() -> None:
    load = np.full((101, 2), 9).tolist()
    values = expert_values({"load": load, "dropped": np.zeros((101, 2)).tolist()})
    curve = [key for key in values if key.startswith("moe/drop_rate/")]
    assert curve == sorted(curve)
    assert curve[0] == "moe/drop_rate/layer_000"
    assert len(values) == 102
    assert values["moe/dead_experts"] == 0
