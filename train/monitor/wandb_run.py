"""One wandb run: curves by panel, maps and alerts.

`load` and `dropped` are [layers][experts], counted since the last record; `load` counts choices before drops.
What wandb itself raises is a warning and switches it off; nothing here can stop the run.
"""

import logging
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, cast

import numpy as np

from train.monitor.alerts import Alert, layer_drop_rates
from train.monitor.heat_maps import expert_maps, load_share

log = logging.getLogger(__name__)

PANELS = {
    "moe": ("drop_rate", "max_violation", "moved_rate", "router_entropy", "aux_loss", "z_loss"),
    "speed": ("tokens_per_second", "mfu", "max_memory_gib", "data_wait_ms", "slow_score"),
    "curriculum": ("stage", "row_tokens", "global_tokens", "padding", "truncated_tokens"),
    "checkpoint": ("checkpoint_age_steps", "checkpoint_seconds"),
    "health": ("skipped", "spike_score"),
}
"""Keys of a record by the group of panels that shows them; the others are under `train/`."""
WandbMode = StrEnum("WandbMode", ["online", "offline", "disabled"])
"""Where wandb's data goes."""


@dataclass(kw_only=True)
class WandbConfig:
    """Weights & Biases, from rank 0 only."""

    mode: WandbMode = WandbMode.disabled
    """online, offline (sync later) or disabled."""
    project: str = "longspan"
    """Project of the run."""


class Dashboard:
    """One wandb run; the first failure of wandb ends it with a warning."""

    def __init__(self, cfg: WandbConfig, *, name: str, run_dir: Path, config: Mapping[str, Any]) -> None:
        """Open the wandb run, the same one after a resume."""
        self.run: Any = None
        if cfg.mode is WandbMode.disabled:
            return
        with self._optional("its start"):
            import wandb

            self.run = wandb.init(
                project=cfg.project, name=name, id=_wandb_id(run_dir), resume="allow", dir=str(run_dir),
                mode=cast(Any, cfg.mode.value), config=dict(config),
                settings=wandb.Settings(init_timeout=60, console="off"),
            )  # fmt: skip
            # Tokens compare runs of different batches; step is a choice away in wandb. An exact name wins
            # over a pattern, so the axes themselves stay without one.
            for axis in ("train/tokens", "train/step"):
                self.run.define_metric(axis)
            for panel in ("train", *PANELS):
                self.run.define_metric(f"{panel}/*", step_metric="train/tokens")

    def write(self, record: Mapping[str, Any], experts: Mapping[str, Any]) -> None:
        """Log one record: its numbers by panel, expert figures and pictures under `moe/`."""
        if self.run is None:
            return
        values = panel_values(record) | expert_values(experts)
        maps, bars = expert_maps(experts), load_histogram(np.array(experts["load"], dtype=float))
        with self._optional(f"step {record['step']}"):
            import wandb

            media: dict[str, Any] = {
                key: wandb.Image(picture, caption=text) for key, (picture, text) in maps.items()
            }
            media["moe/load_histogram"] = wandb.Histogram(np_histogram=bars)
            self.run.log(values | media, step=record["step"])

    def alert(self, alert: Alert) -> None:
        """Send one alert; wandb itself leaves out a title that it had a minute ago."""
        if self.run is not None:
            with self._optional("an alert"):
                self.run.alert(title=alert.title, text=alert.text, level="WARN")

    def close(self) -> None:
        """End the wandb run."""
        if self.run is not None:
            with self._optional("its end"):
                self.run.finish()

    @contextmanager
    def _optional(self, what: str) -> Iterator[None]:
        """Whatever wandb meets, the run goes on; only what wandb needs belongs inside."""
        try:
            yield
        except Exception as error:
            log.warning("wandb is off, %s failed: %s", what, error)
            self.run = None


def panel_values(record: Mapping[str, Any]) -> dict[str, float | None]:
    """A record's numbers as `PANEL/KEY`."""
    panels = {key: panel for panel, keys in PANELS.items() for key in keys}
    return {f"{panels.get(key, 'train')}/{key}": value for key, value in record.items()}


def expert_values(experts: Mapping[str, Any]) -> dict[str, float]:
    """More numbers under `moe/`: dead experts, and one curve a layer."""
    load, dropped = (np.array(experts[key], dtype=float) for key in ("load", "dropped"))
    values: dict[str, float] = {"moe/dead_experts": int((load == 0).sum())}
    curves: dict[str, Sequence[float]] = {
        "max_violation": experts.get("max_violation", []),
        "drop_rate": layer_drop_rates(load, dropped).tolist(),
        "entropy": experts.get("entropy", []),
    }
    digits = max(2, len(str(len(load) - 1)))  # padded, so that wandb sorts the layers
    for name, curve in curves.items():
        values |= {f"moe/{name}/layer_{layer:0{digits}}": value for layer, value in enumerate(curve)}
    return values


def load_histogram(load: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Counts and edges of load / layer mean over all experts, from 0 to at least 2."""
    share = load_share(load)
    share = share[np.isfinite(share)]
    return np.histogram(share, bins=64, range=(0, max(2.0, share.max(initial=0))))


def _wandb_id(run_dir: Path) -> str:
    """The wandb id kept in the run directory, so that every restart continues one run."""
    path = run_dir / "wandb_id"
    if not path.exists():
        path.write_text(secrets.token_hex(4) + "\n", encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()
