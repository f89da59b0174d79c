"""Reads tensors of a Hugging Face folder a few megabytes at a time, whatever their size."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from scripts.hf.config import ConversionError
from train.checkpoint.tensor_file import DTYPES

CHUNK = 2**22
"""Bytes of a tensor that are held at once."""
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


@dataclass(frozen=True)
class SourceTensor:
    """Where the bytes of a tensor are."""

    path: Path
    """File that holds it."""
    dtype: torch.dtype
    """Dtype in the file."""
    shape: tuple[int, ...]
    """Shape in the file."""
    start: int
    """Offset of the first byte in the file."""

    def chunks(self) -> Iterator[bytes]:
        """Read all bytes, in order, at most `CHUNK` at a time.

        Raises:
            ConversionError: the file ends too early.
        """
        size = math.prod(self.shape) * self.dtype.itemsize
        with self.path.open("rb") as file:
            file.seek(self.start)
            for first in range(0, size, CHUNK):
                wanted = min(CHUNK, size - first)
                data = file.read(wanted)
                if len(data) < wanted:
                    raise ConversionError(f"{self.path}: ends too early; copy the file again")
                yield data


def find_tensors(folder: Path) -> dict[str, SourceTensor]:
    """Find every tensor of a Hugging Face folder by name; only headers are read.

    Raises:
        ConversionError: no index, a file that is missing or no safetensors, a tensor that is not where the
            index says or that it does not name.
    """
    index = folder / INDEX
    if not index.is_file():
        if (folder / SINGLE).is_file():
            return read_header(folder / SINGLE)
        raise ConversionError(
            f"{index}: not found, and no {SINGLE}; only safetensors are read: convert other files to it first"
        )
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ConversionError(f"{index}: has no weight_map; take the index from where the model came from")
    files: dict[str, dict[str, SourceTensor]] = {}
    for name in places.values():
        if not isinstance(name, str) or not name.strip(".") or Path(name).name != name:
            raise ConversionError(f"{index}: names {name!r}, which is not a file beside it")
    for name in sorted(set(places.values())):
        files[name] = read_header(folder / name)
    found = {}
    for tensor, name in places.items():
        if tensor not in files[name]:
            raise ConversionError(f"{folder / name}: has no tensor {tensor}, which {INDEX} says is there")
        found[tensor] = files[name][tensor]
    for name, tensors in files.items():
        if lost := sorted(set(tensors) - set(found)):
            raise ConversionError(
                f"{folder / name}: holds {lost[0]} (one of {len(lost)}), which {INDEX} does not name; take "
                "the index from where the model came from"
            )
    return found


def read_header(path: Path) -> dict[str, SourceTensor]:
    """Find every tensor of a file by name.

    Raises:
        ConversionError: the file is missing, no safetensors file, or holds integers.
    """
    try:
        with safe_open(path, framework="pt"):
            pass  # it checks that the header is sound and agrees with the file's size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except (OSError, SafetensorError) as error:
        raise ConversionError(f"{path}: not readable: {error}; copy the file again") from error
    header.pop("__metadata__", None)
    unknown = {name: facts["dtype"] for name, facts in header.items() if facts["dtype"] not in DTYPES}
    if unknown:
        name, dtype = next(iter(unknown.items()))
        raise ConversionError(f"{path}: {name} is {dtype}; only {', '.join(DTYPES)} are read")
    return {
        name: SourceTensor(
            path, DTYPES[facts["dtype"]], tuple(facts["shape"]), 8 + length + facts["data_offsets"][0]
        )
        for name, facts in header.items()
    }


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ConversionError: the file holds none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConversionError(f"{path}: not readable: {error}; copy the file again") from error
    if not isinstance(content, dict):
        raise ConversionError(f"{path}: holds no JSON object")
    return content
