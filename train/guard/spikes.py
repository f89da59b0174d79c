"""Numbers that go wrong: what is a spike, which step is skipped, where a non-finite value arose.

Invariant: decisions follow from values that are the same on every rank, so all ranks decide alike.
"""

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor

from parallel.collectives import Axis
from parallel.placement import Shard
from train.guard.integrity import some

OnSpike = StrEnum("OnSpike", ["log", "clip", "skip"])
"""What follows a spike."""
Rerun = StrEnum("Rerun", ["never", "on_suspicion"])
"""When forward and backward of a step run again before its update."""


@dataclass(kw_only=True)
class HealthConfig:
    """What a run does about numbers that go wrong."""

    window: int = 128
    """Steps over which mean and deviation are taken; from half as many on, a step can be a spike."""
    spike_sigmas: float = 6.0
    """Deviations above the mean at which loss or gradient norm is a spike."""
    on_spike: OnSpike = OnSpike.log
    """log: say so; clip: scale the gradient down to what is usual (arXiv 2504.02507), the window gets the
    largest value that is no spike; skip: leave weights, moments and window alone."""
    max_skips_in_row: int | None = 10
    """Skipped steps in a row at which the run ends as FAILED, without saving, if the last of them was not
    finite; a spike behind as many is not skipped: it is the new level. null = never."""

    rerun: Rerun = Rerun.never
    """on_suspicion: compute a spike or a non-finite step once more; other bits were a transient error, and
    the second result counts; the same bits are the data's doing. Needs train.deterministic, or the CPU."""
    hash_every: int | None = None
    """Steps between hashes of weights and moments, each checked before the next update or save; null = never.
    1 covers all the time between updates, N an N-th of it."""

    slow_score: float | None = 0.75
    """A rank is reported whose own time in a section of the step is above the median of its pipeline stage by
    more than 1 / this; null = nobody looks."""

    setup_timeout_s: float | None = None
    """Seconds from the ranks' meeting to the first step at which a rank counts as hung and ends the job with
    code 75; null = never. Text that is still to be tokenized counts."""
    step_timeout_s: float | None = None
    """Seconds at which one step counts as hung; null = never. The first step may compile."""
    eval_timeout_s: float | None = None
    """Seconds at which one evaluation counts as hung; null = never."""
    checkpoint_timeout_s: float | None = None
    """Seconds at which one save counts as hung; null = never."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.window < 4:
            raise ValueError(f"health.window={self.window} must be at least 4")
        if self.spike_sigmas <= 0:
            raise ValueError(f"health.spike_sigmas={self.spike_sigmas} must be above 0")
        if self.slow_score is not None and not 0 < self.slow_score < 1:
            raise ValueError(
                f"health.slow_score={self.slow_score} must lie between 0 and 1, or null = nobody looks"
            )
        if self.hash_every is not None and self.hash_every < 1:
            raise ValueError(f"health.hash_every={self.hash_every} must be at least 1, or null = never")
        for key in ("setup_timeout_s", "step_timeout_s", "eval_timeout_s", "checkpoint_timeout_s"):
            limit = getattr(self, key)
            if limit is not None and limit <= 0:
                raise ValueError(f"health.{key}={limit} must be above 0, or null = never")
        if self.max_skips_in_row is not None and self.max_skips_in_row < 1:
            raise ValueError(
                f"health.max_skips_in_row={self.max_skips_in_row} must be at least 1, or null = never"
            )


@dataclass(frozen=True)
class Verdict:
    """What the loss and the gradient norm of a step say about it."""

    skipped: bool
    """Nothing is to be updated: a value is not finite, or a spike that the configuration skips."""
    score: float | None = None
    """Standard deviations above the mean, of loss or norm, whichever is more; None = cannot be told."""
    spike: str | None = None
    """What was a spike, for people; None = nothing."""
    norm_limit: float = math.inf
    """Largest gradient norm that the update may use; infinity = any."""
    gave_up: str | None = None
    """Why the run is to end without a save; None = it goes on."""


class Health:
    """Judges each step by its loss and gradient norm; the state is the same on every rank."""

    def __init__(self, cfg: HealthConfig) -> None:
        self.cfg = cfg
        self.skips_in_row = 0
        self.windows = {key: deque[float](maxlen=cfg.window) for key in ("loss", "grad_norm")}
        """Finite values of this stage's steps that were not skipped, oldest first."""

    def begin_level(self) -> None:
        """Forget what is usual: another curriculum stage has another loss and gradient norm."""
        for window in self.windows.values():
            window.clear()

    def judge(self, loss: float, grad_norm: float) -> Verdict:
        """Judge a step, once, before its update."""
        values = {"loss": loss, "grad_norm": grad_norm}
        skipped = not math.isfinite(loss + grad_norm)
        score, spike, norm_limit = None, None, math.inf
        if not skipped and (scores := self._scores(values)):
            key, score = max(scores.items(), key=lambda item: item[1])
            if score > self.cfg.spike_sigmas:
                size = len(self.windows[key])
                spike = f"{key} {values[key]:.4g} is {score:.1f} deviations above that of {size} steps"
                match self.cfg.on_spike:
                    case OnSpike.clip:
                        norm_limit = self._usual_norm(grad_norm, scores["grad_norm"])
                        values = {key: min(value, self._most(key)) for key, value in values.items()}
                    case OnSpike.skip if self._has_skipped_too_often():
                        spike += f"; {self.skips_in_row} in a row were skipped, so this is the new level"
                        self.begin_level()
                    case OnSpike.skip:
                        skipped = True
        if not skipped:
            for key, value in values.items():
                self.windows[key].append(value)
        self.skips_in_row = self.skips_in_row + 1 if skipped else 0
        gave_up = None
        if self._has_skipped_too_often() and spike is None:
            gave_up = (
                f"{self.skips_in_row} steps in a row were skipped (health.max_skips_in_row="
                f"{self.cfg.max_skips_in_row}); this step was not saved, the last checkpoint is from before"
            )
        return Verdict(skipped, score, spike, norm_limit, gave_up)

    def suspects(self, loss: float, grad_norm: float) -> bool:
        """Tell whether a step with these values is non-finite or a spike; changes nothing."""
        scores = self._scores({"loss": loss, "grad_norm": grad_norm})
        return not math.isfinite(loss + grad_norm) or max(scores.values(), default=0) > self.cfg.spike_sigmas

    def _scores(self, values: Mapping[str, float]) -> dict[str, float]:
        """Return the deviations above the mean; {} while the window is less than half full."""
        if 2 * len(self.windows["loss"]) < self.cfg.window:
            return {}
        return {key: deviations(value, self.windows[key]) for key, value in values.items()}

    def _most(self, key: str) -> float:
        """Return the largest value that is no spike: if the level changes for good, the window follows."""
        mean, deviation = spread(self.windows[key])
        return mean + self.cfg.spike_sigmas * deviation

    def _has_skipped_too_often(self) -> bool:
        limit = self.cfg.max_skips_in_row
        return limit is not None and self.skips_in_row >= limit

    def _usual_norm(self, norm: float, score: float) -> float:
        """Return mean + sigmas^2 / score deviations: farther out is nearer the mean (arXiv 2504.02507)."""
        if score <= self.cfg.spike_sigmas:
            return norm  # the loss is the spike
        mean, _ = spread(self.windows["grad_norm"])
        return mean + (norm - mean) * (self.cfg.spike_sigmas / score) ** 2

    def state_dict(self) -> dict[str, Any]:
        """Return the state as JSON values."""
        windows = {key: list(values) for key, values in self.windows.items()}
        return {"skips_in_row": self.skips_in_row, "windows": windows}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state."""
        self.skips_in_row = state["skips_in_row"]
        for key, values in state["windows"].items():
            self.windows[key].extend(values)


def deviations(value: float, window: Sequence[float]) -> float:
    """Count the standard deviations that a value lies above the mean of a window."""
    mean, deviation = spread(window)
    return (value - mean) / deviation


def spread(window: Sequence[float]) -> tuple[float, float]:
    """Return mean and standard deviation, never quite 0: a flat window makes no spike of noise."""
    mean = math.fsum(window) / len(window)
    deviation = math.sqrt(math.fsum((each - mean) ** 2 for each in window) / len(window))
    return mean, max(deviation, 1e-6 * abs(mean), 1e-12)


@torch.no_grad()
def find_non_finite(
    losses: Sequence[Tensor], shards: Sequence[Shard], *, dp: Axis, micro_rows: int,
    documents_at: Callable[[int, Tensor], Sequence[str]] = lambda number, bad: [],
) -> str | None:  # fmt: skip
    """Say where this rank sees non-finite values, if it does. Reads from the device: for skipped steps only.

    Args:
        losses: of each micro-batch of the step, [micro_rows, tokens/cp] or a scalar.
        shards: whose gradients to look at where the losses are finite.
        dp: the data-parallel axis, to number rows.
        micro_rows: rows of a micro-batch on this rank.
        documents_at: names those of a micro-batch under a mask [micro_rows, tokens/cp].
    """
    found = []
    for number, loss in enumerate(losses):
        bad = ~loss.isfinite()
        if bad.any():
            rows = bad.any(1).nonzero().flatten().tolist() if bad.dim() else range(micro_rows)
            first = (number * dp.size + dp.rank) * micro_rows
            found.append(f"loss of micro-batch {number}, rows {[first + row for row in rows]} of the step")
            if bad.dim() and (names := documents_at(number, bad.cpu())):
                found[-1] += f" ({some(names)})"
    if not found:
        names = [s.name for s in shards if s.master.grad is not None and not s.master.grad.isfinite().all()]
        found = [f"gradient of {name}" for name in names]
    return some(found, "; ") or None
