"""Checkpoint folders: one safetensors file a rank, and a JSON manifest that says which box lies where.

A folder is written beside its final name and renamed when complete; without a manifest it is no checkpoint.
train/restore.py reads it.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

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
    text = json.dumps({**manifest, "checksum": checksum(manifest)}, indent=1)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")
    _sync(folder / MANIFEST)
    _sync(folder)
    old = final.with_name(f".trash-{final.name}")
    if final.exists():
        final.rename(old)
    folder.rename(final)
    _sync(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def checksum(manifest: Mapping[str, Any]) -> str:
    """sha256 of the manifest's content, whatever its order and spacing."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


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
