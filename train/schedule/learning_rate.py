"""Learning rate as a pure function of the consumed input tokens: warm-up, stable, decay."""

import math
from dataclasses import dataclass
from enum import StrEnum

DecayShape = StrEnum("DecayShape", ["cosine", "linear", "exponential"])
"""Form of the last segment, from the peak to min_lr_ratio of it."""


@dataclass(kw_only=True)
class ScheduleConfig:
    """Lengths in input tokens; everything between warm-up and decay is constant."""

    warmup_tokens: int = 0
    """Length of the linear rise from 0; may be longer than the run."""
    decay_tokens: int = 0
    """Length of the decay at the run's end; a shorter run begins in mid-decay."""
    decay_shape: DecayShape = DecayShape.cosine
    """Form of the decay."""
    min_lr_ratio: float = 0.1
    """Last learning rate as a part of the peak."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        for key in ("warmup_tokens", "decay_tokens"):
            if getattr(self, key) < 0:
                raise ValueError(f"schedule.{key}={getattr(self, key)} must be >= 0")
        if not 0 <= self.min_lr_ratio <= 1:
            raise ValueError(f"schedule.min_lr_ratio={self.min_lr_ratio} must lie in [0, 1]")
        if self.decay_shape is DecayShape.exponential and self.min_lr_ratio == 0:
            raise ValueError(
                "schedule.min_lr_ratio=0: an exponential decay never ends at 0; use a positive ratio"
            )


def lr_factor(tokens: int, total_tokens: int, cfg: ScheduleConfig) -> float:
    """Return the learning rate as a part of the peak for the step that ends at `tokens` of `total_tokens`."""
    rise = min(1.0, tokens / cfg.warmup_tokens) if cfg.warmup_tokens else 1.0
    into_decay = tokens - (total_tokens - cfg.decay_tokens)
    if into_decay <= 0:
        return rise
    part, low = min(1.0, into_decay / cfg.decay_tokens), cfg.min_lr_ratio
    match cfg.decay_shape:
        case DecayShape.linear:
            fall = 1 - part * (1 - low)
        case DecayShape.cosine:
            fall = low + (1 - low) * (1 + math.cos(math.pi * part)) / 2
        case DecayShape.exponential:
            fall = low**part
    return rise * fall
