"""Reads a checkpoint's manifest as a stranger's file: nothing in it is believed before it was checked.

Invariant: a Manifest makes sense in itself: every tensor is covered by its boxes, each element once, and
every name stays in the folder. Whether the files are what it says, train/checkpoint/restore.py checks.
"""

import json
import math
import re
import stat
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, NoReturn

from train.checkpoint.storage import FORMAT, MANIFEST, CheckpointError, checksum
from train.checkpoint.tensor_file import DTYPES, FileFacts

MAX_BYTES = 2**28
"""Largest manifest that is read; 80 layers on 1024 ranks take 2^26."""
MAX_DIMS, MAX_SIZE = 4, 2**53
FILE_NAME = re.compile(r"rank-[0-9]{5,7}\.safetensors")
PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,254}")
SHA256 = re.compile(r"[0-9a-f]{64}")
TOKENIZER = "tokenizer"
"""Folder of a checkpoint, and the manifest's key for the files in it."""


@dataclass(frozen=True, slots=True)
class StoredBox:
    """A box of a tensor as a checkpoint's file holds it, under the tensor's name."""

    file: str
    offset: tuple[int, ...]
    """Global index of the box's first element."""
    shape: tuple[int, ...]
    """The box's own shape."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of a checkpoint."""

    dtype: str | None
    """Dtype by safetensors' name; None in manifests from before it was kept."""
    shape: tuple[int, ...]
    """Global shape."""
    boxes: tuple[StoredBox, ...]
    """Boxes that together are the whole tensor, each element once."""


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says about itself."""

    folder: Path
    """Where the checkpoint lies."""
    step: int
    """Optimizer steps that the model has been trained for."""
    files: Mapping[str, FileFacts]
    """Size and hash of each file, by path in the folder."""
    tensors: Mapping[str, StoredTensor]
    """What the files hold, by name."""
    facts: Mapping[str, Any]
    """All else: config, progress, data, ...; JSON without NaN, otherwise as somebody wrote it."""

    @property
    def config(self) -> Mapping[str, Any]:
        """The configuration of the run that saved it; an imported model has only `model`."""
        return self.part("config")

    @property
    def holds_weights_only(self) -> bool:
        """Whether it can start a run (checkpoint.init), but not continue one."""
        return self.facts.get("kind") == "weights"

    def part(self, key: str) -> Mapping[str, Any]:
        """Look up a fact that must be an object.

        Raises:
            CheckpointError: the fact is not there, or something else.
        """
        value = self.facts.get(key)
        if not isinstance(value, dict):
            raise CheckpointError(f"{self.folder / MANIFEST}: {key} is {show(value)}, not an object")
        return value


def read_manifest(folder: Path, *, is_checked: bool = True) -> Manifest:
    """Read the manifest of a checkpoint folder.

    With `is_checked`, its checksum must be right, and it must know the hashes of its files.

    Raises:
        CheckpointError: the manifest is missing, damaged, of another format or nonsense; the text names it.
    """
    path = folder / MANIFEST
    try:
        content = _parse_json(_read_text(path))
        if not isinstance(content, dict):
            raise ValueError(f"holds {show(content)}, not an object")
        if content.get("format") != FORMAT:
            raise ValueError(f"format {show(content.get('format'))}, this version reads {FORMAT}")
        expected = content.pop("checksum", None)
        if is_checked and expected is None:
            raise ValueError("holds no hashes: it is from before they were kept; set checkpoint.verify=off")
        if is_checked and (actual := checksum(content)) != expected:
            raise ValueError(f"checksum {actual}, expected {show(expected)}")
        files = _files(content, is_checked)
        tensors = {
            _name(name, "tensor"): _stored_tensor(entry, f"tensors[{name}]", files if is_checked else None)
            for name, entry in _object(content.pop("tensors", None), "tensors").items()
        }
        step = _size(content.get("step"), "step")
    except OSError as error:
        raise CheckpointError(f"{path}: not readable: {error.strerror}") from error
    except RecursionError:
        raise CheckpointError(f"{path}: nested too deeply") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
    return Manifest(folder, step, files, tensors, content)


def _parse_json(text: str) -> Any:
    """Parse JSON as the standard has it.

    Raises:
        ValueError: no JSON, a key twice in an object, or a number that is none.
        RecursionError: nested too deeply.
    """

    def refuse(word: str) -> NoReturn:
        raise ValueError(f"not readable: {word[:40]} is no number")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) != len(pairs):
            twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
            raise ValueError(f"not readable: key {show(twice)} stands twice")
        return content

    def finite(word: str) -> float:
        return value if math.isfinite(value := float(word)) else refuse(word)

    try:
        return json.loads(text, object_pairs_hook=unique, parse_float=finite, parse_constant=refuse)
    except json.JSONDecodeError as error:
        raise ValueError(f"not readable: {error}") from None


def show(value: object) -> str:
    """Print a foreign value for people: one line, not long, nothing that a terminal obeys."""
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def require_file(path: Path) -> int:
    """Measure a regular file in bytes.

    Raises:
        OSError: the file is not there.
        ValueError: it is something else: a link, a pipe.
    """
    facts = path.lstat()
    if not stat.S_ISREG(facts.st_mode):
        raise ValueError("is no regular file; it was not opened")
    return facts.st_size


def _read_text(path: Path) -> str:
    if require_file(path) > MAX_BYTES:
        raise ValueError(f"{path.stat().st_size} bytes, at most {MAX_BYTES}")
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"not readable: {error.reason} at byte {error.start}") from None


def _files(content: dict[str, Any], is_checked: bool) -> dict[str, FileFacts]:
    """Take from the content what it says about the files, by path in the folder."""
    if "files" not in content and not is_checked:
        return {}
    ranks, tokenizer = content.pop("files", None), content.get(TOKENIZER, {})
    found = {}
    for prefix, group, names in (("", ranks, FILE_NAME), (f"{TOKENIZER}/", tokenizer, PLAIN_NAME)):
        for name, entry in _object(group, prefix.rstrip("/") or "files").items():
            if not names.fullmatch(name):
                raise ValueError(f"names {show(prefix + name)}, which nobody writes; it was not opened")
            facts = _object(entry, f"files[{prefix}{name}]")
            size = _size(facts.get("size"), f"files[{name}].size")
            digest = facts.get("sha256")
            if not isinstance(digest, str) or not SHA256.fullmatch(digest):
                raise ValueError(f"files[{name}].sha256 is {show(digest)}, no hash")
            found[prefix + name] = FileFacts(size, digest)
    return found


def _stored_tensor(entry: object, where: str, files: Mapping[str, FileFacts] | None) -> StoredTensor:
    fields = _object(entry, where)
    dtype, shape = fields.get("dtype"), _sizes(fields.get("shape"), f"{where}.shape")
    if dtype is not None and (not isinstance(dtype, str) or dtype not in DTYPES):
        raise ValueError(f"{where}.dtype is {show(dtype)}, not one of {list(DTYPES)}")
    if math.prod(shape) > MAX_SIZE:
        raise ValueError(f"{where}.shape {show(shape)} has more than {MAX_SIZE} elements")
    given = fields.get("parts")
    if not isinstance(given, list):
        raise ValueError(f"{where}.parts is {show(given)}, not a list")
    boxes = tuple(_stored_box(each, f"{where}.parts[{n}]", shape, files) for n, each in enumerate(given))
    if len({box.file for box in boxes}) != len(boxes):
        raise ValueError(f"{where}.parts name a file twice")
    if not _tile(shape, boxes):
        raise ValueError(f"{where}.parts leave a gap in its shape {list(shape)}, or overlap")
    return StoredTensor(dtype, shape, boxes)


def _stored_box(
    entry: object, where: str, whole: tuple[int, ...], files: Mapping[str, FileFacts] | None
) -> StoredBox:
    fields = _object(entry, where)
    file = fields.get("file")
    if not isinstance(file, str) or not FILE_NAME.fullmatch(file):
        raise ValueError(f"{where}.file is {show(file)}, which no rank writes; it was not opened")
    if files is not None and file not in files:
        raise ValueError(f"{where}.file is {file}, of which no hash is kept")
    offset = _sizes(fields.get("offset"), f"{where}.offset")
    shape = _sizes(fields.get("shape"), f"{where}.shape")
    fits = len(offset) == len(shape) == len(whole)
    if not fits or any(o + s > w for o, s, w in zip(offset, shape, whole, strict=True)):
        raise ValueError(f"{where} at {list(offset)}, shape {list(shape)}, is not inside {list(whole)}")
    return StoredBox(file, offset, shape)


def _tile(whole: tuple[int, ...], boxes: tuple[StoredBox, ...]) -> bool:
    """Tell whether the boxes cover the whole, each element once.

    How often an element is covered is the sum of the boxes' indicator functions; that sum is the whole's
    own if and only if their mixed differences are the same: the corners, with alternating signs.
    """
    if len(boxes) == 1:
        return boxes[0].shape == whole
    corners: Counter[tuple[int, ...]] = Counter()
    for offset, shape, sign in [
        ((0,) * len(whole), whole, 1),
        *((box.offset, box.shape, -1) for box in boxes if math.prod(box.shape)),
    ]:
        ends = zip(offset, shape, strict=True)
        for corner in product(*(((start, 1), (start + size, -1)) for start, size in ends)):
            corners[tuple(at for at, _ in corner)] += sign * math.prod(side for _, side in corner)
    return not any(corners.values())


def _object(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{where} is {show(value)}, not an object")
    return value


def _sizes(value: object, where: str) -> tuple[int, ...]:
    if not isinstance(value, list) or len(value) > MAX_DIMS:
        raise ValueError(f"{where} is {show(value)}, not a list of up to {MAX_DIMS} sizes")
    return tuple(_size(each, where) for each in value)


def _size(value: object, where: str) -> int:
    if type(value) is not int or not 0 <= value <= MAX_SIZE:  # bool is an int, too
        raise ValueError(f"{where} has {show(value)}, not an integer from 0 to 2^53")
    return value


def _name(value: str, what: str) -> str:
    if not PLAIN_NAME.fullmatch(value):
        raise ValueError(f"{what} name {show(value)}: only letters, digits, _ . - are read")
    return value
