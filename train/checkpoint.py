"""When a run is saved, what a checkpoint holds, and where a run goes on.

Invariant: weights, both moments, clocks and data position of one step, under names that know no layout.
"""

import json
import logging
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from parallel.collectives import barrier, gather_texts
from parallel.mesh import Mesh
from parallel.placement import Shard
from train.optimizer import moments
from train.restore import Verify
from train.storage import Box, Written, checkpoints_in, commit, write_shard

log = logging.getLogger(__name__)


class Resume(StrEnum):
    """Whether a run goes on from its checkpoints."""

    auto = "auto"
    must = "must"
    never = "never"


class Change(StrEnum):
    """What of a configuration may change on a resume, if asked for."""

    optimizer = "optimizer"
    """What an update is: optimizer.*, router.*, the sizes of a batch."""
    data = "data"
    """What is read: weights of the sources, packing, seed; other datasets begin at their start."""


@dataclass(kw_only=True)
class CheckpointConfig:
    """When to save and whether to go on."""

    every: int | None = None
    """Steps between checkpoints; null = at the end only (a stopped run always saves)."""
    keep: int | None = 2
    """Checkpoints that stay; null = all."""
    resume: Resume = Resume.auto
    """auto: from the newest, if any; must: or fail; never: start afresh, set older results aside."""
    verify: Verify = Verify.hash
    """What is checked before a checkpoint is used; in a YAML file write 'off' in quotes."""
    fallback: bool = True
    """Whether an older checkpoint is used where the newest is rejected; false: that is an error."""
    init: str | None = None
    """Checkpoint (step folder or run directory) whose model and weights a new run starts from."""
    allow_changes: list[Change] = field(default_factory=list)
    """Changes since the save that a resume accepts; others of the model, optimizer or data are errors."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        for key in ("every", "keep"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ValueError(f"checkpoint.{key}={value} must be at least 1, or null")


def save_checkpoint(
    run_dir: Path,
    step: int,
    *,
    shards: Sequence[Shard],
    optimizer: torch.optim.Optimizer,
    biases: Mapping[str, Tensor],
    mesh: Mesh,
    facts: Mapping[str, Any],
    keep: int | None,
) -> Path:
    """Write `checkpoints/step-N` together with the other ranks, then remove what `keep` no longer covers.

    Args:
        biases: of the routers, the same on all ranks of a stage.
        facts: JSON values for the manifest: progress, data position, configuration.
    """
    root = run_dir / "checkpoints"
    temporary, final = root / f".tmp-step-{step}", root / f"step-{step}"
    if mesh.rank == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    barrier(mesh.world)
    mine = [shard for shard in shards if shard.is_first]
    written = write_shard(
        temporary, mesh.rank, state_boxes(mine, optimizer, {} if mesh.stage.rank else biases)
    )
    reports = gather_texts(json.dumps(written), mesh.world)
    if mesh.rank == 0:
        files = [Written(*json.loads(report)) for report in reports]
        commit(temporary, final, files, {"step": step, "git_commit": _git_commit(), **facts})
        for _, path in list(checkpoints_in(root))[keep:] if keep else []:
            shutil.rmtree(path)
    barrier(mesh.world)
    return final


def state_boxes(
    shards: Sequence[Shard], optimizer: torch.optim.Optimizer, biases: Mapping[str, Tensor]
) -> dict[str, Box]:
    """This rank's part of all that is saved as tensors."""
    boxes = {f"model.{s.name}": Box(s.master, s.shape, s.offset) for s in shards}
    state = moments(optimizer, shards)
    for key, tensor in state.items():
        place = boxes[f"model.{key.partition('.')[2]}"]
        boxes[key] = Box(tensor, place.shape, place.offset)
    return boxes | {key: Box(bias, tuple(bias.shape), (0,)) for key, bias in biases.items()}


def _git_commit() -> str | None:
    root = Path(__file__).resolve().parents[1]
    try:
        found = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None  # not a git checkout: the manifest says so
    return found.stdout.strip()
