"""Going back to an older checkpoint and around a range of data, as PaLM did at spikes (arXiv 2204.02311).

Invariant: a rewind is in the progress of every checkpoint after it; where it stands, it is not done again.
"""

import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from train.checkpoint.resume import new_previous
from train.checkpoint.storage import MANIFEST, find_checkpoints

log = logging.getLogger(__name__)

KEPT = ("metrics.jsonl", "experts.jsonl", "wandb_id")
"""What an abandoned branch leaves besides checkpoints; wandb gets a run of its own for the new one."""


@dataclass(kw_only=True)
class RewindConfig:
    """Go back to a checkpoint, once; the same command may be started again at any time."""

    to: int | None = None
    """Step of the checkpoint to go on from; newer ones are set aside. null = the newest, as ever."""
    skip: list[int] = field(default_factory=list)
    """[a, b]: leave out the data that steps a to b-1 read; step a reads what b would have. Empty = none."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.to is None and self.skip:
            raise ValueError(
                f"rewind.skip={list(self.skip)} needs rewind.to, the step of a checkpoint before it"
            )
        if self.to is None:
            return
        if self.to < 1:
            raise ValueError(
                f"rewind.to={self.to} must be at least 1; to start afresh: checkpoint.resume=never"
            )
        if self.skip and not (len(self.skip) == 2 and self.to < self.skip[0] < self.skip[1]):
            raise ValueError(
                f"rewind.skip={list(self.skip)} must be [a, b], rewind.to={self.to} < a < b: steps a to b-1"
            )

    @property
    def entry(self) -> list[int]:
        """The rewind as it stands in a run's progress: [to] or [to, a, b]; [] = no rewind."""
        return [] if self.to is None else [self.to, *self.skip]


def set_newer_aside(run_dir: Path, cfg: RewindConfig) -> str | None:
    """Move what is newer than rewind.to into previous-N, unless that was done.

    For one rank, before any looks for a checkpoint.

    Returns:
        Why the run cannot be rewound; None if all is well.
    """
    found = find_checkpoints(run_dir / "checkpoints", complete=True)
    steps = {step: path for path, step in found.items()}
    newer = [path for step, path in steps.items() if cfg.to is not None and step > cfg.to]
    if cfg.to is None or any(cfg.entry in rewinds_of(path) for path in newer):
        return None
    if cfg.to not in steps:
        return f"rewind.to={cfg.to}: {run_dir}/checkpoints has no step-{cfg.to}, but steps {sorted(steps)}"
    try:
        skipped_steps([*rewinds_of(steps[cfg.to]), cfg.entry])
    except ValueError as error:
        return str(error)
    if newer:
        target = new_previous(run_dir)
        for name in KEPT:
            if (run_dir / name).exists():
                shutil.copy2(run_dir / name, target / name)
        (run_dir / "wandb_id").unlink(missing_ok=True)
        (target / "checkpoints").mkdir()
        for path in newer:
            path.rename(target / "checkpoints" / path.name)
        log.warning("rewind.to=%d: %d newer checkpoints moved to %s", cfg.to, len(newer), target)
    return None


def rewinds_of(checkpoint: Path) -> list[list[int]]:
    """Read the rewinds before a checkpoint; none if it cannot be read."""
    try:
        return json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["progress"]["rewinds"]
    except (OSError, ValueError, LookupError, TypeError):
        return []  # damaged, or from before there were any


def skipped_steps(rewinds: Sequence[Sequence[int]]) -> dict[int, int]:
    """Find the gaps that rewinds leave in the data.

    Returns:
        Steps taken before a gap -> steps whose data end with it.

    Raises:
        ValueError: two ranges overlap.
    """
    ranges = sorted((entry[1], entry[2]) for entry in rewinds if len(entry) == 3)
    for (begin, end), (following, _) in pairwise(ranges):
        if following < end:
            raise ValueError(
                f"rewind.skip: [{begin}, {end}] and one from {following} overlap (this run has both); "
                "rewind to a checkpoint from before both, with one range"
            )
    return {begin - 1: end - 1 for begin, end in ranges}
