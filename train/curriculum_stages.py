"""The stages of a run, laid out in steps and tokens; a run without a curriculum is one stage."""

import dataclasses
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from data.mixture import Mixture
from train.config import ConfigError, RunConfig, user_errors
from train.schedule.curriculum import CurriculumStageConfig, interpolate, lr_in_stage
from train.schedule.learning_rate import lr_factor


@dataclass(frozen=True)
class CurriculumStage:
    """Steps that share row length, batch and layout."""

    name: str
    """Name of the stage, for people; "" without a curriculum."""
    number: int
    """Number of the stage in the curriculum, from 0."""
    cfg: RunConfig
    """The run's configuration as it holds in this stage."""
    settings: CurriculumStageConfig | None
    """Entry of `curriculum` that it comes from; None without a curriculum."""
    first_step: int
    """Steps before this stage."""
    end_step: int
    """Steps at the end of this stage; the run may stop earlier."""
    first_tokens: int
    """Input tokens before this stage."""
    before: Mixture
    """Mixture that the stage before ended with; the first stage's own."""

    @property
    def tokens(self) -> int:
        """Count the input tokens of the stage."""
        return (self.end_step - self.first_step) * self.cfg.batch.global_tokens

    @property
    def sizes(self) -> tuple[int, int]:
        """Return the tokens of a row and of a step."""
        return self.cfg.batch.row_tokens, self.cfg.batch.global_tokens

    @property
    def own(self) -> Mixture:
        """Return the mixture between the transition and the final part."""
        return _mixture(self.cfg, self.settings.weights if self.settings else None)

    @property
    def last(self) -> Mixture:
        """Return the mixture that the stage ends with."""
        final = self.settings.final_weights if self.settings else None
        return self.own if final is None else dataclasses.replace(self.own, weights=tuple(final))

    def mixture_at(self, tokens: int) -> Mixture:
        """Return the mixture of the step that begins when `tokens` input tokens of the run are consumed."""
        settings, place = self.settings, tokens - self.first_tokens
        if settings is None:
            return self.own
        if settings.final_weights and place >= (1 - settings.final_fraction) * self.tokens:
            return self.last
        if place < settings.transition_tokens:
            return interpolate(self.before, self.own, place / settings.transition_tokens)
        return self.own

    def lr_at(self, tokens: int, total_tokens: int) -> float:
        """Return the learning rate of the step that ends at `tokens` of the run's `total_tokens`."""
        factor = lr_factor(tokens, total_tokens, self.cfg.schedule)
        if self.settings is None:
            return self.cfg.optimizer.lr * factor
        peak = self.settings.lr or self.cfg.optimizer.lr
        return lr_in_stage(self.settings, (tokens - self.first_tokens) / self.tokens, peak) * factor


def build_stages(cfg: RunConfig) -> list[CurriculumStage]:
    """Lay out all curriculum stages of a run, in order.

    Raises:
        ConfigError: neither a length nor a curriculum, or a stage that contradicts the run.
    """
    if not cfg.curriculum:
        if cfg.train.steps is None:
            raise ConfigError("train.steps=null needs a curriculum, whose end it means; set train.steps")
        own = _mixture(cfg, None)
        return [CurriculumStage("", 0, cfg, None, 0, cfg.train.steps, 0, own)]
    if cfg.schedule.decay_tokens:
        raise ConfigError(
            f"schedule.decay_tokens={cfg.schedule.decay_tokens} must be 0 with a curriculum; "
            "use the last stage's lr_shape and lr_end"
        )
    stages: list[CurriculumStage] = []
    step = tokens = 0
    for number, settings in enumerate(cfg.curriculum):
        with naming(settings.name):
            effective = _configure(cfg, settings)
        steps = -(-settings.tokens // effective.batch.global_tokens)
        before = stages[-1].last if stages else _mixture(effective, settings.weights)
        stages.append(
            CurriculumStage(settings.name, number, effective, settings, step, step + steps, tokens, before)
        )
        step, tokens = step + steps, tokens + stages[-1].tokens
    return stages


def _configure(cfg: RunConfig, settings: CurriculumStageConfig) -> RunConfig:
    """The run's configuration with a stage's changes."""
    count = len(cfg.data.sources)
    for key in ("weights", "final_weights"):
        weights = getattr(settings, key)
        if weights is not None and (len(weights) != count or min(weights) < 0 or not any(weights)):
            raise ValueError(
                f"{key}={list(weights)} must be {count} numbers >= 0, one for each of data.sources, and one "
                "above 0"
            )
    batch = {key: getattr(settings, key) for key in ("row_tokens", "global_tokens", "micro_rows")}
    changes = {key: value for key, value in batch.items() if value is not None}
    theta = settings.rope_theta or cfg.model.rope_theta
    shares = settings.length_shares or cfg.data.length_shares
    return dataclasses.replace(
        cfg, model=dataclasses.replace(cfg.model, rope_theta=theta),
        batch=dataclasses.replace(cfg.batch, **changes),
        data=dataclasses.replace(cfg.data, length_shares=shares),
        parallel=settings.parallel.apply(cfg.parallel),
    )  # fmt: skip


def _mixture(cfg: RunConfig, weights: Sequence[float] | None) -> Mixture:
    own = tuple(source.weight for source in cfg.data.sources) if weights is None else tuple(weights)
    shares = cfg.data.length_shares
    return Mixture(own, None if shares is None else tuple(shares))


def validate_stages(stages: Sequence[CurriculumStage], world_size: int) -> None:
    """Check every curriculum stage before the first step.

    Raises:
        ConfigError: with stage, key, value, rule and remedy.
    """
    for stage in stages:
        with naming(stage.name):
            stage.cfg.validate(world_size)


def naming(name: str) -> AbstractContextManager[None]:
    """Turn a ValueError into a ConfigError that names this curriculum stage."""
    return user_errors(f"curriculum stage {name}: " if name else "")


def stage_of(stages: Sequence[CurriculumStage], step: int) -> CurriculumStage:
    """Find the stage of the step after `step` steps; the last stage after all of them."""
    return next((stage for stage in stages if step < stage.end_step), stages[-1])


def doubts(stages: Sequence[CurriculumStage]) -> list[str]:
    """List what is legal but seldom meant, for people."""
    cfg, total, found = stages[0].cfg, tokens_at(stages, total_steps(stages)), []
    if cfg.schedule.decay_tokens > total:
        first = stages[0].lr_at(cfg.batch.global_tokens, total)
        found.append(
            f"schedule.decay_tokens={cfg.schedule.decay_tokens} is more than the run's {total} tokens: it "
            f"begins in mid-decay, at a learning rate of {first:.3g}; decay_tokens=0 keeps the peak"
        )
    if cfg.model.experts_per_token == 1:
        found.append(
            "model.experts_per_token=1: a single choice is renormalised to weight 1, so the gate learns from "
            "the balancing losses alone, not from the cross-entropy; MiniMax-01 has 2"
        )
    return found


def total_steps(stages: Sequence[CurriculumStage]) -> int:
    """Count the steps of the run: to train.steps or to the curriculum's end, whichever comes first."""
    limit = stages[0].cfg.train.steps
    return stages[-1].end_step if limit is None else min(limit, stages[-1].end_step)


def tokens_at(stages: Sequence[CurriculumStage], step: int) -> int:
    """Count the input tokens consumed in the first `step` steps."""
    stage = stage_of(stages, step)
    return stage.first_tokens + (step - stage.first_step) * stage.cfg.batch.global_tokens
