"""Checkpoint folders: one safetensors file a rank, and a JSON manifest that says which box lies where.

A folder is written beside its final name and renamed when complete; without a manifest it is no checkpoint.
Names with a dot are leftovers, which the next start removes. train/checkpoint/restore.py reads checkpoints.
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
from typing import Any, NamedTuple

from torch import Tensor

from train.checkpoint.tensor_file import (
    CODES,
    FileFacts,
    Form,
    TensorFileWriter,
    by_alignment,
    file_size,
    naming,
)

log = logging.getLogger(__name__)

FORMAT = 1
MANIFEST = "manifest.json"


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be read; the text names the file and the reason."""


@dataclass(frozen=True)
class Box:
    """A local part of a named global tensor."""

    tensor: Tensor
    """[local shape], written to or read into."""
    shape: tuple[int, ...]
    """Global shape."""
    offset: tuple[int, ...]
    """Global index of the part's first element."""


class Part(NamedTuple):
    """Where a tensor of one file lies in the global one."""

    dtype: str
    """As safetensors calls it."""
    shape: Sequence[int]
    """Global shape."""
    offset: Sequence[int]
    """Global index of the part's first element."""
    size: Sequence[int]
    """The part's own shape."""


class Written(NamedTuple):
    """A file of a checkpoint, and by name what is in it; all of it JSON."""

    size: int
    """Bytes."""
    sha256: str
    """Of all bytes, hexadecimal."""
    parts: Mapping[str, Sequence[Any]]
    """`Part` by tensor name."""


def file_name(number: int) -> str:
    """Name of a checkpoint's file: rank's number, or a running one."""
    return f"rank-{number:05d}.safetensors"


def forms_of(boxes: Mapping[str, Box]) -> dict[str, Form]:
    """What a file of these boxes holds."""
    return {name: Form(box.tensor.dtype, tuple(box.tensor.shape)) for name, box in boxes.items()}


def failpoint(name: str) -> None:
    """A place in the writing of a checkpoint where a test may let a process die or meet an error."""


def write_shard(folder: Path, rank: int, boxes: Mapping[str, Box]) -> Written:
    """Write this rank's boxes into `folder`, durably, one tensor at a time on the host; what was written.

    Raises:
        OSError: the disk is full (how much is missing), or what else it says; names the file.
    """
    forms, path = forms_of(boxes), folder / file_name(rank)
    try:
        with TensorFileWriter(path, forms) as writer:
            for name in by_alignment(forms):
                writer.write(boxes[name].tensor.detach().cpu())
                failpoint("mid_shard")
        failpoint("after_shard")
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        held = path.stat().st_size if path.exists() else 0
        need, have = file_size(forms), free_bytes(folder) + held
        raise OSError(error.errno, no_room(need, have), str(path)) from error
    parts = {
        name: Part(CODES[box.tensor.dtype], box.shape, box.offset, forms[name].shape)
        for name, box in boxes.items()
    }
    return Written(*writer.facts, parts)


def free_bytes(folder: Path) -> int:
    """What may still be written to the folder's file system; quotas are not seen."""
    facts = os.statvfs(folder)
    return facts.f_bavail * facts.f_frsize


def no_room(need: int, have: int) -> str:
    """What a full disk means."""
    return f"No space left: need {need / 2**30:.3g} GiB, have {have / 2**30:.3g}"


def measure(path: Path) -> FileFacts:
    """Size and hash of a file; sha256, because it is in the standard library and faster than a disk."""
    with path.open("rb") as file:
        return FileFacts(path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())


def commit(folder: Path, final: Path, files: Sequence[Written], facts: Mapping[str, Any]) -> None:
    """Write the manifest of the ranks' files and give the folder its final name; one rank, after all."""
    tensors: dict[str, Any] = {}
    for rank, file in enumerate(files):
        for key, (dtype, shape, offset, size) in file.parts.items():
            entry = tensors.setdefault(key, {"dtype": dtype, "shape": shape, "parts": []})
            entry["parts"].append({"file": file_name(rank), "offset": offset, "shape": size})
    known = {file_name(n): {"size": file.size, "sha256": file.sha256} for n, file in enumerate(files)}
    manifest = {"format": FORMAT, **facts, "files": known, "tensors": tensors}
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
    """Remove what a killed job left; give its name back to a checkpoint that was being replaced."""
    for path in root.glob(".old-step-*"):
        final = path.with_name(path.name.removeprefix(".old-"))
        if not final.exists():
            path.rename(final)
    for pattern in (".old-step-*", ".tmp-step-*", ".trash-step-*"):
        for path in root.glob(pattern):
            log.info("removing %s, left by an earlier start", path)
            discard(path)


def discard(folder: Path) -> None:
    """Remove a folder, if it is there; what cannot be removed is a warning, the next start tries again."""
    if folder.exists():
        try:
            shutil.rmtree(folder)
        except OSError as error:
            log.warning("%s: not removed: %s", folder, error)


def checksum(manifest: Mapping[str, Any]) -> str:
    """sha256 of the manifest's content, whatever its order and spacing."""
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
