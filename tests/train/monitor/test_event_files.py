"""TensorBoard's files, read back by TensorBoard itself."""

import io
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.support.expert_records import LOAD, experts_of, record_of
from train.monitor.event_files import TensorboardConfig, TensorboardMode
from train.monitor.heat_maps import LOAD_LIMIT, load_share, paint
from train.monitor.metrics import LogConfig, MetricsWriter
from train.monitor.wandb_run import panel_values

FILES = TensorboardConfig(mode=TensorboardMode.files)


def write(run_dir: Path, step: int, *losses: float) -> None:
    """A start that goes on after `step`."""
    writer = MetricsWriter(
        run_dir, log_config=LogConfig(), console=Console(file=io.StringIO()), total_steps=9, step=step
    )
    writer.start_tensorboard(FILES, run_dir=run_dir, step=step)
    for number, loss in enumerate(losses, start=step + 1):
        writer.write(record_of(number, loss=loss), experts_of(number))
    writer.close()


def test_what_a_resume_leaves_behind_is_not_shown(tmp_path: Path) -> None:
    write(tmp_path, 0, 5.0, 4.5, 4.0, 99.0, 99.0)
    write(tmp_path, 3, 3.5)
    seen = EventAccumulator(str(tmp_path / "tensorboard"), purge_orphaned_data=True).Reload()
    assert [(event.step, event.value) for event in seen.Scalars("train/loss")] == [
        (1, 5.0), (2, 4.5), (3, 4.0), (4, 3.5),
    ]  # fmt: skip
    for key, value in panel_values(record_of(4, loss=3.5)).items():
        if value is not None:
            assert seen.Scalars(key)[-1].value == pytest.approx(value, rel=1e-6), key
    assert seen.Scalars("moe/dead_experts")[-1].value == 1
    shown = np.asarray(Image.open(io.BytesIO(seen.Images("moe/load_map")[-1].encoded_image_string)))
    drawn = paint(load_share(np.array(LOAD, dtype=float)), centre=1, limit=LOAD_LIMIT)
    np.testing.assert_array_equal(shown, np.asarray(drawn))
    (alert,) = seen.Tensors("alerts/Dead experts/text_summary")
    (text,) = alert.tensor_proto.string_val
    assert alert.step == 3
    assert b"layer 0 expert 2: no choice in 3 intervals" in text


def test_without_the_package_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    write(tmp_path, 0, 5.0, 4.0)
    assert "tensorboard.mode=files is off" in caplog.text
    assert "pip install tensorboard" in caplog.text
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    assert not (tmp_path / "tensorboard").exists()
