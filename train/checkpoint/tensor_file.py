"""Writes safetensors files tensor by tensor, hashed on the way and never read back.

The format: 8 bytes, the length of a JSON header; the header; the tensors' bytes without gaps, little-endian.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import torch
from torch import Tensor

CODES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
"""What safetensors calls the dtypes that are written."""
CHUNK = 2**22
"""Bytes that are hashed and written at once: few enough to stay in a processor's cache in between."""


class Form(NamedTuple):
    """What is known of a tensor before its values."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class FileFacts(NamedTuple):
    """What a file must be."""

    size: int
    """Bytes."""
    sha256: str
    """Of all bytes, hexadecimal."""


def by_alignment(forms: Mapping[str, Form]) -> list[str]:
    """Names in the order of the file: wide dtypes first, so that each tensor is aligned."""
    return sorted(forms, key=lambda name: -forms[name].dtype.itemsize)


def header_bytes(forms: Mapping[str, Form], metadata: Mapping[str, str] | None = None) -> bytes:
    """All that stands before the first tensor; its length is a multiple of 8.

    Raises:
        ValueError: a dtype that is not written.
    """
    header: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
    end = 0
    for name in by_alignment(forms):
        form = forms[name]
        if form.dtype not in CODES:
            known = ", ".join(str(dtype) for dtype in CODES)
            raise ValueError(f"{name} is {form.dtype}; a checkpoint holds {known}")
        start, end = end, end + form.size
        header[name] = {"dtype": CODES[form.dtype], "shape": form.shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def file_size(forms: Mapping[str, Form]) -> int:
    """Bytes of a file of these tensors."""
    return len(header_bytes(forms)) + sum(form.size for form in forms.values())


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Errors of the disk in here name the file: what a write reports says nothing of where."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


class TensorFileWriter:
    """One new file; tensors are given one after the other in the order of `by_alignment`, whole or in pieces.

    Leaving the `with` block without an error makes the file durable. Errors of the disk name the file.
    """

    def __init__(
        self, path: Path, forms: Mapping[str, Form], metadata: Mapping[str, str] | None = None
    ) -> None:
        header = header_bytes(forms, metadata)
        self.path, self._hash = path, hashlib.sha256()
        self.size = len(header) + sum(form.size for form in forms.values())
        """Bytes of the whole file."""
        self.written = 0
        """Bytes so far."""
        self._file = path.open("xb", buffering=0)  # chunks are large, and closing cannot fail
        self.write(header)

    def write(self, data: Tensor | bytes | memoryview) -> None:
        """Append a tensor, or the next bytes of one.

        Args:
            data: a tensor must be on the host.
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
        """Size and hash of what was written."""
        return FileFacts(self.written, self._hash.hexdigest())


def _memory(tensor: Tensor) -> memoryview:
    """The bytes of a tensor on the host."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data
