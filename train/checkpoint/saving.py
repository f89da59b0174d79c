"""Saving with all ranks: at the end of a step or beside the training that goes on.

Invariant: what one rank cannot do is told to all, so they agree whether a step is saved and none waits for
another that failed. Only a rank that is gone raises. Collectives go over an axis that nothing else uses.
"""

import copy
import errno
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

import torch

from parallel.collectives import Axis, from_leader, gather_values
from train.checkpoint.contents import CheckpointConfig, SaveMode
from train.checkpoint.storage import (
    Box,
    ManifestPart,
    commit,
    discard,
    failpoint,
    free_bytes,
    no_room,
    retire,
    write_shard,
)
from train.checkpoint.tensor_file import file_size

log = logging.getLogger(__name__)

T = TypeVar("T")
Report = tuple[T | None, str | None]
"""What a rank has to say, JSON, and None; or None and why it cannot."""
SETTLE_SECONDS = 120
"""What a run that fails leaves a save in flight, where no limit is configured."""
NAMED = 3  # ranks that a message spells out
ALIGNMENT = 64  # bytes; for every dtype, and a processor's cache line


class SaveError(RuntimeError):
    """A step was not saved; the text names rank and reason, the same on all ranks."""


def write_together(
    root: Path, step: int, boxes: Mapping[str, Box], facts: Mapping[str, Any], axis: Axis,
    problem: str | None = None,
) -> None:  # fmt: skip
    """Write and commit `root/step-N` with the other ranks of `axis`.

    Each element of the state is in the `boxes` of one rank, and only one; `facts` are JSON values for the
    manifest; `problem` says why this rank cannot take part, None = it can.

    Raises:
        SaveError: on every rank alike; nothing is left but the checkpoints from before.
    """
    folder = root / f".tmp-step-{step}-{uuid4().hex}"  # the leader's counts

    def need() -> int:
        failpoint("start")
        return file_size({name: box.tensor for name, box in boxes.items()})

    def make_folder(sizes: Sequence[int]) -> str:
        root.mkdir(parents=True, exist_ok=True)
        if (have := free_bytes(root)) < sum(sizes):
            raise OSError(errno.ENOSPC, no_room(sum(sizes), have), str(root))
        folder.mkdir()
        failpoint("folder_made")
        return folder.name

    def finish(parts: Sequence[ManifestPart]) -> None:
        failpoint("gathered")
        commit(folder, root / f"step-{step}", parts, facts)

    try:
        name = agree((None, problem) if problem is not None else attempt(need), make_folder, axis)
        mine = root / name
        agree(attempt(lambda: write_shard(mine, axis.rank, boxes)), finish, axis)
    except SaveError:
        if axis.rank == 0:
            discard(folder)
        raise


def attempt(work: Callable[[], T]) -> Report[T]:
    """Do a rank's own work; an error is for all ranks to hear, so it goes no further."""
    try:
        return work(), None
    except OSError as error:
        return None, f"{error.strerror}: {error.filename}" if error.filename else str(error)
    except Exception as error:
        log.exception("saving failed on this rank")
        return None, f"{type(error).__name__}: {error}"


def agree(mine: Report[Any], conclude: Callable[[list[Any]], Any], axis: Axis) -> Any:
    """Let the leader conclude from the reports of all ranks, and tell the conclusion to every rank.

    Raises:
        SaveError: a rank reported a problem, or the leader met one; on every rank.
    """
    reports = gather_values(mine, axis)
    failpoint("reported")
    verdict: Report[Any] = None, None
    if axis.rank == 0:
        problems = [f"rank {n}: {problem}" for n, (_, problem) in enumerate(reports) if problem is not None]
        if not problems:
            verdict = attempt(lambda: conclude([value for value, _ in reports]))
            problems = [f"rank 0: {verdict[1]}"] if verdict[1] is not None else []
        if problems:
            more = f" and {len(problems) - NAMED} more" if len(problems) > NAMED else ""
            verdict = None, "; ".join(problems[:NAMED]) + more
    value, problem = from_leader(verdict, axis)
    if problem is not None:
        raise SaveError(problem)
    return value


class Saver:
    """Saves steps one after the other; at most one save is in flight."""

    def __init__(
        self, root: Path, cfg: CheckpointConfig, axis: Axis, *, step: int, grace_s: float | None = None
    ) -> None:
        """Go on after `step` with checkpoints in `root`.

        The launcher leaves a stopped job `grace_s` seconds; None = nobody knows.
        """
        self.root, self.cfg, self.axis, self.grace_s = root, cfg, axis, grace_s
        self.saved_step = step
        """Newest step that is safe: where a crash now would lead; 0 = the start."""
        self._stall_s = 0.0
        self._failures: list[str] = []
        self._lost: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._slab = torch.empty(0, dtype=torch.uint8)

    def save(self, step: int, boxes: Mapping[str, Box], facts: Mapping[str, Any], mode: SaveMode) -> None:
        """Save a step: `sync` until it is safe, `async` until its values are copied; waits for one before."""
        start = time.monotonic()
        self.wait()
        if mode is SaveMode.sync:
            self._write(step, boxes, facts)
        else:
            copies, problem = attempt(lambda: self._copy(boxes))
            self._thread = threading.Thread(
                target=self._write_beside,
                args=(step, copies or {}, copy.deepcopy(facts), problem),
                name="saving",
                daemon=True,  # a process that ends by an error does not wait for it
            )
            self._thread.start()
        self._stall_s += time.monotonic() - start

    def wait(self) -> None:
        """Wait until nothing is in flight.

        Raises:
            Exception: what a collective raised, because a rank is gone.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._lost is not None:
            raise self._lost

    def settle(self, limit_s: float | None) -> None:
        """Let a save in flight end before a run that fails does, but not for ever."""
        if self._thread is not None:
            self._thread.join(SETTLE_SECONDS if limit_s is None else limit_s)

    def read_failures(self) -> list[str]:
        """List the saves that failed since the last call, and why."""
        if self._lost is not None:
            raise self._lost
        found, self._failures = self._failures, []
        return found

    def read_stall_s(self) -> float:
        """Sum the seconds that training stood still for saves since the last call."""
        seconds, self._stall_s = self._stall_s, 0.0
        return seconds

    def reserve(self, boxes: Mapping[str, Box]) -> None:
        """Take the host memory for copies of these boxes: at the start, where a lack of it loses nothing."""
        size = sum(_aligned(box.tensor.nbytes) for box in boxes.values())
        if len(self._slab) < size:
            self._slab = torch.empty(size, dtype=torch.uint8)
            if any(box.tensor.is_cuda for box in boxes.values()):
                _pin(self._slab)

    def _copy(self, boxes: Mapping[str, Box]) -> dict[str, Box]:
        """Copy the boxes' values to the host, into the same memory every time."""
        self.reserve(boxes)
        copies, start = {}, 0
        for name, box in boxes.items():
            values = box.tensor.detach()
            held = self._slab[start : start + values.nbytes].view(values.dtype).view(values.shape)
            held.copy_(values, non_blocking=True)
            copies[name] = replace(box, tensor=held)
            start += _aligned(values.nbytes)
        if any(box.tensor.is_cuda for box in boxes.values()):
            torch.cuda.current_stream().synchronize()
        return copies

    def _write_beside(self, *save: Any) -> None:
        try:
            self._write(*save)
        except BaseException as error:
            self._lost = error  # the training's thread raises it

    def _write(
        self, step: int, boxes: Mapping[str, Box], facts: Mapping[str, Any], problem: str | None = None
    ) -> None:
        start = time.monotonic()
        try:
            write_together(self.root, step, boxes, facts, self.axis, problem)
        except SaveError as error:
            last = (
                f"the last good one is step {self.saved_step}" if self.saved_step else "there is none before"
            )
            self._failures.append(f"checkpoint {step} failed: {error}; {last}")
            return
        self.saved_step = step
        if self.axis.rank:
            return
        seconds = time.monotonic() - start
        log.info("saved %s in %.1f s", self.root / f"step-{step}", seconds)
        self._compare_with_grace(seconds)
        _, problem = attempt(lambda: retire(self.root, keep=self.cfg.keep, keep_every=self.cfg.keep_every))
        if problem is not None:
            log.warning("old checkpoints were not removed: %s", problem)

    def _compare_with_grace(self, seconds: float) -> None:
        """Warn once: a stop may have to wait for one save and then make another."""
        if self.grace_s is None or 2 * seconds <= self.grace_s:
            return
        log.warning(
            "a save took %.0f s; torchrun kills its ranks %.0f s after a stop signal, and a stopped run may "
            "need two saves: start with PET_SHUTDOWN_TIMEOUT=%.0f (torch 2.12 or newer), else with srun",
            seconds,
            self.grace_s,
            4 * seconds,
        )
        self.grace_s = None


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _pin(memory: torch.Tensor) -> None:
    """Let the device copy at full speed; torch's own pinned memory comes in powers of two."""
    if memory.numel() and int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)):
        log.warning("host memory for checkpoints could not be pinned: copies of the state take longer")
