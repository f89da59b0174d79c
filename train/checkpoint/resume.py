"""All ranks choose together where a run goes on, and fill it from there."""

import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from parallel.collectives import Axis, all_gather_values, all_reduce_sum, from_leader
from parallel.optimizer import AdamW
from parallel.placement import Shard, publish
from train.checkpoint.contents import CheckpointConfig, Resume, state_boxes
from train.checkpoint.manifest import Manifest, read_manifest, show
from train.checkpoint.restore import Verify, check_files, read_boxes, strangers
from train.checkpoint.storage import MANIFEST, Box, CheckpointError, find_checkpoints
from train.guard.signals import StopRequest

log = logging.getLogger(__name__)

BEAT_SECONDS = 30
"""Time that a rank hashes files before it tells the others that it lives."""


class NoCheckpointError(CheckpointError):
    """Raised where a checkpoint is needed and none can be used; a run does not start from random weights."""


class Start(NamedTuple):
    """Where a run begins."""

    resumed: Manifest | None = None
    """Checkpoint of the run itself that it goes on from."""
    initial: Manifest | None = None
    """Checkpoint whose weights a new run starts from."""

    @property
    def step(self) -> int:
        """Optimizer steps that were taken before."""
        return 0 if self.resumed is None else self.resumed.step


def choose_start(run_dir: Path, cfg: CheckpointConfig, world: Axis, stop: StopRequest) -> Start:
    """Choose the run's newest checkpoint that is whole, else checkpoint.init, else nothing.

    All ranks agree. Rejected folders that are newer than the one in use are renamed to rejected-step-N.

    Raises:
        NoCheckpointError: a checkpoint is needed, and none can be used; the text has all the reasons.
        StoppedEarly: a rank was asked to stop while files were hashed; on every rank, nothing is renamed.
    """
    if cfg.resume is not Resume.never:
        root = run_dir / "checkpoints"
        own = find_checkpoints(root, complete=False)
        found, rejected = _newest_whole(own, cfg, world, stop, is_resumed=True)
        if found is not None:
            if world.rank == 0:
                _set_rejected_aside(rejected)
            return Start(resumed=found)
        if rejected:
            remedy = "repair them, or start again in another run_dir or with checkpoint.resume=never"
            raise NoCheckpointError(f"{root}: {_explain(rejected, cfg)}\n{remedy}")
        if cfg.resume is Resume.must:
            raise NoCheckpointError(f"checkpoint.resume=must, but {root} holds no step-N")
    if cfg.init is None:
        return Start()
    init = Path(cfg.init)
    folders = find_checkpoints(init / "checkpoints", complete=False)
    found, rejected = _newest_whole(folders or [init], cfg, world, stop, is_resumed=False)
    if found is None:
        raise NoCheckpointError(f"checkpoint.init={cfg.init}: {_explain(rejected, cfg)}")
    return Start(initial=found)


def saved_model(run_dir: Path, init: Path, resume: Resume, verify: Verify) -> tuple[Mapping[str, Any], Path]:
    """Read the model of a run with checkpoint.init, from its own newest checkpoint, else from `init`.

    Returns:
        The values of config.model, and the checkpoint that has them.

    Raises:
        NoCheckpointError: no manifest can be read.
    """
    roots = [init] if resume is Resume.never else [run_dir, init]
    found = (find_checkpoints(root / "checkpoints", complete=False) for root in roots)
    reasons = []
    for folder in next(filter(None, found), None) or [init]:
        try:
            config = read_manifest(folder, is_checked=verify is not Verify.off).config
            if isinstance(config.get("model"), dict):
                return config["model"], folder
            reasons.append(f"{folder / MANIFEST}: config.model is {show(config.get('model'))}")
        except CheckpointError as error:
            reasons.append(str(error))
    raise NoCheckpointError(
        "".join([f"checkpoint.init={init}: nothing can be read:", *map("\n  {}".format, reasons)])
    )


def _newest_whole(
    folders: Iterable[Path], cfg: CheckpointConfig, world: Axis, stop: StopRequest, *, is_resumed: bool
) -> tuple[Manifest | None, dict[Path, list[str]]]:
    """Find the first of the leader's folders without a fault, and by folder the faults of those before it."""
    agreed = from_leader([str(path) for path in folders], world)
    rejected: dict[Path, list[str]] = {}
    for folder in map(Path, agreed):
        manifest, problems = _examine(folder, cfg.verify, world, stop, is_resumed=is_resumed)
        if not problems:
            return manifest, rejected
        rejected[folder] = problems
        if world.rank == 0:
            for problem in problems:
                log.warning("rejected %s: %s", folder.name, problem)
        if not cfg.fallback:
            break
    return None, rejected


def _examine(
    folder: Path, how: Verify, world: Axis, stop: StopRequest, *, is_resumed: bool
) -> tuple[Manifest | None, list[str]]:
    """Read a manifest and what any rank finds wrong; the files are dealt out, so each is read once."""
    manifest: Manifest | None = None
    work: Iterator[str | None] = iter(())
    try:
        manifest = read_manifest(folder, is_checked=how is not Verify.off)
        if is_resumed:
            _check_resumable(manifest)
        problems = strangers(manifest) if world.rank == 0 else []
        if how is not Verify.off:
            facts = manifest.files
            by_size = sorted(facts, key=lambda name: (-facts[name].size, name))
            work = check_files(manifest, by_size[world.rank :: world.size], how)
    except CheckpointError as error:
        problems = [str(error)]
    while int(all_reduce_sum(torch.tensor(_work_a_while(work, problems, stop)), world)):
        stop.leave_early(world, "while checkpoints were checked")
    heard = [line for lines in all_gather_values(problems, world) for line in lines]
    return manifest, list(dict.fromkeys(heard))


def _work_a_while(work: Iterator[str | None], problems: list[str], stop: StopRequest) -> int:
    """Check files, but never so long that the others take this rank for dead; 0 = done, 1 = not yet."""
    end = time.monotonic() + BEAT_SECONDS
    for problem in work:
        if problem is not None:
            problems.append(problem)
        if stop.is_set or time.monotonic() > end:
            return 1
    return 0


def _check_resumable(manifest: Manifest) -> None:
    """Refuse a checkpoint that is no state of a run, or not the one that its name says."""
    path, progress = manifest.folder / MANIFEST, manifest.part("progress")
    if manifest.holds_weights_only:
        raise CheckpointError(f"{path}: holds weights only; a run can start from it: checkpoint.init")
    if manifest.folder.name != f"step-{manifest.step}":
        raise CheckpointError(f"{path}: is of step {manifest.step}, the folder's name says otherwise")
    for key in ("step", "tokens", "optimizer_steps"):
        if type(progress.get(key)) is not int or progress[key] < 0:
            raise CheckpointError(f"{path}: progress.{key} is {show(progress.get(key))}")
    for key in ("data", "config"):
        manifest.part(key)


def _explain(rejected: Mapping[Path, Sequence[str]], cfg: CheckpointConfig) -> str:
    lines = [f"\n  {problem}" for problems in rejected.values() for problem in problems]
    if cfg.fallback:
        return f"every checkpoint was rejected:{''.join(lines)}"
    return f"the newest checkpoint was rejected, and checkpoint.fallback=false:{''.join(lines)}"


def _set_rejected_aside(rejected: Mapping[Path, Sequence[str]]) -> None:
    """Give folders names that no later save and no later choice meets; nothing is lost."""
    for path in rejected:
        target, number = path.with_name(f"rejected-{path.name}"), 1
        while target.exists():
            number += 1
            target = path.with_name(f"rejected-{path.name}-{number}")
        path.rename(target)
        log.warning("%s is now %s", path, target.name)


def load_checkpoint(
    manifest: Manifest, *, shards: Sequence[Shard], optimizer: AdamW,
    biases: Mapping[str, Tensor], world: Axis,
) -> None:  # fmt: skip
    """Fill weights, moments and router biases from a checkpoint of any layout.

    Raises:
        NoCheckpointError: a tensor is not there or not readable; on every rank.
    """
    _read_together(manifest, state_boxes(shards, optimizer, biases), world)
    optimizer.set_step(manifest.facts["progress"]["optimizer_steps"])
    publish(shards)


def load_weights(
    manifest: Manifest, *, shards: Sequence[Shard], biases: Mapping[str, Tensor], world: Axis
) -> None:
    """Fill weights, and router biases where there are some, for a new run.

    Raises:
        NoCheckpointError: a tensor is not there or not readable; on every rank.
    """
    known = {key: bias for key, bias in biases.items() if key in manifest.tensors}
    _read_together(manifest, state_boxes(shards, None, known), world)
    publish(shards)


def _read_together(manifest: Manifest, boxes: Mapping[str, Box], world: Axis) -> None:
    problem = None
    try:
        read_boxes(manifest, boxes)
    except CheckpointError as error:
        problem = str(error)
    if heard := [each for each in all_gather_values(problem, world) if each is not None]:
        raise NoCheckpointError(heard[0])


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
    """Make a new folder previous-N of a run directory."""
    target = run_dir / f"previous-{1 + sum(1 for _ in run_dir.glob('previous-*'))}"
    target.mkdir()
    return target
