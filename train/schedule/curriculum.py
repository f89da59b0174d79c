"""A run in stages: row length, batch, RoPE base, mixture, learning rate and layout as functions of tokens.

Invariant: what a step does depends on the configuration and the tokens consumed before it, on nothing else;
so a run that goes on from a checkpoint finds its stage, its place in it, and its next stage's border.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from data.mixture import Mixture
from parallel.config import ParallelConfig, Schedule, StateExchange

LrShape = StrEnum("LrShape", ["constant", "cosine", "linear", "exponential"])
"""How a stage's learning rate goes from lr to lr_end."""


@dataclass(kw_only=True)
class CurriculumStageLayout:
    """Fields of `parallel` that a stage overrides; null = as in the run."""

    pp: int | None = None
    """Pipeline stages."""
    cp: int | None = None
    """Ranks that share a row's tokens."""
    tp: int | None = None
    """Ranks that share the heads."""
    ep: int | None = None
    """Ranks that share the experts."""
    etp: int | None = None
    """Ranks that share an expert's ffn."""
    schedule: Schedule | None = None
    """Pipeline schedule."""
    cp_state_exchange: StateExchange | None = None
    """How lightning states pass between chunks."""
    zero_stage: int | None = None
    """What is kept sharded."""

    def apply(self, cfg: ParallelConfig) -> ParallelConfig:
        """Return the run's layout with these fields changed."""
        return dataclasses.replace(cfg, **{key: v for key, v in vars(self).items() if v is not None})


@dataclass(kw_only=True)
class CurriculumStageConfig:
    """One stage of a curriculum; what is null is as in the run (or in the stage's own batch.*, model.*)."""

    name: str
    """Name of the stage, for people."""
    tokens: int
    """Input tokens of the stage; rounded up to whole steps."""
    row_tokens: int | None = None
    """Context length."""
    global_tokens: int | None = None
    """Tokens of an optimizer step."""
    micro_rows: int | None = None
    """Rows that a data-parallel rank runs at once."""
    rope_theta: float | None = None
    """Base of the rotary frequencies."""
    weights: list[float] | None = None
    """Weights of the sources, in the order of data.sources."""
    length_shares: list[float] | None = None
    """Token shares of the document lengths between data.length_bounds."""
    transition_tokens: int = 0
    """Over so many tokens, weights and shares move linearly from the stage before to this one's."""
    final_fraction: float = 0.0
    """Last part of the stage in which final_weights hold, such as 0.2."""
    final_weights: list[float] | None = None
    """Weights of the sources in the last part of the stage."""
    lr: float | None = None
    """Learning rate at the stage's start, after the warm-up; null = optimizer.lr."""
    lr_end: float | None = None
    """Learning rate at the stage's end."""
    lr_shape: LrShape = LrShape.constant
    """How the learning rate goes from lr to lr_end."""
    parallel: CurriculumStageLayout = field(default_factory=CurriculumStageLayout)
    """Where the layout differs; a change ends the process, and the same command goes on."""

    def __post_init__(self) -> None:
        """Check each value by itself."""
        where = f"curriculum stage {self.name}"
        for key in ("tokens", "row_tokens", "global_tokens", "micro_rows", "rope_theta", "lr"):
            value = getattr(self, key)
            if isinstance(value, int | float) and not 0 < value < math.inf:
                raise ValueError(f"{where}: {key}={value} must be above 0")
        if isinstance(self.tokens, int) and not 0 <= self.transition_tokens <= self.tokens:
            raise ValueError(
                f"{where}: transition_tokens={self.transition_tokens} must lie in [0, tokens={self.tokens}]"
            )
        if not 0 <= self.final_fraction < 1 or (self.final_fraction > 0) != (self.final_weights is not None):
            raise ValueError(
                f"{where}: final_fraction={self.final_fraction} must lie in [0, 1) and needs final_weights "
                "if above 0; give both or neither"
            )
        if (self.lr_end is not None) == (self.lr_shape is LrShape.constant):
            raise ValueError(
                f"{where}: lr_end={self.lr_end}, lr_shape={self.lr_shape}: constant has none, others need one"
            )
        if self.lr_end is not None and not 0 < self.lr_end < math.inf:
            raise ValueError(f"{where}: lr_end={self.lr_end} must be above 0")


def interpolate(a: Mixture, b: Mixture, part: float) -> Mixture:
    """Go linearly from a (part 0) to b (part 1), each scaled to a sum of 1."""
    if part >= 1:
        return b

    def between(x: Sequence[float], y: Sequence[float]) -> tuple[float, ...]:
        return tuple((1 - part) * p / sum(x) + part * q / sum(y) for p, q in zip(x, y, strict=True))

    shares = b.length_shares
    if a.length_shares is not None and b.length_shares is not None:
        shares = between(a.length_shares, b.length_shares)
    return Mixture(between(a.weights, b.weights), shares)


def lr_in_stage(stage: CurriculumStageConfig, part: float, peak: float) -> float:
    """Return the learning rate when `part` of the stage's tokens are consumed."""
    low = peak if stage.lr_end is None else stage.lr_end
    match stage.lr_shape:
        case LrShape.constant:
            return peak
        case LrShape.linear:
            return peak + part * (low - peak)
        case LrShape.cosine:
            return low + (peak - low) * (1 + math.cos(math.pi * part)) / 2
        case LrShape.exponential:
            return peak * (low / peak) ** part
