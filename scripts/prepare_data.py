"""Tokenize text into PREFIX.bin / PREFIX.idx (Megatron's format), PREFIX.tokenizer.json and PREFIX.json.

Input that gives no document is counted by reason and listed in PREFIX.quarantine.jsonl; --strict refuses it.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # import from the repository root, not from scripts/

import argparse
import glob
import io
import json
import os
import re
import sysconfig
import tempfile
import time
import tokenize
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import count
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from datasets import Dataset
    from tokenizers import Tokenizer

STDLIB = "python-stdlib"
SUFFIXES = (".txt", ".md", ".py", ".jsonl", ".json", ".parquet")
TRAINING_BYTES = 200_000_000
QUARANTINE_LINES, EXCERPT = 10_000, 200
REMEDIES = {  # by reason of refusal
    "malformed JSON": "write one JSON object a line",
    "no text field": "name the key: --text-key",
    "wrong type of text": "write the text as a string, or name another key: --text-key",
    "invalid UTF-8": "convert the file to UTF-8",
    "too long": "split the document or raise --max-document-bytes",
    "unreadable parquet": "copy or write the file again",
    "empty": "remove the document",
    "no tokens": "remove the document or use another tokenizer",
}


class Refused(NamedTuple):
    reason: str
    content: Any


class Quarantine:
    """Counts what is refused, in the order of the input, and keeps the first QUARANTINE_LINES for a file."""

    def __init__(self, file: Path, source: str, *, strict: bool) -> None:
        self.file, self._source, self._strict = file, source, strict
        self._counts, self._lines, self._first = Counter[str](), list[str](), ""

    def add(self, file: str, line: int, refused: Refused) -> None:
        reason, content = refused
        if isinstance(content, bytes):
            content = content[:EXCERPT].decode(errors="backslashreplace")
        text = (content if isinstance(content, str) else repr(content))[:EXCERPT]
        place = f"{file}:{line}: {reason}: {text[:60]!a}; {REMEDIES[reason]}"
        if self._strict:
            raise ValueError(f"{place}, or leave out --strict")
        self._first = self._first or place
        self._counts[reason] += 1
        if len(self._lines) < QUARANTINE_LINES:
            entry = {"file": file, "line": line, "reason": reason, "text": text}
            self._lines.append(json.dumps(entry) + "\n")

    def check_left(self, num_documents: int) -> None:
        if not num_documents:
            raise ValueError(f"--input {self._source}: nothing to train on; refused {self}; {self._first}")

    def write(self) -> None:
        self.file.unlink(missing_ok=True)
        if self._lines:
            self.file.write_text("".join(self._lines), encoding="utf-8")

    def __str__(self) -> str:
        return ", ".join(f"{num:,} {reason}" for reason, num in self._counts.items()) or "nothing"


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
    add("--input", required=True, nargs="+", metavar="WHAT", help=what)
    add("--output", required=True, metavar="PREFIX", help="prefix of the files to write")
    add("--tokenizer", required=True, metavar="DIR_OR_FILE", help="tokenizer.json or its folder")
    add("--train-tokenizer", type=int, metavar="VOCAB_SIZE", help="train --tokenizer on the input first")
    add("--text-key", default="text", help="key of the text in .jsonl, .parquet and named datasets")
    add("--split", default="train", help="split of a named dataset")
    add("--eos-token", metavar="TOKEN", help="ends a document (default: the tokenizer's usual one)")
    add("--workers", type=int, default=os.cpu_count(), help="processes that tokenize")
    longest = "refuse documents, and lines of .jsonl, of more bytes"
    add(
        "--max-document-bytes", type=int, default=2**28, metavar="N", help=f"{longest} (default: %(default)s)"
    )
    add("--strict", action="store_true", help="end with code 2 at the first input that gives no document")
    return parser.parse_args(argv)


def prepare(args: argparse.Namespace) -> str:
    """Do what the command line says; return the line that sums it up."""
    from data.dataset import DatasetWriter

    started = time.perf_counter()
    files = find_files(args.input)
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
    quarantine = Quarantine(Path(f"{output}.quarantine.jsonl"), source, strict=args.strict)
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
                for document, name, line in zip(batch["tokens"], batch["file"], batch["line"], strict=True):
                    if len(document):
                        writer.add(document)
                    else:
                        quarantine.add(str(name), int(line), Refused("no tokens", ""))
            quarantine.check_left(writer.num_documents)
            quarantine.write()
    listed = f" ({quarantine.file})" if quarantine.file.exists() else ""
    return (
        f"{output}: {writer.num_documents:,} documents, {writer.num_tokens:,} tokens, "
        f"{num_bytes / writer.num_tokens:.2f} bytes/token, {time.perf_counter() - started:.1f} s; "
        f"refused {quarantine}{listed}"
    )


def find_files(inputs: Sequence[str]) -> list[Path]:
    """Return the files to read, in order; none if --input is a named dataset."""
    if list(inputs) == [STDLIB]:
        root = Path(sysconfig.get_path("stdlib"))
        sources = [path.relative_to(root) for path in root.rglob("*.py") if "site-packages" not in path.parts]
        return [root / path for path in sorted(sources, key=Path.as_posix)]
    may_be_name = len(inputs) == 1 and re.fullmatch(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?", inputs[0])
    if may_be_name and not inputs[0].endswith(SUFFIXES) and not Path(inputs[0]).exists():
        return []
    found = []
    for pattern in inputs:
        matches = sorted(path for path in map(Path, glob.glob(pattern, recursive=True)) if path.is_file())
        if not matches:
            raise ValueError(f"--input {pattern}: no file matches; quote globs, such as 'texts/**/*.txt'")
        found += matches
    for path in found:
        if path.suffix not in SUFFIXES:
            raise ValueError(f"{path}: unknown kind of file; --input reads {' '.join(SUFFIXES)}")
    return found


def read_text(path: Path, limit: int) -> tuple[int, str | Refused]:
    """Return the text of a file, UTF-8 or what a .py file declares, and the line of what is wrong with it."""
    with path.open("rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        return 1, Refused("too long", data[:EXCERPT])
    encoding = "utf-8"
    try:
        if path.suffix != ".py":
            return 1, data.decode(encoding)
        with suppress(SyntaxError, LookupError):  # undeclared, or declared as what does not exist
            declared = tokenize.detect_encoding(io.BytesIO(data).readline)[0]
            "".encode(declared)  # some encode no text
            encoding = declared
        return 1, data.decode(encoding).replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        place = error.start
    return 1 + data.count(b"\n", 0, place), Refused("invalid UTF-8", data[place : place + EXCERPT])


def read_documents(inputs: Sequence, text_key: str, limit: int, quarantine: Quarantine) -> Iterator[dict]:
    """Yield each document with its place; what gives none goes into quarantine."""
    num_documents = 0
    for source in inputs:
        named = not isinstance(source, Path)
        name, records = source if named else (str(source), read_records(source, text_key, limit))
        for line, record in enumerate(records, 1) if named else records:
            text = text_of(record, text_key, limit)
            if isinstance(text, Refused):
                quarantine.add(name, line, text)
            else:
                num_documents += 1
                yield {"text": text, "file": name, "line": line}
    quarantine.check_left(num_documents)


def text_of(record: Any, text_key: str, limit: int) -> str | Refused:
    if isinstance(record, Refused):
        return record
    if not isinstance(record, dict) or text_key not in record:
        return Refused("no text field", record)
    text = record[text_key]
    if not isinstance(text, str):
        return Refused("wrong type of text", text)
    try:
        size = len(text.encode())
    except UnicodeEncodeError:  # JSON can escape half of a surrogate pair
        return Refused("invalid UTF-8", text)
    return text if 0 < size <= limit else Refused("too long" if text else "empty", text[:EXCERPT])


def read_records(path: Path, text_key: str, limit: int) -> Iterator[tuple[int, Any]]:
    """Yield the records of one file, each with its line (row of .parquet), or what refuses them."""
    match path.suffix:
        case ".jsonl" | ".json":
            with path.open("rb") as file:
                for number in count(1):
                    if not (line := file.readline(limit + 1)):
                        break
                    if len(line) > limit and not line.endswith(b"\n"):
                        yield number, Refused("too long", line[:EXCERPT])
                        while line and not line.endswith(b"\n"):
                            line = file.readline(2**20)
                    elif line.strip():
                        yield number, read_json(line)
        case ".parquet":
            yield from read_parquet(path, text_key)
        case _:
            number, text = read_text(path, limit)
            yield number, {text_key: text} if isinstance(text, str) else text


def read_json(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return Refused("invalid UTF-8", line)
    except (ValueError, RecursionError):
        return Refused("malformed JSON", line)


def read_parquet(path: Path, text_key: str) -> Iterator[tuple[int, Any]]:
    """Yield rows; of a row group that cannot be read on, each remaining row is refused."""
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    row = end = 0
    try:
        file = ParquetFile(path)
    except (ArrowException, OSError) as error:
        yield 1, Refused("unreadable parquet", str(error))
        return
    for group in range(file.num_row_groups):
        end += file.metadata.row_group(group).num_rows
        try:
            for batch in file.iter_batches(1000, row_groups=[group], columns=[text_key]):
                for i in range(batch.num_rows):
                    row += 1
                    try:
                        yield row, {name: batch[name][i].as_py() for name in batch.schema.names}
                    except UnicodeDecodeError as error:
                        yield row, Refused("invalid UTF-8", error.object)
        except (ArrowException, OSError) as error:
            for row in range(row + 1, end + 1):  # noqa: B020
                yield row, Refused("unreadable parquet", str(error))


def load_texts(inputs: Sequence, args: argparse.Namespace, quarantine: Quarantine, cache: str) -> "Dataset":
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

    def encode(batch: dict[str, list]) -> dict[str, list]:
        encodings = tokenizer.encode_batch_fast(batch["text"], add_special_tokens=False)
        tokens = [[*encoding.ids, eos] if encoding.ids else [] for encoding in encodings]
        return {"tokens": tokens, "bytes": [len(text.encode()) for text in batch["text"]]}

    print(f"tokenizing {len(texts):,} documents", file=sys.stderr, flush=True)
    workers = max(1, min(workers, len(texts) // 100))  # a process is not worth it for less than a batch
    if workers > 1:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the library's threads do not survive the fork
    new = Features({"tokens": List(Value("int32")), "bytes": Value("int64")})
    return texts.map(
        encode,
        batched=True,
        batch_size=100,
        writer_batch_size=100,
        remove_columns=["text"],
        features=Features({"file": texts.features["file"], "line": texts.features["line"], **new}),
        num_proc=workers if workers > 1 else None,
        cache_file_name=f"{cache}/tokens.arrow",
        new_fingerprint="tokens",
        desc="tokenizing",
    )


if __name__ == "__main__":
    sys.exit(main())
