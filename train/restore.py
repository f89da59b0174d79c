"""Reading checkpoint folders: what the manifest says, whether the files agree, and their content.

A rank reads the boxes that overlap its own, so any layout restores any other.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from train.storage import FORMAT, MANIFEST, Box, CheckpointError, checksum, measure

FILE_NAME = re.compile(r"rank-\d{5,}\.safetensors")


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
    expected, actual = manifest.pop("checksum", None), checksum(manifest)
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
