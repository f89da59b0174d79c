"""Where a run goes on, and filling it from there."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from parallel.placement import Shard, publish
from train.checkpoint import Resume, state_boxes
from train.manifest import Manifest, read_manifest
from train.optimizer import set_step
from train.restore import read_boxes
from train.storage import CheckpointError, checkpoints_in

log = logging.getLogger(__name__)


class NoCheckpointError(CheckpointError):
    """checkpoint.resume=must, and there is none."""


def find_checkpoint(run_dir: Path, resume: Resume) -> Path | None:
    """The checkpoint to go on from.

    Raises:
        NoCheckpointError: `must`, and there is none.
    """
    if resume is Resume.never:
        return None
    newest = next(checkpoints_in(run_dir / "checkpoints"), None)
    if newest is None:
        if resume is Resume.must:
            raise NoCheckpointError(
                f"checkpoint.resume=must, but {run_dir}/checkpoints holds no complete step-N"
            )
        return None
    return newest[1]


def saved_step(run_dir: Path, resume: Resume) -> int:
    """Step that a run goes on from; 0 if it starts. All ranks see the same folders.

    Raises:
        NoCheckpointError: `must`, and there is none.
    """
    found = find_checkpoint(run_dir, resume)
    return 0 if found is None else int(found.name.removeprefix("step-"))


def load_checkpoint(
    path: Path, *, shards: Sequence[Shard], optimizer: torch.optim.Optimizer, biases: Mapping[str, Tensor]
) -> Manifest:
    """Fill weights, moments and router biases from a checkpoint of any layout; its manifest."""
    manifest = read_manifest(path)
    read_boxes(manifest, state_boxes(shards, optimizer, biases))
    set_step(optimizer, shards, manifest.facts["progress"]["optimizer_steps"])
    publish(shards)
    return manifest


def set_results_aside(run_dir: Path) -> None:
    """Move what an earlier run left into previous-N: a fresh run mixes with nothing, nothing is lost."""
    names = ["checkpoints", "metrics.jsonl", "experts.jsonl"]
    found = [run_dir / name for name in names if (run_dir / name).exists()]
    if not found:
        return
    target = new_previous(run_dir)
    for path in found:
        path.rename(target / path.name)
    log.warning("checkpoint.resume=never: earlier results moved to %s", target)


def new_previous(run_dir: Path) -> Path:
    """A new folder previous-N of a run directory."""
    target = run_dir / f"previous-{1 + sum(1 for _ in run_dir.glob('previous-*'))}"
    target.mkdir()
    return target
