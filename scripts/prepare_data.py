"""Tokenize text into PREFIX.bin / PREFIX.idx (Megatron's format), PREFIX.tokenizer.json and PREFIX.json."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # import from the repository root, not from scripts/

import argparse
import contextlib
import glob
import json
import os
import re
import sysconfig
import tempfile
import time
import tokenize
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset
    from tokenizers import Tokenizer

STDLIB = "python-stdlib"
SUFFIXES = (".txt", ".md", ".py", ".jsonl", ".json", ".parquet")
TRAINING_BYTES = 200_000_000


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        print(prepare(args))
    except ValueError as error:
        print(f"prepare_data: error: {error}", file=sys.stderr)
        return 2
    return 0


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    what = (
        f"quoted globs ('**' allowed) of {' '.join(SUFFIXES)} files, .txt .md .py being one document each; "
        f"or NAME[:CONFIG] for datasets.load_dataset; or {STDLIB}: the sources of the running Python"
    )
    add = parser.add_argument
    add("--input", nargs="+", required=True, metavar="WHAT", help=what)
    add("--output", required=True, metavar="PREFIX", help="prefix of the files to write")
    add("--tokenizer", required=True, metavar="DIR_OR_FILE", help="tokenizer.json or its folder")
    add("--train-tokenizer", type=int, metavar="VOCAB_SIZE", help="train --tokenizer on the input first")
    add("--text-key", default="text", help="key of the text in .jsonl, .parquet and named datasets")
    add("--split", default="train", help="split of a named dataset")
    add("--eos-token", metavar="TOKEN", help="ends a document (default: the tokenizer's usual one)")
    add("--workers", type=int, default=os.cpu_count(), help="processes that tokenize")
    return parser.parse_args(argv)


def prepare(args: argparse.Namespace) -> str:
    """Do what the command line says; return the line that sums it up."""
    started = time.perf_counter()
    files, num_undecodable = find_files(args.input)
    if files:
        os.environ["HF_HUB_OFFLINE"] = "1"  # local files need no network; read when datasets is imported
    import datasets

    from data.dataset import DatasetWriter
    from data.tokenizer import eos_id, load_tokenizer, tokenizer_file, vocab_size

    datasets.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    if args.train_tokenizer is None:
        load_tokenizer(args.tokenizer)  # a wrong path is to be found before the texts are read
    output, source = Path(args.output), " ".join(args.input)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".prepare-", dir=output.parent) as cache:
        if files:
            texts = load_files(files, args.text_key, cache)
        else:
            texts = load_named(source, split=args.split, text_key=args.text_key, cache=cache)
        if args.train_tokenizer is not None:
            train_on(texts, args.train_tokenizer, tokenizer_file(args.tokenizer))
        tokenizer = load_tokenizer(args.tokenizer)
        eos = eos_id(tokenizer, token=args.eos_token)
        tokens = tokenize_texts(texts, tokenizer, eos, args.workers, cache)
        size, file = vocab_size(tokenizer), tokenizer_file(args.tokenizer)
        num_bytes = 0
        with DatasetWriter(output, vocab_size=size, eos_id=eos, tokenizer_file=file, source=source) as writer:
            for batch in tokens.with_format("numpy").iter(1000):
                num_bytes += int(batch["bytes"].sum())
                for document in filter(len, batch["tokens"]):
                    writer.add(document)
            if not writer.num_documents:
                raise ValueError(f"--input {source}: every document is empty; there is nothing to train on")
    return (
        f"{output}: {writer.num_documents:,} documents, {writer.num_tokens:,} tokens, "
        f"{num_bytes / writer.num_tokens:.2f} bytes/token, {time.perf_counter() - started:.1f} s; "
        f"skipped {len(texts) - writer.num_documents:,} empty and {num_undecodable:,} undecodable documents"
    )


def find_files(inputs: Sequence[str]) -> tuple[list[Path], int]:
    """Return the files to read, in order, and how many were undecodable; no files if --input is a dataset."""
    if list(inputs) == [STDLIB]:
        root = Path(sysconfig.get_path("stdlib"))
        sources = [path.relative_to(root) for path in root.rglob("*.py") if "site-packages" not in path.parts]
        files = [root / path for path in sorted(sources, key=Path.as_posix)]
        decodable = []
        for path in files:
            with contextlib.suppress(ValueError):  # test files with wrong encodings
                read_text(path)
                decodable.append(path)
        return decodable, len(files) - len(decodable)
    may_be_name = len(inputs) == 1 and re.fullmatch(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?", inputs[0])
    if may_be_name and not inputs[0].endswith(SUFFIXES) and not Path(inputs[0]).exists():
        return [], 0
    found = []
    for pattern in inputs:
        matches = sorted(path for path in map(Path, glob.glob(pattern, recursive=True)) if path.is_file())
        if not matches:
            raise ValueError(f"--input {pattern}: no file matches; quote globs, such as 'texts/**/*.txt'")
        found += matches
    for path in found:
        if path.suffix not in SUFFIXES:
            raise ValueError(f"{path}: unknown kind of file; --input reads {' '.join(SUFFIXES)}")
    return found, 0


def read_text(path: Path) -> str:
    """Return the text of a file, UTF-8 or what a .py file declares."""
    try:
        if path.suffix == ".py":
            with tokenize.open(path) as file:
                return file.read()
        return path.read_bytes().decode("utf-8")
    except (UnicodeDecodeError, SyntaxError) as error:  # SyntaxError: the declared encoding does not exist
        raise ValueError(f"{path}: {error}; convert the file to UTF-8") from error


def read_documents(files: Sequence[Path], text_key: str) -> Iterator[dict[str, str]]:
    """Yield each document; ValueError names file:line of a record without text."""
    for path in files:
        for place, record in read_records(path, text_key):
            text = record.get(text_key) if isinstance(record, dict) else None
            if not isinstance(text, str):
                raise ValueError(f"{place}: no string under the key {text_key!r}; name the key: --text-key")
            yield {"text": text}


def read_records(path: Path, text_key: str) -> Iterator[tuple[str, Any]]:
    """Yield the records of one file, each with its place in it."""
    match path.suffix:
        case ".jsonl" | ".json":
            with path.open("rb") as lines:
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        try:
                            record = json.loads(line)
                        except ValueError as error:
                            raise ValueError(f"{path}:{number}: no JSON: {error}") from error
                        yield f"{path}:{number}", record
        case ".parquet":
            from pyarrow.parquet import ParquetFile

            try:
                batches = ParquetFile(path).iter_batches(1000, columns=[text_key])
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from error
            records = (record for batch in batches for record in batch.to_pylist())
            yield from ((f"{path}:{number}", record) for number, record in enumerate(records, 1))
        case _:
            yield str(path), {text_key: read_text(path)}


def load_files(files: list[Path], text_key: str, cache: str) -> "Dataset":
    from datasets import Dataset, Features, Value
    from datasets.exceptions import DatasetGenerationError

    call = {"files": files, "text_key": text_key}
    features = Features({"text": Value("large_string")})
    try:
        return Dataset.from_generator(read_documents, features, cache, gen_kwargs=call, fingerprint="texts")
    except DatasetGenerationError as error:
        raise error.__cause__ or error from error


def load_named(name: str, *, split: str, text_key: str, cache: str) -> "Dataset":
    """Load a dataset of the Hugging Face hub; a null text counts as an empty document."""
    from datasets import load_dataset

    path, _, config = name.partition(":")
    try:
        texts = load_dataset(path, config or None, split=split, cache_dir=cache)
    except Exception as error:  # the hub's client has no common base class
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"--input {name}: no file, and no dataset that loads ({type(error).__name__}: {reason}); "
            "check the name and the network, or pass local files"
        ) from error
    if getattr(texts.features.get(text_key), "dtype", None) not in ("string", "large_string"):
        raise ValueError(f"--input {name}: no strings in {text_key!r}; --text-key of {texts.column_names}")
    texts = texts.select_columns([text_key])
    return texts if text_key == "text" else texts.rename_column(text_key, "text")


def train_on(texts: "Dataset", size: int, file: Path) -> None:
    """Train a tokenizer on about TRAINING_BYTES of the texts, spread evenly, and save it."""
    import pyarrow.compute as pc

    from data.tokenizer import train_tokenizer

    print(f"training a tokenizer of {size:,} tokens", file=sys.stderr, flush=True)
    total = pc.sum(pc.binary_length(texts.data.column("text"))).as_py() or 0
    sample = texts.select(range(0, len(texts), 1 + total // TRAINING_BYTES))
    strings = (text or "" for batch in sample.iter(100) for text in batch["text"])
    tokenizer = train_tokenizer(strings, size=size)
    file.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(file))


def tokenize_texts(texts: "Dataset", tokenizer: "Tokenizer", eos: int, workers: int, cache: str) -> "Dataset":
    """Return, in order, the columns tokens (EOS last; none for an empty text) and bytes (UTF-8 text)."""
    from datasets import Features, List, Value

    def encode(batch: dict[str, list]) -> dict[str, list]:
        strings = [text or "" for text in batch["text"]]
        encodings = tokenizer.encode_batch_fast(strings, add_special_tokens=False)
        tokens = [[*encoding.ids, eos] if encoding.ids else [] for encoding in encodings]
        return {"tokens": tokens, "bytes": [len(text.encode()) for text in strings]}

    print(f"tokenizing {len(texts):,} documents", file=sys.stderr, flush=True)
    workers = max(1, min(workers, len(texts) // 100))  # a process is not worth it for less than a batch
    if workers > 1:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the library's threads do not survive the fork
    return texts.map(
        encode,
        batched=True,
        batch_size=100,
        writer_batch_size=100,
        remove_columns=["text"],
        features=Features({"tokens": List(Value("int32")), "bytes": Value("int64")}),
        num_proc=workers if workers > 1 else None,
        cache_file_name=f"{cache}/tokens.arrow",
        new_fingerprint="tokens",
        desc="tokenizing",
    )


if __name__ == "__main__":
    sys.exit(main())
