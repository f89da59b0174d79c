"""Reading checkpoint folders: whether the files are what the manifest says, and their content.

A rank reads the boxes that overlap its own, so any layout restores any other. No file is opened that the
manifest does not name, and none is read as anything but safetensors.
"""

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from train.checkpoint.manifest import (
    DTYPES,
    TOKENIZER,
    Manifest,
    Place,
    parse_json,
    read_manifest,
    require_file,
    show,
)
from train.checkpoint.storage import MANIFEST, Box, CheckpointError

BLOCK = 2**24
MAX_HEADER = 10**8
"""Bytes of a safetensors header, as its own library has it."""


class Verify(StrEnum):
    """What is checked before a checkpoint is used."""

    hash = "hash"
    """Every byte."""
    size = "size"
    """The manifest's checksum, sizes and headers of the files."""
    off = "off"
    """Only that the manifest makes sense; old ones without hashes are read, too."""


def verify(folder: Path, how: Verify = Verify.hash) -> list[str]:
    """What is wrong with a checkpoint folder, by one process: a line a file, with expected and actual."""
    try:
        manifest = read_manifest(folder, is_checked=how is not Verify.off)
    except CheckpointError as error:
        return [str(error)]
    problems = strangers(manifest)
    if how is not Verify.off:
        problems += [line for line in check_files(manifest, manifest.files, how) if line]
    return problems


def strangers(manifest: Manifest) -> list[str]:
    """One line for each thing in the folder that the manifest does not name; hidden files do not count."""
    known = {name.partition("/")[0] for name in manifest.files} | {MANIFEST}
    known |= {part.file for saved in manifest.tensors.values() for part in saved.parts}
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


def check_files(manifest: Manifest, names: Iterable[str], how: Verify) -> Iterator[str]:
    """Check files of a checkpoint in small pieces: yields "" after each, or a line on what is wrong."""
    held: dict[str, dict[str, tuple[Place, str | None]]] = {}
    for name, saved in manifest.tensors.items():
        for part in saved.parts:
            held.setdefault(part.file, {})[name] = (part, saved.dtype)
    for name in names:
        path, expected = manifest.folder / name, manifest.files[name]
        try:
            size = require_file(path)
            if size != expected.size:
                raise ValueError(f"{size} bytes, expected {expected.size}")
            if name.endswith(".safetensors"):
                _check_header(path, size, held.get(name, {}))
            if how is Verify.hash:
                yield from _check_hash(path, expected.sha256)
        except OSError as error:
            yield f"{path}: not readable: {error.strerror}"
        except RecursionError:
            yield f"{path}: header: nested too deeply"
        except ValueError as error:
            yield f"{path}: {error}"


def _check_hash(path: Path, expected: str) -> Iterator[str]:
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while block := file.read(BLOCK):
            digest.update(block)
            yield ""
    if digest.hexdigest() != expected:
        raise ValueError(f"sha256 {digest.hexdigest()}, expected {expected}")


def _check_header(path: Path, size: int, held: Mapping[str, tuple[Place, str | None]]) -> None:
    """Refuse a file whose header does not hold exactly these tensors, one after the other to its end."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(MAX_HEADER, size - 8):
            raise ValueError(f"header of {length} bytes in a file of {size}")
        header = parse_json(file.read(length).decode())
    if not isinstance(header, dict):
        raise ValueError(f"header is {show(header)}, not an object")
    header.pop("__metadata__", None)
    if header.keys() != held.keys():
        one = min(header.keys() ^ held.keys())
        raise ValueError(f"header {'lacks' if one in held else 'has also'} tensor {show(one)}")
    spans = []
    for name, (part, dtype) in held.items():
        entry = header[name]
        found = (entry.get("dtype"), entry.get("shape")) if isinstance(entry, dict) else (None, None)
        if found[0] not in ([dtype] if dtype else list(DTYPES)) or found[1] != list(part.shape):
            expected = f"{dtype or '/'.join(DTYPES)} {list(part.shape)}"
            raise ValueError(f"header: {name} is {show(found)}, expected {expected}")
        span = entry.get("data_offsets")
        if not isinstance(span, list) or [type(at) for at in span] != [int, int]:
            raise ValueError(f"header: {name} has data_offsets {show(span)}")
        spans.append((*span, DTYPES[found[0]] * math.prod(part.shape), name))
    at = 0
    for begin, end, count, name in sorted(spans):
        if (begin, end) != (at, at + count):
            raise ValueError(f"header: {name} has data_offsets {begin}, {end}, expected {at}, {at + count}")
        at = end
    if at != size - 8 - length:
        raise ValueError(f"header: tensors of {at} bytes, {size - 8 - length} are there")


def read_boxes(manifest: Manifest, boxes: Mapping[str, Box]) -> None:
    """Fill every box from the parts that overlap it, each file opened once.

    Raises:
        CheckpointError: a tensor is missing, has another shape, or a file is not what the manifest says.
    """
    wanted: dict[str, list[tuple[str, Place]]] = {}
    for name, box in boxes.items():
        saved = manifest.tensors.get(name)
        if saved is None:
            raise CheckpointError(f"{manifest.folder}: has no tensor {name}")
        if saved.shape != box.shape:
            raise CheckpointError(
                f"{manifest.folder}: {name} has shape {list(saved.shape)}, the model {list(box.shape)}"
            )
        for part in saved.parts:
            if box.tensor.numel() and _overlap(part, box) is not None:
                wanted.setdefault(part.file, []).append((name, part))
    for file, parts in wanted.items():
        path = manifest.folder / file
        try:
            require_file(path)
            with safe_open(path, framework="pt") as opened:
                for name, part in parts:
                    _copy(opened, name, part, boxes[name])
        except (OSError, SafetensorError, ValueError) as error:
            raise CheckpointError(f"{path}: not readable: {error}") from error


def _overlap(part: Place, box: Box) -> tuple[tuple[slice, ...], tuple[slice, ...]] | None:
    """What a part and a box share, as indices of each; None = nothing."""
    source, target = [], []
    for p_offset, p_size, offset, size in zip(
        part.offset, part.shape, box.offset, box.tensor.shape, strict=True
    ):
        low, high = max(p_offset, offset), min(p_offset + p_size, offset + size)
        if low >= high:
            return None
        source.append(slice(low - p_offset, high - p_offset))
        target.append(slice(low - offset, high - offset))
    return tuple(source), tuple(target)


def _copy(opened: Any, name: str, part: Place, box: Box) -> None:
    """Copy what an open file's part and the box share."""
    values = opened.get_slice(name)
    if tuple(values.get_shape()) != part.shape or values.get_dtype() not in DTYPES:
        found = f"{values.get_dtype()} {values.get_shape()}"
        raise ValueError(f"{name} is {found}, expected {list(part.shape)}")
    shared = _overlap(part, box)
    assert shared is not None
    source, target = shared
    box.tensor[target] = (values[source] if source else opened.get_tensor(name)).to(box.tensor.device)
