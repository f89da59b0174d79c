"""Checkpoint folders: one safetensors file a rank, and a JSON manifest that says which box lies where.

A rank reads the boxes that overlap its own, so any layout restores any other. A folder is written
beside its final name and renamed when complete; without a manifest it is no checkpoint.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

FORMAT = 1
MANIFEST = "manifest.json"
FILE_NAME = re.compile(r"rank-\d{5,}\.safetensors")


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


@dataclass(frozen=True)
class FileFacts:
    """What a file of a checkpoint must be."""

    size: int
    """Bytes."""
    sha256: str
    """Of all bytes, hexadecimal."""


def write_shard(folder: Path, rank: int, boxes: Mapping[str, Box]) -> FileFacts:
    """Write this rank's boxes into `folder`, durably; what was written."""
    folder.mkdir(parents=True, exist_ok=True)
    layout = {name: {"shape": box.shape, "offset": box.offset} for name, box in boxes.items()}
    path = folder / f"rank-{rank:05d}.safetensors"
    tensors = {name: box.tensor.detach().cpu().contiguous() for name, box in boxes.items()}
    save_file(tensors, path, metadata={"layout": json.dumps(layout)})
    _sync(path)
    return measure(path)


def measure(path: Path) -> FileFacts:
    """Size and hash of a file; sha256, because it is in the standard library and faster than a disk."""
    with path.open("rb") as file:
        return FileFacts(path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())


def commit(folder: Path, final: Path, files: Sequence[FileFacts], facts: Mapping[str, Any]) -> None:
    """Write the manifest from the ranks' files and give the folder its final name; one rank, after all."""
    tensors: dict[str, Any] = {}
    known: dict[str, Any] = {}
    for rank, file_facts in enumerate(files):
        name = f"rank-{rank:05d}.safetensors"
        known[name] = asdict(file_facts)
        with safe_open(folder / name, framework="pt") as file:
            layout = json.loads(file.metadata()["layout"])
            for key, place in layout.items():
                entry = tensors.setdefault(key, {"shape": place["shape"], "parts": []})
                size = file.get_slice(key).get_shape()
                entry["parts"].append({"file": name, "offset": place["offset"], "shape": size})
    manifest = {"format": FORMAT, **facts, "files": known, "tensors": tensors}
    text = json.dumps({**manifest, "checksum": _checksum(manifest)}, indent=1)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")
    _sync(folder / MANIFEST)
    _sync(folder)
    old = final.with_name(f".trash-{final.name}")
    if final.exists():
        final.rename(old)
    folder.rename(final)
    _sync(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint folder.

    Raises:
        CheckpointError: it is missing, unreadable or of another format.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable: {error}") from error
    if manifest.get("format") != FORMAT:
        raise CheckpointError(f"{path}: format {manifest.get('format')}, this version reads {FORMAT}")
    return manifest


def verify(folder: Path) -> list[str]:
    """What is wrong with a checkpoint folder: one line a file, with expected and actual; all bytes are read.

    Raises:
        CheckpointError: there is no readable manifest, or it is from before files were hashed.
    """
    manifest = read_manifest(folder)
    if "files" not in manifest:
        raise CheckpointError(f"{folder / MANIFEST}: holds no hashes; it was written before they were kept")
    found = []
    expected, actual = manifest.pop("checksum", None), _checksum(manifest)
    if expected != actual:
        found.append(f"{folder / MANIFEST}: checksum {actual}, expected {expected}")
        return found  # what it says about the files is worth nothing
    for name, facts in manifest["files"].items():
        if not FILE_NAME.fullmatch(name):
            found.append(f"{folder / MANIFEST}: names {name!r}, which no rank writes; it was not opened")
            continue
        try:
            is_now = measure(folder / name)
        except OSError as error:
            found.append(f"{folder / name}: not readable: {error.strerror}")
            continue
        if is_now.size != facts["size"]:
            found.append(f"{folder / name}: {is_now.size} bytes, expected {facts['size']}")
        elif is_now.sha256 != facts["sha256"]:
            found.append(f"{folder / name}: sha256 {is_now.sha256}, expected {facts['sha256']}")
    return found


def _checksum(manifest: Mapping[str, Any]) -> str:
    """sha256 of the manifest's content, whatever its order and spacing."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def read_boxes(folder: Path, manifest: Mapping[str, Any], boxes: Mapping[str, Box]) -> None:
    """Fill every box from the parts that overlap it.

    Raises:
        CheckpointError: a tensor is missing, has another shape, or is not covered by the files.
    """
    for name, box in boxes.items():
        entry = manifest["tensors"].get(name)
        if entry is None:
            raise CheckpointError(f"{folder}: has no tensor {name}")
        if tuple(entry["shape"]) != box.shape:
            raise CheckpointError(f"{folder}: {name} has shape {entry['shape']}, the model {list(box.shape)}")
        filled = sum(_copy_overlap(folder, name, part, box) for part in entry["parts"])
        if filled != box.tensor.numel():
            raise CheckpointError(
                f"{folder}: {name}: the files hold {filled} of {box.tensor.numel()} elements at {box.offset}"
            )


def _copy_overlap(folder: Path, name: str, part: Mapping[str, Any], box: Box) -> int:
    """Copy what a part and the box share; the number of elements."""
    source, target, count = [], [], 1
    for p_offset, p_size, offset, size in zip(
        part["offset"], part["shape"], box.offset, box.tensor.shape, strict=True
    ):
        low, high = max(p_offset, offset), min(p_offset + p_size, offset + size)
        if low >= high:
            return 0
        source.append(slice(low - p_offset, high - p_offset))
        target.append(slice(low - offset, high - offset))
        count *= high - low
    try:
        with safe_open(folder / part["file"], framework="pt") as file:
            values = file.get_slice(name)[tuple(source)] if source else file.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder / part['file']}: {name} not readable: {error}") from error
    box.tensor[tuple(target)] = values.to(box.tensor.device)
    return count


def checkpoints_in(folder: Path) -> Iterator[tuple[int, Path]]:
    """(step, path) of the complete checkpoints under a folder, newest first."""
    found = [(int(path.name[5:]), path) for path in folder.glob("step-*") if path.name[5:].isdigit()]
    yield from sorted(((step, path) for step, path in found if (path / MANIFEST).is_file()), reverse=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
