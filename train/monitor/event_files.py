"""TensorBoard's event files, an option: `tensorboard --logdir RUN_DIR/tensorboard`; rank 0 only."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np

from train.monitor.alerts import Alert
from train.monitor.heat_maps import expert_maps
from train.monitor.wandb_run import expert_values, panel_values

log = logging.getLogger(__name__)


TensorboardMode = StrEnum("TensorboardMode", ["files", "disabled"])
"""Whether event files are written."""


@dataclass(kw_only=True)
class TensorboardConfig:
    """TensorBoard, from rank 0 only."""

    mode: TensorboardMode = TensorboardMode.disabled
    """files: RUN_DIR/tensorboard, with the figures that wandb has; needs the package tensorboard."""


class EventFiles:
    """The event files of one run; the first failure ends them with a warning, as training goes on."""

    def __init__(self, cfg: TensorboardConfig, run_dir: Path, step: int) -> None:
        """Go on after `step`: what an earlier start wrote of later steps is not shown."""
        self.writer: Any = None
        self.step = step
        """Of the newest record: where an alert is shown."""
        if cfg.mode is TensorboardMode.disabled:
            return
        try:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(run_dir / "tensorboard", purge_step=step + 1)
        except (ImportError, OSError) as error:
            log.warning(
                "tensorboard.mode=files is off: %s; pip install tensorboard, or set it to disabled", error
            )

    def write(self, record: Mapping[str, Any], experts: Mapping[str, Any]) -> None:
        """Write one record: its numbers by panel, expert figures and maps under `moe/`."""
        if self.writer is None:
            return
        step = record["step"]
        values = {key: value for key, value in panel_values(record).items() if value is not None}
        self.step = step
        maps = expert_maps(experts)
        with self._optional(f"step {step}"):
            for key, value in (values | expert_values(experts)).items():
                self.writer.add_scalar(key, value, step)
            for key, (picture, _) in maps.items():
                self.writer.add_image(key, np.asarray(picture), step, dataformats="HWC")
            self.writer.flush()

    def alert(self, alert: Alert) -> None:
        """Show one alert as a text."""
        if self.writer is not None:
            with self._optional("an alert"):
                self.writer.add_text(f"alerts/{alert.title}", alert.text, self.step)
                self.writer.flush()

    def close(self) -> None:
        """End the files."""
        if self.writer is not None:
            self.writer.close()

    @contextmanager
    def _optional(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            log.warning("tensorboard is off, %s failed: %s", what, error)
            self.writer = None
