"""Tokenize text into PREFIX.bin / PREFIX.idx (Megatron's format), PREFIX.tokenizer.json and PREFIX.json.

Input that cannot become a document is counted by reason and listed in PREFIX.quarantine.jsonl.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # import from the repository root, not from scripts/

import argparse
import os
import tempfile
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from data.materialise import add_documents, encode
from data.texts import (
    MAX_DOCUMENT_BYTES,
    STDLIB,
    SUFFIXES,
    Quarantine,
    find_files,
    loading,
    parse_name,
    read_documents,
    require_text,
)

if TYPE_CHECKING:
    from datasets import Dataset
    from tokenizers import Tokenizer

TRAINING_BYTES = 200_000_000


def main(argv: Sequence[str] | None = None) -> int:
    """Write the files; exit code 2 if the input or an option cannot be used."""
    args = parse_args(argv)
    try:
        print(prepare(args))
    except ValueError as error:
        print(f"prepare_data: error: {error}", file=sys.stderr)
        return 2
    return 0


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    what = (
        f"quoted globs ('**' allowed) of {' '.join(SUFFIXES)} files, .txt .md .py being one document each; "
        f"or NAME[:CONFIG][@REVISION] for datasets.load_dataset; or {STDLIB}: sources of the running Python"
    )
    add = parser.add_argument
    add("--input", required=True, nargs="+", metavar="WHAT", help=what)
    add("--output", required=True, metavar="PREFIX", help="prefix of the files to write")
    add("--tokenizer", required=True, metavar="DIR_OR_FILE", help="tokenizer.json or its folder")
    add("--train-tokenizer", type=int, metavar="VOCAB_SIZE", help="train --tokenizer on the input first")
    add("--text-key", default="text", help="key of the text in a record (default: %(default)s)")
    add("--split", default="train", help="split of a named dataset (default: %(default)s)")
    add("--eos-token", metavar="TOKEN", help="ends a document (default: the tokenizer's usual one)")
    add("--workers", type=int, default=os.cpu_count(), metavar="N", help="processes (default: one a core)")
    longest = "refuse documents, and lines of .jsonl, of more bytes (default: %(default)s)"
    add("--max-document-bytes", type=int, default=MAX_DOCUMENT_BYTES, metavar="N", help=longest)
    add("--strict", action="store_true", help="stop with exit code 2 at input that cannot become a document")
    return parser.parse_args(argv)


def prepare(args: argparse.Namespace) -> str:
    """Do what the command line says; return the line that sums it up."""
    from data.dataset import DatasetWriter

    started = time.perf_counter()
    files = find_files(args.input, key="--input")
    if files:
        os.environ["HF_HUB_OFFLINE"] = "1"  # local files need no network; read when datasets is imported
    import datasets

    from data.tokenizer import eos_id, load_tokenizer, tokenizer_file, vocab_size

    datasets.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    if args.train_tokenizer is None:
        load_tokenizer(args.tokenizer)  # a wrong path is to be found before the texts are read
    output, source = Path(args.output), " ".join(args.input)
    output.parent.mkdir(parents=True, exist_ok=True)
    quarantine = Quarantine(Path(f"{output}.quarantine.jsonl"), f"--input {source}", strict=args.strict)
    with tempfile.TemporaryDirectory(prefix=".prepare-", dir=output.parent) as cache:
        inputs: list[Any] = list(files) or [
            load_named(source, split=args.split, text_key=args.text_key, cache=cache)
        ]
        texts = load_texts(inputs, args, quarantine, cache)
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
                places = zip(batch["file"], batch["line"], strict=True)
                add_documents(writer, batch["tokens"], places, quarantine)
            quarantine.check_left(writer.num_documents)
            quarantine.write()
    listed = f" ({quarantine.file})" if quarantine.file.exists() else ""
    return (
        f"{output}: {writer.num_documents:,} documents, {writer.num_tokens:,} tokens, "
        f"{num_bytes / writer.num_tokens:.2f} bytes/token, {time.perf_counter() - started:.1f} s; "
        f"refused {quarantine}{listed}"
    )


def load_texts(inputs: Sequence, args: argparse.Namespace, quarantine: Quarantine, cache: str) -> "Dataset":
    """Read the texts with the columns text, file and line."""
    from datasets import Dataset, Features, Value
    from datasets.exceptions import DatasetGenerationError

    # A tuple, because a list would be taken for shards, each with a call of its own.
    call = {"inputs": tuple(inputs), "text_key": args.text_key, "limit": args.max_document_bytes}
    features = Features({"text": Value("large_string"), "file": Value("string"), "line": Value("int64")})
    try:
        return Dataset.from_generator(
            read_documents, features, cache, gen_kwargs=call | {"quarantine": quarantine}, fingerprint="texts"
        )
    except DatasetGenerationError as error:
        raise error.__cause__ or error from error


def load_named(name: str, *, split: str, text_key: str, cache: str) -> tuple[str, "Dataset"]:
    """Load a dataset of the Hugging Face hub."""
    from datasets import load_dataset

    path, config, revision = parse_name(name)
    with loading(name, key="--input"):
        texts = load_dataset(path, config, split=split, revision=revision, cache_dir=cache)
    require_text(texts, name, key="--input", text_key=text_key)
    return name, texts.select_columns([text_key])


def train_on(texts: "Dataset", size: int, file: Path) -> None:
    """Train a tokenizer on about TRAINING_BYTES of the texts, spread evenly, and save it."""
    import pyarrow.compute as pc

    from data.tokenizer import train_tokenizer

    print(f"training a tokenizer of {size:,} tokens", file=sys.stderr, flush=True)
    total = pc.sum(pc.binary_length(texts.data.column("text"))).as_py() or 0
    sample = texts.select(range(0, len(texts), 1 + total // TRAINING_BYTES))
    strings = (text for batch in sample.iter(100) for text in batch["text"])
    tokenizer = train_tokenizer(strings, size=size)
    file.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(file))


def tokenize_texts(texts: "Dataset", tokenizer: "Tokenizer", eos: int, workers: int, cache: str) -> "Dataset":
    """Return, in order, the columns tokens (EOS last; none for no text), bytes (UTF-8), file and line."""
    from datasets import Features, List, Value

    def columns(batch: dict[str, list]) -> dict[str, list]:
        sizes = [len(text.encode()) for text in batch["text"]]
        return {"tokens": encode(tokenizer, batch["text"], eos), "bytes": sizes}

    print(f"tokenizing {len(texts):,} documents", file=sys.stderr, flush=True)
    workers = max(1, min(workers, len(texts) // 100))  # a process is not worth it for less than a batch
    if workers > 1:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the library's threads do not survive the fork
    new = Features({"tokens": List(Value("int32")), "bytes": Value("int64")})
    return texts.map(
        columns, batched=True, batch_size=100, writer_batch_size=100, remove_columns=["text"],
        features=Features({"file": texts.features["file"], "line": texts.features["line"], **new}),
        num_proc=workers if workers > 1 else None, cache_file_name=f"{cache}/tokens.arrow",
        new_fingerprint="tokens", desc="tokenizing",
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
