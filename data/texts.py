"""Documents of text files and of named datasets, each with its place; what gives none is counted.

Invariant: the documents and their order depend on the input alone, and one that is refused stops no other.
"""

import glob
import io
import json
import re
import sysconfig
import tokenize
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

STDLIB = "python-stdlib"
SUFFIXES = (".txt", ".md", ".py", ".jsonl", ".json", ".parquet")
NAME = re.compile(r"([\w.-]+(?:/[\w.-]+)?)(?::([\w.-]+))?(?:@([\w./-]+))?")
MAX_DOCUMENT_BYTES = 2**28
QUARANTINE_LINES, EXCERPT = 10_000, 200
REMEDIES = {  # by reason of refusal
    "malformed JSON": "write one JSON object a line",
    "no text field": "name the key: --text-key, in a run text_key",
    "wrong type of text": "write the text as a string, or name its key: --text-key, in a run text_key",
    "invalid UTF-8": "convert the file to UTF-8",
    "too long": "split the document or raise --max-document-bytes of prepare_data",
    "unreadable parquet": "copy or write the file again",
    "empty": "remove the document",
    "no tokens": "remove the document or use another tokenizer",
}


class Refused(NamedTuple):
    """What cannot be a document, and why: a key of REMEDIES."""

    reason: str
    content: Any


class Quarantine:
    """Counts what is refused, in the order of the input, and keeps the first QUARANTINE_LINES for a file."""

    def __init__(self, file: Path, source: str, *, strict: bool = False) -> None:
        self.file, self._source, self._strict = file, source, strict
        self._counts, self._lines, self._first = Counter[str](), list[str](), ""

    def add(self, file: str, line: int, refused: Refused) -> None:
        """Count it; with `strict`, raise a ValueError instead."""
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
        """Raise a ValueError if no document is left."""
        if not num_documents:
            raise ValueError(f"{self._source}: nothing to train on; refused {self}; {self._first}")

    def write(self) -> None:
        """Write the lines that were kept; without any, remove the file."""
        self.file.unlink(missing_ok=True)
        if self._lines:
            self.file.write_text("".join(self._lines), encoding="utf-8")

    def __str__(self) -> str:
        return ", ".join(f"{num:,} {reason}" for reason, num in self._counts.items()) or "nothing"


def find_files(inputs: Sequence[str], *, key: str) -> list[Path]:
    """Return the files to read, in order; none if the input is a named dataset.

    Args:
        key: what messages call the input, such as --input.
    """
    if list(inputs) == [STDLIB]:
        root = Path(sysconfig.get_path("stdlib"))
        sources = [path.relative_to(root) for path in root.rglob("*.py") if "site-packages" not in path.parts]
        return [root / path for path in sorted(sources, key=Path.as_posix)]
    may_be_name = len(inputs) == 1 and NAME.fullmatch(inputs[0])
    if may_be_name and not inputs[0].endswith(SUFFIXES) and not Path(inputs[0]).exists():
        return []
    found = []
    for pattern in inputs:
        matches = sorted(path for path in map(Path, glob.glob(pattern, recursive=True)) if path.is_file())
        if not matches:
            raise ValueError(f"{key} {pattern}: no file matches; quote globs, such as 'texts/**/*.txt'")
        found += matches
    for path in found:
        if path.suffix not in SUFFIXES:
            raise ValueError(f"{path}: unknown kind of file; {key} reads {' '.join(SUFFIXES)}")
    return found


def parse_name(name: str) -> tuple[str, str | None, str | None]:
    """Return path, configuration and revision of NAME[:CONFIG][@REVISION]."""
    match = NAME.fullmatch(name)
    assert match is not None
    return match[1], match[2], match[3]


@contextmanager
def loading(name: str, *, key: str) -> Iterator[None]:
    """Say in one line what the hub's client raises: it has no common base class."""
    try:
        yield
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{key} {name}: no file, and no dataset that loads ({type(error).__name__}: {reason}); "
            "check the name and the network, or pass local files"
        ) from error


def require_text(records: Any, name: str, *, key: str, text_key: str) -> None:
    """Refuse a named dataset whose column text_key is known to hold no strings."""
    features = records.features
    if features and getattr(features.get(text_key), "dtype", None) not in ("string", "large_string"):
        raise ValueError(
            f"{key} {name}: no strings in {text_key!r}; its columns are {list(features)}; "
            "name one: --text-key, in a run text_key"
        )


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
    """Return the text of a record if it has between 1 and `limit` bytes of UTF-8, or what refuses it."""
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
    """Return the value of a line of JSON, or what refuses it."""
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
