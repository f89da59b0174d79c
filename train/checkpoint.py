"""When a run is saved, what a checkpoint holds, and where a run goes on.

Invariant: weights, both moments, clocks and data position of one step, under names that know no layout.
"""

import logging
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from parallel.collectives import all_gather, barrier
from parallel.mesh import Mesh
from parallel.placement import Shard, publish
from train.optimizer import moments, set_step
from train.storage import (
    Box,
    CheckpointError,
    FileFacts,
    checkpoints_in,
    commit,
    read_boxes,
    read_manifest,
    write_shard,
)

log = logging.getLogger(__name__)


class Resume(StrEnum):
    """Whether a run goes on from its checkpoints."""

    auto = "auto"
    must = "must"
    never = "never"


@dataclass(kw_only=True)
class CheckpointConfig:
    """When to save and whether to go on."""

    every: int | None = None
    """Steps between checkpoints; null = at the end only (a stopped run always saves)."""
    keep: int | None = 2
    """Checkpoints that stay; null = all."""
    resume: Resume = Resume.auto
    """auto: from the newest, if any; must: or fail; never: start afresh, set older results aside."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        for key in ("every", "keep"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ValueError(f"checkpoint.{key}={value} must be at least 1, or null")


class NoCheckpointError(CheckpointError):
    """checkpoint.resume=must, and there is none."""


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
    barrier(mesh.world)
    mine = [shard for shard in shards if shard.is_first]
    written = write_shard(temporary, mesh.rank, _boxes(mine, optimizer, {} if mesh.stage.rank else biases))
    files = _gather_files(written, mesh)
    if mesh.rank == 0:
        commit(temporary, final, files, {"step": step, "git_commit": _git_commit(), **facts})
        for _, path in list(checkpoints_in(root))[keep:] if keep else []:
            shutil.rmtree(path)
    barrier(mesh.world)
    return final


def _gather_files(written: FileFacts, mesh: Mesh) -> list[FileFacts]:
    """Every rank's file, in the order of ranks."""
    numbers = torch.tensor([[written.size, *bytes.fromhex(written.sha256)]], device=mesh.device)
    rows = all_gather(numbers, mesh.world).tolist()
    return [FileFacts(size, bytes(digest).hex()) for size, *digest in rows]


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
) -> dict[str, Any]:
    """Fill weights, moments and router biases from a checkpoint of any layout; the manifest's facts."""
    manifest = read_manifest(path)
    read_boxes(path, manifest, _boxes(shards, optimizer, biases))
    set_step(optimizer, shards, manifest["progress"]["optimizer_steps"])
    publish(shards)
    return manifest


def set_results_aside(run_dir: Path) -> None:
    """Move what an earlier run left into previous-N: a fresh run mixes with nothing, nothing is lost."""
    names = ["checkpoints", "metrics.jsonl", "experts.jsonl"]
    found = [run_dir / name for name in names if (run_dir / name).exists()]
    if not found:
        return
    number = 1 + sum(1 for _ in run_dir.glob("previous-*"))
    target = run_dir / f"previous-{number}"
    target.mkdir()
    for path in found:
        path.rename(target / path.name)
    log.warning("checkpoint.resume=never: earlier results moved to %s", target)


def _boxes(
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
