"""Reads checkpoint folders: whether the files are what the manifest says, and their content.

A rank reads the boxes that overlap its own, so any layout restores any other. No file is opened that the
manifest does not name, and none is read as anything but safetensors.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from enum import StrEnum
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from train.checkpoint.manifest import (
    TOKENIZER,
    Manifest,
    StoredBox,
    read_manifest,
    require_file,
    show,
)
from train.checkpoint.storage import MANIFEST, Box, CheckpointError
from train.checkpoint.tensor_file import DTYPES

BLOCK = 2**24
"""Bytes that are hashed at once."""
Overlap = tuple[tuple[slice, ...], tuple[slice, ...]]
"""What a stored box and another share, as indices of each."""


class Verify(StrEnum):
    """What is checked before a checkpoint is used."""

    hash = "hash"
    """Every byte."""
    size = "size"
    """The manifest's checksum, sizes and headers of the files."""
    off = "off"
    """Only that the manifest makes sense; old ones without hashes are read, too."""


def verify(folder: Path, how: Verify = Verify.hash) -> list[str]:
    """List what is wrong with a checkpoint folder, in one process: a line a file, expected and actual."""
    try:
        manifest = read_manifest(folder, is_checked=how is not Verify.off)
    except CheckpointError as error:
        return [str(error)]
    problems = strangers(manifest)
    if how is not Verify.off:
        problems += [line for line in check_files(manifest, manifest.files, how) if line]
    return problems


def strangers(manifest: Manifest) -> list[str]:
    """List what the manifest does not name of what is in the folder; hidden files do not count."""
    known = {name.partition("/")[0] for name in manifest.files} | {MANIFEST}
    known |= {box.file for tensor in manifest.tensors.values() for box in tensor.boxes}
    found = [path for path in manifest.folder.iterdir() if path.name not in known]
    inner = manifest.folder / TOKENIZER
    if TOKENIZER in known and inner.is_dir() and not inner.is_symlink():
        found += [path for path in inner.iterdir() if f"{TOKENIZER}/{path.name}" not in manifest.files]
    elif TOKENIZER in known:
        found.append(inner)
    return [
        f"{manifest.folder}/{show(str(path.relative_to(manifest.folder)))[1:-1]}: the manifest does not name "
        "it; it was not opened; take it away"
        for path in sorted(found)
        if not path.name.startswith(".")
    ]


def check_files(manifest: Manifest, names: Iterable[str], how: Verify) -> Iterator[str | None]:
    """Check files of a checkpoint in small pieces.

    Yields:
        None after a piece, so that the caller can stop in between, or a line on what is wrong with a file.
    """
    held: dict[str, dict[str, tuple[StoredBox, str | None]]] = {}
    for name, tensor in manifest.tensors.items():
        for stored in tensor.boxes:
            held.setdefault(stored.file, {})[name] = (stored, tensor.dtype)
    for name in names:
        path, expected = manifest.folder / name, manifest.files[name]
        try:
            if (size := require_file(path)) != expected.size:
                raise ValueError(f"{size} bytes, expected {expected.size}")
            if name.endswith(".safetensors"):
                _check_header(path, held.get(name, {}))
            if how is Verify.hash:
                yield from _check_hash(path, expected.sha256)
        except OSError as error:
            yield f"{path}: not readable: {error.strerror}"
        except SafetensorError as error:
            yield f"{path}: {show(str(error))[1:-1]}"
        except ValueError as error:
            yield f"{path}: {error}"


def _check_hash(path: Path, expected: str) -> Iterator[None]:
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while block := file.read(BLOCK):
            digest.update(block)
            yield None
    if digest.hexdigest() != expected:
        raise ValueError(f"sha256 {digest.hexdigest()}, expected {expected}")


def _check_header(path: Path, held: Mapping[str, tuple[StoredBox, str | None]]) -> None:
    """Refuse a file that does not hold exactly these tensors; that they fill it is seen by safetensors."""
    with safe_open(path, framework="pt") as file:
        found = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
    if found.keys() != held.keys():
        one = min(found.keys() ^ held.keys())
        raise ValueError(f"header {'lacks' if one in held else 'has also'} tensor {show(one)}")
    for name, (stored, dtype) in held.items():
        given = (found[name].get_dtype(), found[name].get_shape())
        if given[0] not in ([dtype] if dtype else DTYPES) or given[1] != list(stored.shape):
            expected = f"{dtype or '/'.join(DTYPES)} {list(stored.shape)}"
            raise ValueError(f"header: {name} is {show(given)}, expected {expected}")


def read_boxes(manifest: Manifest, boxes: Mapping[str, Box]) -> None:
    """Fill every box from the stored ones that overlap it, each file opened once.

    Raises:
        CheckpointError: a tensor is missing, has another shape, or a file is not what the manifest says.
    """
    wanted: dict[str, list[tuple[str, StoredBox, Overlap]]] = {}
    for name, box in boxes.items():
        tensor = manifest.tensors.get(name)
        if tensor is None:
            raise CheckpointError(f"{manifest.folder}: has no tensor {name}")
        if tensor.shape != box.shape:
            raise CheckpointError(
                f"{manifest.folder}: {name} has shape {list(tensor.shape)}, the model {list(box.shape)}"
            )
        for stored in tensor.boxes:
            if (overlap := _overlap(stored, box)) is not None:
                wanted.setdefault(stored.file, []).append((name, stored, overlap))
    for file, needed in wanted.items():
        path = manifest.folder / file
        try:
            require_file(path)
            with safe_open(path, framework="pt") as opened:
                for name, stored, overlap in needed:
                    _copy(opened, name, stored, overlap, boxes[name].tensor)
        except (OSError, SafetensorError, ValueError) as error:
            raise CheckpointError(f"{path}: not readable: {error}") from error


def _overlap(stored: StoredBox, box: Box) -> Overlap | None:
    """Find what two boxes share; None = nothing."""
    source, target = [], []
    for s_offset, s_size, offset, size in zip(
        stored.offset, stored.shape, box.offset, box.tensor.shape, strict=True
    ):
        low, high = max(s_offset, offset), min(s_offset + s_size, offset + size)
        if low >= high:
            return None
        source.append(slice(low - s_offset, high - s_offset))
        target.append(slice(low - offset, high - offset))
    return tuple(source), tuple(target)


def _copy(opened: safe_open, name: str, stored: StoredBox, overlap: Overlap, target: Tensor) -> None:
    """Copy what an open file's box and the target share."""
    values = opened.get_slice(name)
    if tuple(values.get_shape()) != stored.shape or values.get_dtype() not in DTYPES:
        found = f"{values.get_dtype()} {values.get_shape()}"
        raise ValueError(f"{name} is {found}, expected {list(stored.shape)}")
    source, place = overlap
    target[place] = (values[source] if source else opened.get_tensor(name)).to(target.device)
