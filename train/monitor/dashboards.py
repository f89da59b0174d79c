"""Expert load for people: curves and heat maps in wandb, and alerts about dead experts and dropped choices.

`load` and `dropped` are [layers][experts], counted since the last record; `load` counts choices before drops.
What wandb itself raises is a warning and switches it off; nothing here can stop the run.
"""

import logging
import math
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from PIL import Image, ImageDraw

log = logging.getLogger(__name__)

PANELS = {
    "moe": ("drop_rate", "max_violation", "moved_rate", "router_entropy", "aux_loss", "z_loss"),
    "speed": ("tokens_per_second", "mfu", "max_memory_gib", "data_wait_ms", "slow_score"),
    "curriculum": ("stage", "row_tokens", "global_tokens", "padding", "truncated_tokens"),
    "checkpoint": ("checkpoint_age_steps", "checkpoint_seconds"),
    "health": ("skipped", "spike_score"),
}
"""Keys of a record by the group of panels that shows them; the others are under `train/`."""
MIN_MEAN_LOAD = 8
"""Choices an expert must have on average before an interval says anything: at a mean of 8, a healthy expert
has none in one interval of 3000."""
NAMED = 5  # experts that an alert spells out

LOAD_LIMIT, DROP_LIMIT = (
    2.0,
    0.5,
)  # the values at which a map's red is full, fixed so that steps can be compared
COLD, NEUTRAL, HOT, UNKNOWN = (42, 111, 214), (237, 237, 234), (208, 59, 59), (176, 176, 180)
INK = (70, 70, 76)
LEFT, TOP, RIGHT, BOTTOM = 34, 32, 12, 36  # margins of a map in pixels
SWATCH = 34  # width of one sample in the legend


class WandbMode(StrEnum):
    """Where wandb's data goes."""

    online = "online"
    offline = "offline"
    disabled = "disabled"


@dataclass(kw_only=True)
class WandbConfig:
    """Weights & Biases, from rank 0 only."""

    mode: WandbMode = WandbMode.disabled
    """online, offline (sync later) or disabled."""
    project: str = "longspan"
    """Project of the run."""


class Alert(NamedTuple):
    """A condition that has just begun; wandb wants titles below 64 characters."""

    title: str
    text: str


class ExpertWatch:
    """Notices when experts die and when drops pass their limit; says so once, and again only after an end.

    A resumed run starts with a fresh watch: a condition that goes on is reported once more.
    """

    def __init__(self, *, dead_after: int | None, max_drop_rate: float | None) -> None:
        self.dead_after, self.max_drop_rate = dead_after, max_drop_rate
        self.silent = np.zeros((1, 1), dtype=int)
        """Intervals without a choice, [layers, experts] from the first record on."""
        self.dropping = False

    def feed(self, record: Mapping[str, Any], experts: Mapping[str, Any]) -> list[Alert]:
        """Take one record; return what begins with it."""
        load, dropped = (np.array(experts[key], dtype=float) for key in ("load", "dropped"))
        return self._dead(record["step"], load) + self._drops(record, load, dropped)

    def _dead(self, step: int, load: np.ndarray) -> list[Alert]:
        if self.dead_after is None:
            return []
        before = self.silent >= self.dead_after
        telling = load.mean(axis=1, keepdims=True) >= MIN_MEAN_LOAD
        self.silent = np.where(load > 0, 0, self.silent + telling)
        dead = self.silent >= self.dead_after
        begun = np.argwhere(dead & ~before)
        if not len(begun):
            return []
        names = ", ".join(f"layer {layer} expert {expert}" for layer, expert in begun[:NAMED])
        more = f" and {len(begun) - NAMED} more" if len(begun) > NAMED else ""
        text = (
            f"step {step}: {names}{more}: no choice in {self.dead_after} intervals (log.dead_after), "
            f"{dead.sum()} dead in all; raise router.aux_loss_coefficient or lower optimizer.lr"
        )
        return [Alert("Dead experts", text)]

    def _drops(self, record: Mapping[str, Any], load: np.ndarray, dropped: np.ndarray) -> list[Alert]:
        if self.max_drop_rate is None or load.mean() < MIN_MEAN_LOAD:
            return []
        rate, before = record["drop_rate"], self.dropping
        self.dropping = rate > self.max_drop_rate
        if before or not self.dropping:
            return []
        by_layer = layer_drop_rates(load, dropped)
        worst = int(by_layer.argmax())
        text = (
            f"step {record['step']}: {100 * rate:.1f}% of the choices were dropped, more than "
            f"log.max_drop_rate={self.max_drop_rate:g}; worst is layer {worst} with "
            f"{100 * by_layer[worst]:.1f}%; raise router.capacity_factor (null drops nothing) or "
            "router.aux_loss_coefficient"
        )
        return [Alert("Many dropped choices", text)]


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
                project=cfg.project,
                name=name,
                id=_wandb_id(run_dir),
                resume="allow",
                dir=str(run_dir),
                mode=cast(Any, cfg.mode.value),
                config=dict(config),
                settings=wandb.Settings(init_timeout=60, console="off"),
            )
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


def expert_maps(experts: Mapping[str, Any]) -> dict[str, tuple[Image.Image, str]]:
    """Pictures under `moe/` with captions: loads, and drops where there are any."""
    load, dropped = (np.array(experts[key], dtype=float) for key in ("load", "dropped"))
    picture = heat_map(load_share(load), centre=1, limit=LOAD_LIMIT)
    maps = {"moe/load_map": (picture, "choices / layer mean")}
    if dropped.any():
        picture = heat_map(_ratio(dropped, load), centre=0, limit=DROP_LIMIT)
        maps["moe/drop_map"] = (picture, "dropped / choices")
    return maps


def layer_drop_rates(load: np.ndarray, dropped: np.ndarray) -> np.ndarray:
    """Dropped / choices of each layer, 0 without choices."""
    return dropped.sum(axis=1) / np.maximum(load.sum(axis=1), 1)


def load_share(load: np.ndarray) -> np.ndarray:
    """Load / layer mean, [layers, experts]; 1 is balanced, NaN a layer without choices."""
    return _ratio(load, np.broadcast_to(load.mean(axis=1, keepdims=True), load.shape))


def load_histogram(load: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Counts and edges of load / layer mean over all experts, from 0 to at least 2."""
    share = load_share(load)
    share = share[np.isfinite(share)]
    return np.histogram(share, bins=64, range=(0, max(2.0, share.max(initial=0))))


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


def _wandb_id(run_dir: Path) -> str:
    """The wandb id kept in the run directory, so that every restart continues one run."""
    path = run_dir / "wandb_id"
    if not path.exists():
        path.write_text(secrets.token_hex(4) + "\n", encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()
