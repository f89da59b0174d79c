"""Text that a run names, tokenized once into PREFIX.bin / PREFIX.idx in a folder named by its fingerprint.

Invariant: a folder of the cache is complete, and its name depends on everything that decides its content.
"""

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data.config import DataConfig, SourceConfig
from data.dataset import DatasetWriter
from data.texts import (
    MAX_DOCUMENT_BYTES,
    Quarantine,
    Refused,
    find_files,
    loading,
    parse_name,
    read_documents,
    require_text,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer

log = logging.getLogger(__name__)

FORMAT = 1  # raise it when the same text gives other files
BATCH = 100


def materialise(cfg: DataConfig, number: int, progress: Callable[[int], None]) -> str:
    """Return the PREFIX of a source's token files, after writing them if its text has none yet.

    Args:
        progress: called after each batch with the number of documents so far.

    Raises:
        ValueError: text or tokenizer cannot be used.
    """
    source = cfg.sources[number]
    if source.path is not None:
        return source.path
    assert source.dataset is not None and cfg.tokenizer is not None
    key = f"data.sources[{number}].dataset"
    try:
        inputs, identity = _open_text(source, source.dataset, key)
        folder = Path(cfg.cache_dir) / _fingerprint(source, identity, cfg.tokenizer)
        if folder.is_dir():
            log.info("%s %s: tokenized before", key, source.dataset)
        else:
            with _appearing(folder) as partial:
                _write(partial / "tokens", source, inputs, cfg.tokenizer, f"{key} {source.dataset}", progress)
                if isinstance(inputs[0], Path) and _describe(inputs) != identity:
                    raise ValueError(f"{key} {source.dataset}: changed while it was read; start again")
    except OSError as error:
        raise ValueError(f"{key} {source.dataset}: {error}; check the files and data.cache_dir") from error
    log.info("%s %s: tokens in %s", key, source.dataset, folder)
    return str(folder / "tokens")


def _open_text(source: SourceConfig, what: str, key: str) -> tuple[Sequence[Any], list[Any]]:
    """Return the inputs of read_documents and what their content depends on; nothing is read yet."""
    files = find_files(what.split(), key=key)
    if files:
        return files, _describe(files)
    import datasets

    datasets.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    path, config, revision = parse_name(what)
    with loading(what, key=key):
        builder = datasets.load_dataset_builder(path, config, revision=revision)
        records = builder.as_streaming_dataset(split=source.split)
    require_text(records, what, key=key, text_key=source.text_key)

    def stream() -> Iterator[Any]:
        with loading(what, key=key):
            yield from records

    version = os.path.relpath(builder.cache_dir, datasets.config.HF_DATASETS_CACHE)  # with commit or hash
    return [(what, stream())], [what, version, source.split]


def _describe(files: Sequence[Path]) -> list[Any]:
    stats = [(str(path.resolve()), path.stat()) for path in files]
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]


def _fingerprint(source: SourceConfig, identity: list[Any], tokenizer: str) -> str:
    from data.tokenizer import tokenizer_file

    file = tokenizer_file(tokenizer)
    content = file.read_bytes() if file.is_file() else b""  # load_tokenizer says that it is missing
    decisive = [FORMAT, identity, source.text_key, source.max_documents, hashlib.sha256(content).hexdigest()]
    return hashlib.blake2b(json.dumps(decisive).encode(), digest_size=8).hexdigest()


@contextmanager
def _appearing(folder: Path) -> Iterator[Path]:
    """A folder to write in, which gets its name when the block ends well unless another run was faster."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
            partial = Path(temporary) / "partial"  # because the temporary one is for its owner only
            partial.mkdir()
            yield partial
            partial.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
    for left in folder.parent.glob(f".{folder.name}-*"):  # by runs that were killed, or are late
        shutil.rmtree(left, ignore_errors=True)


def _write(
    prefix: Path, source: SourceConfig, inputs: Sequence[Any], tokenizer_path: str, name: str,
    progress: Callable[[int], None],
) -> None:  # fmt: skip
    """Tokenize the documents as they come."""
    from data.tokenizer import eos_id, load_tokenizer, tokenizer_file, vocab_size

    tokenizer = load_tokenizer(tokenizer_path)
    eos, size, file = eos_id(tokenizer), vocab_size(tokenizer), tokenizer_file(tokenizer_path)
    quarantine = Quarantine(Path(f"{prefix}.quarantine.jsonl"), name)
    documents = islice(
        read_documents(inputs, source.text_key, MAX_DOCUMENT_BYTES, quarantine), source.max_documents
    )
    with DatasetWriter(prefix, vocab_size=size, eos_id=eos, tokenizer_file=file, source=name) as writer:
        while batch := list(islice(documents, BATCH)):
            tokens = encode(tokenizer, [document["text"] for document in batch], eos)
            places = [(document["file"], document["line"]) for document in batch]
            add_documents(writer, tokens, places, quarantine)
            progress(writer.num_documents)
        quarantine.check_left(writer.num_documents)
        quarantine.write()
    log.info("%s: %d documents, %d tokens", name, writer.num_documents, writer.num_tokens)
    if quarantine.file.exists():
        log.warning("%s: refused %s, listed in %s beside them", name, quarantine, quarantine.file.name)


def encode(tokenizer: "Tokenizer", texts: Sequence[str], eos: int) -> list[list[int]]:
    """Return the tokens of each text, eos last; none for a text that the tokenizer drops."""
    encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return [[*encoding.ids, eos] if encoding.ids else [] for encoding in encodings]


def add_documents(
    writer: DatasetWriter, documents: Iterable[Any], places: Iterable[tuple[Any, Any]], quarantine: Quarantine
) -> None:
    """Write documents, each a sequence of tokens; one of none is refused with its file and line."""
    for tokens, (file, line) in zip(documents, places, strict=True):
        if len(tokens):
            writer.add(np.asarray(tokens))
        else:
            quarantine.add(str(file), int(line), Refused("no tokens", ""))
