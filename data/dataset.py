"""Token files in the format of Megatron's IndexedDataset: PREFIX.bin holds tokens, PREFIX.idx documents.

Files that Megatron wrote work as they are. Ours come with a manifest, PREFIX.json, and PREFIX.tokenizer.json.
Invariant: a TokenDataset that could be opened is complete; sizes and index were checked against each other.
"""

import hashlib
import json
import shutil
import struct
from array import array
from pathlib import Path
from typing import Any, Self

import numpy as np

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, documents + 1
DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}  # Megatron's codes of integer types
MANIFEST_FORMAT = 1
SAMPLES, SAMPLE_BYTES = 64, 4096


class TokenDataset:
    """Documents of one pair of token files, memory-mapped.

    Attributes:
        prefix: PREFIX of the files.
        num_documents, num_tokens: totals, empty documents included.
        document_lengths: [documents] int64, in tokens.
        fingerprint: short hash of the index and of samples of the tokens; the same for a copy elsewhere.
        manifest: content of PREFIX.json, or None for files that Megatron wrote.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = str(prefix)
        for path in (f"{prefix}.idx", f"{prefix}.bin"):
            if not Path(path).is_file():
                raise ValueError(
                    f"{path} not found; data.sources[*].path must be the PREFIX written by: "
                    f"python scripts/prepare_data.py --input FILES --output {prefix} --tokenizer FILE"
                )
        size = Path(f"{prefix}.bin").stat().st_size
        index = Path(f"{prefix}.idx").read_bytes()
        dtype, self._starts = _parse_index(f"{prefix}.idx", index)
        self.document_lengths = np.diff(self._starts)
        self.num_documents, self.num_tokens = len(self.document_lengths), int(self._starts[-1])
        if size != self.num_tokens * dtype.itemsize:
            raise ValueError(
                f"{prefix}.bin has {size} bytes, but {prefix}.idx describes {self.num_tokens} tokens = "
                f"{self.num_tokens * dtype.itemsize} bytes; copy or prepare both files again"
            )
        self.fingerprint = _fingerprint(Path(f"{prefix}.bin"), index)
        self.manifest = _read_manifest(Path(f"{prefix}.json"), bin_bytes=size, idx_bytes=len(index))
        if self.manifest and self.manifest.get("fingerprint", self.fingerprint) != self.fingerprint:
            raise ValueError(
                f"{prefix}.bin or .idx has changed since {prefix}.json was written: fingerprint "
                f"{self.fingerprint}, not {self.manifest['fingerprint']}; copy or prepare the files again"
            )
        # A plain view, because slicing an np.memmap is slow; an empty file cannot be mapped.
        self._tokens = np.memmap(f"{prefix}.bin", dtype, "r").view(np.ndarray) if size else np.empty(0, dtype)

    def read(self, document: int, start: int, out: np.ndarray) -> None:
        """Copy a document's tokens `start`, `start + 1`, ... into `out`, as many as it holds."""
        assert start + len(out) <= self.document_lengths[document]
        begin = self._starts[document] + start
        out[:] = self._tokens[begin : begin + len(out)]


def _fingerprint(tokens: Path, index: bytes) -> str:
    """Hash the index, the size of the tokens and 64 evenly spaced blocks, the first and last among them.

    It notices other texts, tokenizers and orders, a torn end, and up to 256 KiB any change. Beyond that a
    change to a share p of the blocks is missed with probability (1 - p)**64; sha256sum reads everything.
    """
    size = tokens.stat().st_size
    content = hashlib.blake2b(index, digest_size=8)
    content.update(b"%d" % size)
    with tokens.open("rb") as file:
        for i in range(SAMPLES):
            file.seek(i * max(0, size - SAMPLE_BYTES) // (SAMPLES - 1))
            content.update(file.read(SAMPLE_BYTES))
    return content.hexdigest()


def _parse_index(path: str, index: bytes) -> tuple[np.dtype, np.ndarray]:
    """Return the type of a token and where each document starts and the last ends: [documents + 1] int64."""
    if len(index) < HEADER.size:
        raise ValueError(f"{path} has {len(index)} bytes, its header {HEADER.size}; the file is truncated")
    magic, version, code, num_sequences, num_bounds = HEADER.unpack_from(index)
    if magic != MAGIC:
        raise ValueError(f"{path} starts with {magic!r}, not {MAGIC!r}; it is no Megatron token index")
    if version != VERSION or code not in DTYPES:
        raise ValueError(
            f"{path} has version {version} and token type code {code}; supported are version {VERSION} "
            f"and the integer types {sorted(DTYPES)}; prepare the data again"
        )
    expected = HEADER.size + 12 * num_sequences + 8 * num_bounds
    if len(index) < expected:  # a multimodal index goes on with one byte per sequence, which we do not need
        raise ValueError(f"{path} has {len(index)} bytes, expected {expected}; the file is truncated")
    dtype = np.dtype(DTYPES[code])
    lengths = np.frombuffer(index, "<i4", num_sequences, HEADER.size)
    pointers = np.frombuffer(index, "<i8", num_sequences, HEADER.size + 4 * num_sequences)
    bounds = np.frombuffer(index, "<i8", num_bounds, HEADER.size + 12 * num_sequences)
    starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    if (
        num_bounds == 0
        or (bounds[0], bounds[-1]) != (0, num_sequences)
        or (np.diff(bounds) < 0).any()
        or not np.array_equal(pointers, starts[:-1] * dtype.itemsize)
    ):
        raise ValueError(f"{path}: lengths, pointers and documents contradict each other; prepare it again")
    return dtype, starts[bounds]


def _read_manifest(path: Path, *, bin_bytes: int, idx_bytes: int) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_bytes())
        found = (manifest["format"], manifest["bin"]["bytes"], manifest["idx"]["bytes"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no manifest of token files ({error!r}); delete it") from error
    actual = (MANIFEST_FORMAT, bin_bytes, idx_bytes)
    if found != actual:
        raise ValueError(
            f"{path} states (format, .bin bytes, .idx bytes) = {found}, but they are {actual}; "
            "prepare the data again, or delete the manifest if the other files are right"
        )
    return manifest


class DatasetWriter:
    """Context manager that writes one token dataset; its files appear only when the block ends well."""

    def __init__(
        self, prefix: str | Path, *, vocab_size: int, eos_id: int | None = None,
        tokenizer_file: Path | None = None, source: str = "",
    ) -> None:  # fmt: skip
        self.prefix, self.vocab_size = Path(prefix), vocab_size
        self.num_tokens, self.max_token_id = 0, -1
        self._code = 8 if vocab_size < 65500 else 4  # Megatron's own bound between uint16 and int32
        self._dtype = np.dtype(DTYPES[self._code])
        self._lengths = array("i")
        self._tokenizer_file = tokenizer_file
        self._about = {"vocab_size": vocab_size, "eos_id": eos_id, "source": source}

    @property
    def num_documents(self) -> int:
        """How many were added so far."""
        return len(self._lengths)

    def __enter__(self) -> Self:
        self.prefix.parent.mkdir(parents=True, exist_ok=True)
        self._bin = self._partial("bin").open("wb")
        return self

    def add(self, tokens: np.ndarray) -> None:
        """Append one document: [tokens] integers, its end-of-document token included."""
        if len(tokens):
            low, high = int(tokens.min()), int(tokens.max())
            if low < 0 or high >= self.vocab_size:
                raise ValueError(
                    f"{self.prefix}: document {self.num_documents} has token ids {low}..{high}, outside "
                    f"vocab_size={self.vocab_size}; the size must be the tokenizer's"
                )
            self.max_token_id = max(self.max_token_id, high)
        self._bin.write(tokens.astype(self._dtype).tobytes())
        self._lengths.append(len(tokens))
        self.num_tokens += len(tokens)

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._bin.close()
        suffixes = ("bin", "idx", "tokenizer.json", "json")  # the manifest last: it vouches for the others
        try:
            if error is None:
                self._write_index_and_manifest()
                for suffix in suffixes:
                    if self._partial(suffix).exists():
                        self._partial(suffix).replace(f"{self.prefix}.{suffix}")
        finally:
            for suffix in suffixes:
                self._partial(suffix).unlink(missing_ok=True)

    def _partial(self, suffix: str) -> Path:
        return Path(f"{self.prefix}.{suffix}.partial")

    def _write_index_and_manifest(self) -> None:
        lengths = np.array(self._lengths, "<i4")
        starts = np.concatenate([[0], np.cumsum(lengths, dtype="<i8")])[:-1]
        with self._partial("idx").open("wb") as index:
            index.write(HEADER.pack(MAGIC, VERSION, self._code, len(lengths), len(lengths) + 1))
            for part in (lengths, starts * self._dtype.itemsize, np.arange(len(lengths) + 1, dtype="<i8")):
                index.write(part.tobytes())
        manifest = {
            "format": MANIFEST_FORMAT,
            "documents": self.num_documents,
            "tokens": self.num_tokens,
            "max_token_id": self.max_token_id,
            "dtype": self._dtype.name,
            **self._about,
            "fingerprint": _fingerprint(self._partial("bin"), self._partial("idx").read_bytes()),
            "bin": _describe(self._partial("bin")),
            "idx": _describe(self._partial("idx")),
        }
        if self._tokenizer_file:
            shutil.copyfile(self._tokenizer_file, self._partial("tokenizer.json"))
            name = f"{self.prefix.name}.tokenizer.json"
            manifest["tokenizer"] = {"file": name, **_describe(self._partial("tokenizer.json"))}
        self._partial("json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
