"""The clocks of a run, and reading them from a checkpoint."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

from data.prefetch import Prefetcher
from train.checkpoint.contents import Change
from train.checkpoint.manifest import Manifest
from train.checkpoint.resume import NoCheckpointError
from train.checkpoint.rewind import skipped_steps
from train.config import RunConfig
from train.guard.spikes import Health

log = logging.getLogger(__name__)

SKIPPED = "skipped by rewind"


@dataclass
class RunProgress:
    """The clocks of a run; all of them are in the checkpoint."""

    step: int = 0
    """Steps taken, skipped ones included."""
    tokens: int = 0
    """Input tokens consumed since step 0."""
    optimizer_steps: int = 0
    """Updates made: steps that were not skipped."""
    consumed: dict[str, list[int]] = field(default_factory=dict)
    """Tokens taken from each of data.sources, by the name of the curriculum stage, or SKIPPED."""
    rewinds: list[list[int]] = field(default_factory=list)
    """Rewinds before this step, each [to] or [to, a, b] as in RewindConfig."""

    def count_sources(self, stage: str, totals: list[int], skipped: Sequence[int] = ()) -> None:
        """Note what a curriculum stage took: the run's totals less other stages and what rewinds skipped."""
        if any(skipped):
            self.consumed[SKIPPED] = list(skipped)
        others = [tokens for name, tokens in self.consumed.items() if name != stage]
        self.consumed[stage] = [total - sum(taken) for total, *taken in zip(totals, *others, strict=True)]

    def advance(self, tokens: int, *, skipped: bool) -> None:
        """Count one step of `tokens` input tokens."""
        self.step += 1
        self.tokens += tokens
        self.optimizer_steps += not skipped


def restore_clocks(manifest: Manifest, loader: Prefetcher, health: Health, cfg: RunConfig) -> RunProgress:
    """Restore clocks, data position and windows from a checkpoint, before anything large is allocated.

    Raises:
        ValueError: the data are others, and nobody allowed that.
        NoCheckpointError: they are not what this version writes.
    """
    facts = manifest.facts
    try:
        progress = RunProgress(**facts["progress"])
        if cfg.rewind.entry and cfg.rewind.entry not in progress.rewinds:
            progress.rewinds.append(cfg.rewind.entry)
        skips = skipped_steps(progress.rewinds)
        if "health" in facts:  # else saved before there was any
            health.load_state_dict(facts["health"])
        try:
            loader.load_state_dict(facts["data"], step=progress.step, skips=skips)
        except ValueError as error:
            if Change.data not in cfg.checkpoint.allow_changes:
                raise
            log.warning("the data are read from their start: %s", error)
            loader.load_state_dict(loader.state_dict(), step=progress.step)
            progress.consumed = {}
        if "consumed" not in facts["progress"]:  # saved before stages were counted
            progress.count_sources("before", facts["data"]["source_tokens"])
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise NoCheckpointError(f"{manifest.folder}: its state is not of this version: {error!r}") from error
    return progress
