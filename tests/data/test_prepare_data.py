import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer

from data.dataset import TokenDataset
from data.tokenizer import load_tokenizer, train_tokenizer
from scripts.prepare_data import main, train_on

SCRIPT = Path(__file__).parents[2] / "scripts" / "prepare_data.py"

TEXTS = [f"Document {i}: " + "one two three\nzwei ☃ " * (i % 7) for i in range(250)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "a.txt").write_text("".join(TEXTS))
    assert run(folder / "a.txt", folder / "out", folder, "--train-tokenizer", "300") == 0
    return folder


@pytest.fixture(autouse=True)
def restored_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undo after each test what the script sets for its own process."""
    for name in ("HF_HUB_OFFLINE", "TOKENIZERS_PARALLELISM"):
        monkeypatch.setenv(name, "1")


def run(source: Path | str, output: Path, tokenizer: Path, *more: str) -> int:
    inputs = ["--input", str(source), "--output", str(output), "--tokenizer", str(tokenizer)]
    return main([*inputs, *(more or ["--workers", "1"])])


def decoded(prefix: Path) -> list[str]:
    """The texts in a dataset; every document ends with one end-of-document token."""
    dataset, tokenizer = TokenDataset(prefix), load_tokenizer(f"{prefix}.tokenizer.json")
    assert dataset.manifest is not None
    texts = []
    for document, length in enumerate(dataset.document_lengths):
        tokens = np.empty(length, np.int64)
        dataset.read(document, 0, tokens)
        assert tokens[-1] == dataset.manifest["eos_id"] and dataset.manifest["eos_id"] not in tokens[:-1]
        texts.append(tokenizer.decode(tokens[:-1].tolist()))
    return texts


def write_input(folder: Path, kind: str) -> str:
    """Write TEXTS as files of a kind, in an order that their names keep; return the glob that finds them."""
    folder.mkdir()
    match kind:
        case "txt" | "md" | "py":
            for i, text in enumerate(TEXTS):
                (folder / f"{i:03}.{kind}").write_text(text, encoding="utf-8")
        case "jsonl":
            for part in (0, 1):
                lines = [
                    json.dumps({"n": i, "text": text})
                    for i, text in enumerate(TEXTS[part * 99 : part * 151 + 99])
                ]
                (folder / f"{part}.jsonl").write_text("\n\n".join(lines) + "\n")
        case "parquet":
            pq.write_table(
                pa.table({"id": range(250), "text": TEXTS}), folder / "a.parquet", row_group_size=60
            )
    return f"{folder}/**/*.{kind}"


@pytest.mark.parametrize("kind", ["txt", "md", "py", "jsonl", "parquet"])
def test_every_kind_of_file_gives_the_texts_in_order_whatever_the_workers(
    tmp_path: Path, tokenizer: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pattern = write_input(tmp_path / "in", kind)
    for workers in ("1", "2"):
        assert run(pattern, tmp_path / workers / "d", tokenizer, "--workers", workers) == 0
        summary = capsys.readouterr().out
        assert f"{tmp_path}/{workers}/d: 250 documents, " in summary and " bytes/token, " in summary
    assert decoded(tmp_path / "1" / "d") == TEXTS
    names = sorted(path.name for path in (tmp_path / "1").iterdir())
    assert names == ["d.bin", "d.idx", "d.json", "d.tokenizer.json"]  # and no cache is left
    for name in names:
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


def test_empty_documents_are_skipped_and_counted(
    tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": ""}\n{"body": "x"}\n{"body": ""}\n')
    assert run(tmp_path / "a.jsonl", tmp_path / "d", tokenizer, "--text-key", "body") == 0
    assert "d: 1 documents, 2 tokens, 0.50 bytes/token" in (out := capsys.readouterr().out)
    assert "skipped 2 empty and 0 undecodable" in out and decoded(tmp_path / "d") == ["x"]


def test_several_globs_are_read_in_the_order_given(tmp_path: Path, tokenizer: Path) -> None:
    (tmp_path / "a.txt").write_text("first of a")
    (tmp_path / "b.jsonl").write_text('{"text": "first of b"}')
    inputs = ["--input", f"{tmp_path}/b.*", f"{tmp_path}/*.txt", "--workers", "1"]
    assert main([*inputs, "--output", f"{tmp_path}/d", "--tokenizer", str(tokenizer)]) == 0
    assert decoded(tmp_path / "d") == ["first of b", "first of a"]


@pytest.mark.parametrize("key", ["text", "body"])
def test_named_dataset_is_loaded_with_its_configuration_and_split(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    calls: list[tuple[object, ...]] = []

    def load_dataset(*args: object, **options: object) -> datasets.Dataset:
        calls.append((*args, options["split"]))
        return datasets.Dataset.from_dict({key: ["one", None, "two"], "n": [1, 2, 3]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert run("owner/name:small", tmp_path / "d", tokenizer, "--split", "test", "--text-key", key) == 0
    assert calls == [("owner/name", "small", "test")] and decoded(tmp_path / "d") == ["one", "two"]
    assert run("owner/name", tmp_path / "d", tokenizer, "--text-key", "n") == 2


def test_training_sample_is_spread_over_the_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = [f"number {i:03}" for i in range(40)]
    texts = datasets.Dataset.from_dict({"text": numbers})
    monkeypatch.setattr("scripts.prepare_data.TRAINING_BYTES", 100)
    seen: list[str] = []

    def train(strings: Iterable[str], *, size: int) -> Tokenizer:
        seen.extend(strings)
        return train_tokenizer(seen, size=size)

    monkeypatch.setattr("data.tokenizer.train_tokenizer", train)
    train_on(texts, 300, tmp_path / "tokenizer.json")
    assert seen == numbers[::5] and (tmp_path / "tokenizer.json").is_file()


BAD_INPUTS = {
    "nothing": ("none-*.txt", b"", "no file matches"),
    "nothing.jsonl": ("none.jsonl", b"", "no file matches"),
    "a.csv": ("a.csv", b"x", "unknown kind of file"),
    "bad.jsonl": ("bad.jsonl", b'{"text": "x"}\n\n{"text": \n', "bad.jsonl:3: no JSON: Expecting value"),
    "list.jsonl": (
        "list.jsonl",
        b'["text"]\n',
        "list.jsonl:1: no string under the key 'text'; name the key: --text-key",
    ),
    "key.jsonl": (
        "key.jsonl",
        b'{"text": "x"}\n{"body": "x"}\n',
        "key.jsonl:2: no string under the key 'text'",
    ),
    "number.jsonl": (
        "number.jsonl",
        b'{"text": "x"}\n{"text": 5}\n',
        "number.jsonl:2: no string under the key 'text'",
    ),
    "latin.jsonl": (
        "latin.jsonl",
        '{"text": "ä"}'.encode("latin-1"),
        "latin.jsonl:1: no JSON: 'utf-8' codec",
    ),
    "latin.txt": ("latin.txt", "ä".encode("latin-1"), "latin.txt: 'utf-8' codec"),
    "coding.py": ("coding.py", b"# coding: nonsense\n", "coding.py: unknown encoding"),
    "no.parquet": ("no.parquet", b"not parquet at all", "no.parquet: Parquet magic bytes not found"),
    "empty.txt": ("empty.txt", b"", "every document is empty"),
}


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_bad_input_is_one_line_and_code_2(
    tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    pattern, content, message = BAD_INPUTS[name]
    if content or name == "empty.txt":
        (tmp_path / name).write_bytes(content)
    assert run(tmp_path / pattern, tmp_path / "out" / "d", tokenizer) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("prepare_data: error: ") and message in error
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("column", "values", "row"), [("body", ["x"], 1), ("text", ["x", None], 2), ("text", [5], 1)]
)
def test_parquet_without_text_names_the_row(
    tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str], column: str, values: list, row: int
) -> None:
    pq.write_table(pa.table({column: values}), tmp_path / "a.parquet")
    assert run(tmp_path / "a.parquet", tmp_path / "d", tokenizer) == 2
    assert f"a.parquet:{row}: no string under the key 'text'" in capsys.readouterr().err


def test_missing_tokenizer_is_found_before_the_input_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.jsonl").write_text("{")
    assert run(tmp_path / "bad.jsonl", tmp_path / "d", tmp_path / "none") == 2
    assert f"tokenizer {tmp_path}/none/tokenizer.json not found" in capsys.readouterr().err


def test_script_runs_from_anywhere_and_names_an_unreachable_dataset(tmp_path: Path, tokenizer: Path) -> None:
    command = [
        sys.executable,
        str(SCRIPT),
        "--input",
        "owner/name",
        "--output",
        "d",
        "--tokenizer",
        str(tokenizer),
    ]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 2
    error = done.stderr.splitlines()[-1]
    assert (
        "--input owner/name: no file, and no dataset that loads" in error
        and "check the name and the network" in error
    )
    assert list(tmp_path.iterdir()) == []


def test_standard_library_is_found_and_undecodable_files_are_counted(
    tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, content in {
        "b.py": b"# b",
        "a/z.py": b"# z",
        "a.py": "# coding: latin-1\n# ä".encode("latin-1"),
        "a/bad.py": b"\xff",
        "site-packages/x.py": b"# x",
    }.items():
        (tmp_path / "lib" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "lib" / name).write_bytes(content)
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path / "lib"))
    assert run("python-stdlib", tmp_path / "d", tokenizer) == 0
    assert decoded(tmp_path / "d") == ["# coding: latin-1\n# ä", "# z", "# b"]
    assert "skipped 0 empty and 1 undecodable documents" in capsys.readouterr().out
