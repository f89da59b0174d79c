"""Writes checkpoint folders: a safetensors file for each rank, a JSON manifest of which box lies where.

A folder is written beside its final name and renamed when complete; without a manifest it is no checkpoint.
A name that begins with a dot is a leftover, which the next start removes.
"""

import errno
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from train.checkpoint.tensor_file import (
    CODES,
    FileFacts,
    TensorFileWriter,
    by_alignment,
    file_size,
    naming,
)

log = logging.getLogger(__name__)

FORMAT = 1
MANIFEST = "manifest.json"

ManifestPart = dict[str, dict[str, Any]]
"""The entries `files` and `tensors` of a manifest, as far as they are about one file; JSON."""


class CheckpointError(RuntimeError):
    """Raised for a checkpoint that cannot be read; the text names the file and the reason."""


@dataclass(frozen=True)
class Box:
    """A part of a named global tensor on this rank."""

    tensor: Tensor
    """[local shape] values of the part, to be saved or filled."""
    shape: tuple[int, ...]
    """Shape of the global tensor."""
    offset: tuple[int, ...]
    """Global index of the part's first element."""

    @classmethod
    def whole(cls, tensor: Tensor) -> "Box":
        """Take a tensor that is all of the global one."""
        return cls(tensor, tuple(tensor.shape), (0,) * tensor.dim())


def file_name(number: int) -> str:
    """Name a checkpoint's file by the number of its rank, or a running one."""
    return f"rank-{number:05d}.safetensors"


def failpoint(name: str) -> None:
    """Do nothing: a test may let a process die or meet an error at this place of the writing."""


def write_shard(folder: Path, rank: int, boxes: Mapping[str, Box]) -> ManifestPart:
    """Write this rank's boxes into `folder`, durably, one tensor at a time on the host.

    Returns:
        What the manifest has to say about the file.

    Raises:
        OSError: the disk refused; the text names the file and, if the disk is full, how much is missing.
    """
    path, tensors = folder / file_name(rank), {name: box.tensor for name, box in boxes.items()}
    try:
        with TensorFileWriter(path, tensors) as writer:
            for name in by_alignment(tensors):
                writer.write(tensors[name].detach().cpu())
                failpoint("mid_shard")
        failpoint("after_shard")
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        held = path.stat().st_size if path.exists() else 0
        need, have = file_size(tensors), free_bytes(folder) + held
        raise OSError(error.errno, no_room(need, have), str(path)) from error
    return manifest_part(path.name, writer.facts, boxes)


def manifest_part(file: str, facts: FileFacts, boxes: Mapping[str, Box]) -> ManifestPart:
    """Describe one file and the boxes in it for the manifest; the tensors may be on the meta device."""
    tensors = {
        name: {
            "dtype": CODES[box.tensor.dtype],
            "shape": box.shape,
            "parts": [{"file": file, "offset": box.offset, "shape": box.tensor.shape}],
        }
        for name, box in boxes.items()
    }
    return {"files": {file: facts._asdict()}, "tensors": tensors}


def free_bytes(folder: Path) -> int:
    """Ask how many bytes the folder's file system still takes; quotas are not seen."""
    facts = os.statvfs(folder)
    return facts.f_bavail * facts.f_frsize


def no_room(need: int, have: int) -> str:
    """Word the error of a full disk; both arguments are bytes."""
    return f"No space left: need {need / 2**30:.3g} GiB, have {have / 2**30:.3g}"


def commit(folder: Path, final: Path, parts: Sequence[ManifestPart], facts: Mapping[str, Any]) -> None:
    """Write the manifest and give the folder its final name; called by one rank, when all files are written.

    Args:
        folder: where the files lie.
        final: the checkpoint's name; one that has it already is replaced.
        parts: one for each file.
        facts: all that the manifest holds besides.
    """
    files, tensors = dict[str, Any](), dict[str, Any]()
    for part in parts:
        files |= part["files"]
        for name, entry in part["tensors"].items():
            tensors.setdefault(name, {**entry, "parts": []})["parts"] += entry["parts"]
    manifest = {"format": FORMAT, **facts, "files": files, "tensors": tensors}
    text = json.dumps({**manifest, "checksum": checksum(manifest)}, indent=1)
    with naming(folder / MANIFEST):
        (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")
        _sync(folder / MANIFEST)
    failpoint("manifest_written")
    _sync(folder)
    if final.exists():  # until the new one has the name, `sweep` gives it back to the old one
        final.rename(final.with_name(f".old-{final.name}"))
    failpoint("before_rename")
    folder.rename(final)
    failpoint("after_rename")
    _sync(final.parent)
    discard(final.with_name(f".old-{final.name}"))


def retire(root: Path, *, keep: int | None, keep_every: int | None) -> None:
    """Remove what is neither one of the newest `keep` (None = all) nor a multiple of `keep_every` steps.

    A folder loses its name first: there is no moment at which half of a checkpoint bears one.
    """
    for path, step in list(find_checkpoints(root, complete=True).items())[keep:] if keep else []:
        if keep_every is None or step % keep_every:
            trash = path.rename(path.with_name(f".trash-{path.name}"))
            failpoint("mid_retention")
            discard(trash)


def sweep(root: Path) -> None:
    """Remove what a killed job left, and give its name back to a checkpoint that was being replaced."""
    for path in root.glob(".old-step-*"):
        final = path.with_name(path.name.removeprefix(".old-"))
        if not final.exists():
            path.rename(final)
    for pattern in (".old-step-*", ".tmp-step-*", ".trash-step-*"):
        for path in root.glob(pattern):
            log.info("removing %s, left by an earlier start", path)
            discard(path)


def discard(folder: Path) -> None:
    """Remove a folder, if it is there; if that fails, warn: the next start tries again."""
    if folder.exists():
        try:
            shutil.rmtree(folder)
        except OSError as error:
            log.warning("%s: not removed: %s", folder, error)


def checksum(manifest: Mapping[str, Any]) -> str:
    """Hash the manifest's content by sha256, whatever its order and spacing."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def find_checkpoints(root: Path, *, complete: bool) -> dict[Path, int]:
    """Find the checkpoints in a folder, newest first.

    Args:
        root: the folder that holds them, `checkpoints` of a run directory.
        complete: leave out what has no manifest or no step in its name. Where a run goes on, such folders
            count, because a damaged checkpoint must be noticed.

    Returns:
        The step of each folder; -1 where its name has none.
    """
    digits = {path: path.name.removeprefix("step-") for path in root.glob("step-*")}
    steps = {path: int(n) if n.isascii() and n.isdecimal() else -1 for path, n in digits.items()}
    if complete:
        steps = {path: step for path, step in steps.items() if step >= 0 and (path / MANIFEST).is_file()}
    return {path: steps[path] for path in sorted(steps, key=lambda path: (steps[path], path), reverse=True)}


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
