"""When a run is saved, and what a checkpoint holds.

Invariant: weights, both moments, clocks and data position of one step, under names that know no layout.
"""

import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cache
from pathlib import Path

from torch import Tensor

from parallel.mesh import Mesh
from parallel.optimizer import AdamW
from parallel.placement import Shard
from train.checkpoint.restore import Verify
from train.checkpoint.storage import Box

Resume = StrEnum("Resume", ["auto", "must", "never"])
"""Whether a run goes on from its checkpoints."""


class Change(StrEnum):
    """What of a configuration may change on a resume, if asked for."""

    optimizer = "optimizer"
    """What an update is: optimizer.*, router.*, the sizes of a batch."""
    data = "data"
    """What is read: weights of the sources, packing, seed; other datasets begin at their start."""


SaveMode = StrEnum("SaveMode", {"sync": "sync", "async": "async"})
"""Whether training waits until a checkpoint is safe, or only until the state is copied to host memory."""


@dataclass(kw_only=True)
class CheckpointConfig:
    """When to save and whether to go on."""

    every: int | None = None
    """Steps between checkpoints; null = at the end only (a stopped run always saves)."""
    keep: int | None = 2
    """Newest checkpoints that stay; null = all."""
    keep_every: int | None = None
    """Checkpoints of steps that this divides stay for ever; null = none does."""
    mode: SaveMode = SaveMode.sync
    """sync: training waits for the disk; async: only until the state is copied to host memory, which must
    hold it twice with optimizer.offload=cpu. The last save of a start is always sync."""
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
        for key in ("every", "keep", "keep_every"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ValueError(f"checkpoint.{key}={value} must be at least 1, or null")


def own_boxes(
    shards: Sequence[Shard], optimizer: AdamW, biases: Mapping[str, Tensor], mesh: Mesh
) -> dict[str, Box]:
    """Choose what this rank writes: what several ranks hold alike, the first of them writes.

    The routers' biases are the same on all ranks of a pipeline stage.
    """
    mine = [shard for shard in shards if shard.is_first]
    return state_boxes(mine, optimizer, {} if mesh.stage.rank else biases)


def state_boxes(
    shards: Sequence[Shard], optimizer: AdamW | None, biases: Mapping[str, Tensor]
) -> dict[str, Box]:
    """List this rank's part of all that is saved as tensors: weights, moments, biases of the routers."""
    boxes = {f"model.{s.name}": Box(s.master, s.shape, s.offset) for s in shards}
    state = {} if optimizer is None else optimizer.moments(shards)
    for key, tensor in state.items():
        boxes[key] = replace(boxes[f"model.{key.partition('.')[2]}"], tensor=tensor)
    return boxes | {key: Box.whole(bias) for key, bias in biases.items()}


@cache
def git_commit() -> str | None:
    """Look up the commit of this program; None where it is no git checkout."""
    root = Path(__file__).resolve().parents[2]
    try:
        found = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None  # not a git checkout: the manifest says so
    return found.stdout.strip()
