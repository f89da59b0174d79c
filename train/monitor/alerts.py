"""Alerts about experts: which of them are dead, and when too many choices are dropped."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

MIN_MEAN_LOAD = 8
"""Choices an expert must have on average before an interval says anything: at a mean of 8, a healthy expert
has none in one interval of 3000."""
NAMED = 5  # experts that an alert spells out


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


def layer_drop_rates(load: np.ndarray, dropped: np.ndarray) -> np.ndarray:
    """Dropped / choices of each layer, 0 without choices."""
    return dropped.sum(axis=1) / np.maximum(load.sum(axis=1), 1)
