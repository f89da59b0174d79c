"""Writes safetensors files tensor by tensor, hashed on the way and never read back.

The format: 8 bytes, the length of a JSON header; the header; the tensors' bytes without gaps, little-endian.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import torch
from torch import Tensor

CODES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
"""Dtypes that are written, and what safetensors calls them."""
DTYPES = {code: dtype for dtype, code in CODES.items()}
CHUNK = 2**22
"""Bytes that are hashed and written at once: few enough to stay in a processor's cache in between."""


class FileFacts(NamedTuple):
    """What a file must be."""

    size: int
    """Bytes of the file."""
    sha256: str
    """Hash of all bytes, hexadecimal."""


def by_alignment(tensors: Mapping[str, Tensor]) -> list[str]:
    """Order names as a file has them: wide dtypes first, so that each tensor is aligned."""
    return sorted(tensors, key=lambda name: -tensors[name].itemsize)


def header_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """Encode all that stands before the first tensor; the length is a multiple of 8.

    Args:
        tensors: by name; only dtypes and shapes are read, so they may be on the meta device.
        metadata: free texts for the header.

    Raises:
        ValueError: a dtype is not written.
    """
    header: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
    end = 0
    for name in by_alignment(tensors):
        dtype, shape = tensors[name].dtype, tensors[name].shape
        if dtype not in CODES:
            known = ", ".join(str(dtype) for dtype in CODES)
            raise ValueError(f"{name} is {dtype}; a checkpoint holds {known}")
        start, end = end, end + tensors[name].nbytes
        header[name] = {"dtype": CODES[dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def file_size(tensors: Mapping[str, Tensor]) -> int:
    """Count the bytes of a file of these tensors, which may be on the meta device."""
    return len(header_bytes(tensors)) + sum(tensor.nbytes for tensor in tensors.values())


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add the file's name to errors of the disk: what a write reports says nothing of where."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


class TensorFileWriter:
    """Writes one new file, its tensors in the order of `by_alignment`, each whole or in pieces.

    Leaving the `with` block without an error makes the file durable. Errors of the disk name the file.
    """

    def __init__(
        self, path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
    ) -> None:
        """Create the file and write the header; the arguments are those of `header_bytes`."""
        header = header_bytes(tensors, metadata)
        self.path, self._hash = path, hashlib.sha256()
        self.size = len(header) + sum(tensor.nbytes for tensor in tensors.values())
        """Bytes of the whole file."""
        self.written = 0
        """Bytes written so far."""
        self._file = path.open("xb", buffering=0)  # chunks are large, and closing cannot fail
        self.write(header)

    def write(self, data: Tensor | bytes | memoryview) -> None:
        """Append a tensor, or the next bytes of one.

        Args:
            data: bytes, or a tensor on the host.
        """
        view = _memory(data) if isinstance(data, Tensor) else memoryview(data).cast("B")
        for first in range(0, len(view), CHUNK):
            chunk = view[first : first + CHUNK]
            self._hash.update(chunk)
            while chunk:  # a disk that is almost full takes a part
                with naming(self.path):
                    taken = self._file.write(chunk)
                self.written += taken
                chunk = chunk[taken:]

    def __enter__(self) -> "TensorFileWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._file:
            if error is None:
                assert self.written == self.size, f"{self.path}: {self.written} bytes of {self.size}"
                with naming(self.path):
                    os.fsync(self._file.fileno())

    @property
    def facts(self) -> FileFacts:
        """The size and hash of what was written."""
        return FileFacts(self.written, self._hash.hexdigest())


def _memory(tensor: Tensor) -> memoryview:
    """View a tensor on the host as bytes."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data
