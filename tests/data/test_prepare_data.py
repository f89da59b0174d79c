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
from data.texts import REMEDIES
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
        assert tokens[-1] == dataset.manifest["eos_id"]
        assert dataset.manifest["eos_id"] not in tokens[:-1]
        texts.append(tokenizer.decode(tokens[:-1].tolist()))
    return texts


def quarantined(prefix: Path) -> list[tuple[str, int, str, str]]:
    lines = Path(f"{prefix}.quarantine.jsonl").read_text().splitlines()
    return [tuple(json.loads(line)[key] for key in ("file", "line", "reason", "text")) for line in lines]


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
        assert f"{tmp_path}/{workers}/d: 250 documents, " in summary
        assert " bytes/token, " in summary
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
    assert "refused 2 empty (" in out
    assert decoded(tmp_path / "d") == ["x"]


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
    assert calls == [("owner/name", "small", "test")]
    assert decoded(tmp_path / "d") == ["one", "two"]
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
    assert seen == numbers[::5]
    assert (tmp_path / "tokenizer.json").is_file()


BAD_INPUTS = {
    "nothing": ("none-*.txt", b"", "no file matches"),
    "nothing.jsonl": ("none.jsonl", b"", "no file matches"),
    "a.csv": ("a.csv", b"x", "unknown kind of file"),
    "empty.txt": ("empty.txt", b"", "nothing to train on; refused 1 empty; "),
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
    assert error.startswith("prepare_data: error: ")
    assert message in error
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


LATIN = "ä".encode("latin-1")
REFUSED = {  # file: content, then line, reason and excerpt of each refusal; one document is left
    "bad.jsonl": (b'{"text": "x"}\n\n{"text": \n', [(3, "malformed JSON", '{"text": \n')]),
    "deep.jsonl": (b"[" * 99_999 + b'\n{"text": "x"}', [(1, "malformed JSON", "[" * 200)]),
    "list.jsonl": (b'["text"]\n{"text": "x"}\n', [(1, "no text field", "['text']")]),
    "key.jsonl": (b'{"text": "x"}\n{"body": "x"}\n', [(2, "no text field", "{'body': 'x'}")]),
    "number.jsonl": (
        b'{"text": 5}\n{"text": "x"}\n{"text": null}',
        [(1, "wrong type of text", "5"), (3, "wrong type of text", "None")],
    ),
    "latin.jsonl": (b'{"text": "x"}\n{"text": "' + LATIN, [(2, "invalid UTF-8", '{"text": "\\xe4')]),
    "half.jsonl": (b'{"text": "x"}\n{"text": "\\ud800"}', [(2, "invalid UTF-8", "\ud800")]),
    "empty.jsonl": (b'{"text": ""}\n{"text": "x"}', [(1, "empty", "")]),
    "long.jsonl": (
        b'{"text": "' + b"y" * 2_000_000 + b'"}\n{"text": "x"}\n',
        [(1, "too long", '{"text": "' + "y" * 190)],
    ),
    "latin.txt": (b"a\nb\n" + LATIN, [(3, "invalid UTF-8", "\\xe4")]),
    "long.txt": ("☃".encode() * 40_000, [(1, "too long", "☃" * 66 + "\\xe2\\x98")]),
    "empty.txt": (b"", [(1, "empty", "")]),
    "bytes.py": (b"# a\n# b\n# c\n" + LATIN, [(4, "invalid UTF-8", "\\xe4")]),
    "first.py": (b"# a\n" + LATIN, [(2, "invalid UTF-8", "\\xe4")]),
    "coding.py": (b"# coding: nonsense\n" + LATIN, [(2, "invalid UTF-8", "\\xe4")]),
    "codec.py": (b"# coding: hex\n" + LATIN, [(2, "invalid UTF-8", "\\xe4")]),
    "no.parquet": (
        b"not parquet at all",
        [
            (
                1,
                "unreadable parquet",
                "Parquet magic bytes not found in footer. Either the file is corrupted or this is not a "
                "parquet file.",
            )
        ],
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_input_is_quarantined_with_its_place_and_strict_ends_there(
    tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    content, expected = REFUSED[name]
    (tmp_path / name).write_bytes(content)
    (tmp_path / "zz.txt").write_text("x")
    limit = ["--max-document-bytes", "100000"]
    assert run(tmp_path / "*.*", tmp_path / "out" / "d", tokenizer, *limit) == 0
    assert quarantined(tmp_path / "out" / "d") == [(f"{tmp_path}/{name}", *what) for what in expected]
    assert decoded(tmp_path / "out" / "d") == ["x"] * (1 + name.endswith(".jsonl"))
    counted = f"; refused {len(expected)} {expected[0][1]} ({tmp_path}/out/d.quarantine.jsonl)\n"
    assert capsys.readouterr().out.endswith(counted)

    assert run(tmp_path / "*.*", tmp_path / "strict" / "d", tokenizer, *limit, "--strict") == 2
    line, reason, _ = expected[0]
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"prepare_data: error: {tmp_path}/{name}:{line}: {reason}: ")
    assert f"; {REMEDIES[reason]}, or leave out --strict" in error
    assert list((tmp_path / "strict").iterdir()) == []


def test_a_document_of_ten_megabytes_is_one_document(tmp_path: Path, tokenizer: Path) -> None:
    long = "y" * 10_000_000
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "{text}"}}\n' for text in ("x", long, "z")))
    assert run(tmp_path / "a.jsonl", tmp_path / "d", tokenizer) == 0
    assert decoded(tmp_path / "d") == ["x", long, "z"]
    assert quarantined_count(tmp_path / "d") == 0


def quarantined_count(prefix: Path) -> int:
    file = prefix.with_suffix(".quarantine.jsonl")
    return len(file.read_text().splitlines()) if file.exists() else 0


@pytest.mark.parametrize(
    ("column", "rows", "reason"),
    [
        (pa.array(["x", None]), [2], "wrong type of text"),
        (pa.array([5, 6]), [1, 2], "wrong type of text"),
        (None, [1], "no text field"),
        (pa.array([b"x", b"\xff", b"z"]).cast(pa.binary()).view(pa.string()), [2], "invalid UTF-8"),
    ],
)
def test_parquet_without_text_names_the_row(
    tmp_path: Path, tokenizer: Path, column: pa.Array | None, rows: list[int], reason: str
) -> None:
    table = pa.table({"body": ["x"]} if column is None else {"text": column})
    pq.write_table(table, tmp_path / "a.parquet")
    (tmp_path / "z.txt").write_text("left")
    assert run(tmp_path / "*.*", tmp_path / "d", tokenizer) == 0
    assert [what[:3] for what in quarantined(tmp_path / "d")] == [
        (f"{tmp_path}/a.parquet", row, reason) for row in rows
    ]
    assert len(decoded(tmp_path / "d")) == table.num_rows - len(rows) + 1


def test_damaged_row_group_is_refused_row_by_row_and_the_next_is_read(
    tmp_path: Path, tokenizer: Path
) -> None:
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": TEXTS[:9]}), file, row_group_size=3, use_dictionary=False)
    column = pq.ParquetFile(file).metadata.row_group(1).column(0)
    with file.open("r+b") as data:
        data.seek(column.data_page_offset)
        data.write(b"\xff" * column.total_compressed_size)
    assert run(file, tmp_path / "d", tokenizer) == 0
    assert [what[1:3] for what in quarantined(tmp_path / "d")] == [
        (row, "unreadable parquet") for row in (4, 5, 6)
    ]
    assert decoded(tmp_path / "d") == TEXTS[:3] + TEXTS[6:9]


def test_quarantine_is_the_same_for_any_workers_bounded_and_removed_when_stale(
    tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [json.dumps({"text": text if i % 5 else ["", 1][i % 2]}) for i, text in enumerate(TEXTS * 2)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "good.txt").write_text("good")
    monkeypatch.setattr("data.texts.QUARANTINE_LINES", 60)
    for workers in ("1", "2"):
        assert run(tmp_path / "a.jsonl", tmp_path / workers, tokenizer, "--workers", workers) == 0
        assert "; refused 50 empty, 50 wrong type of text (" in capsys.readouterr().out
        assert [what[1] for what in quarantined(tmp_path / workers)] == list(range(1, 301, 5))
    one, two = ((tmp_path / f"{workers}.quarantine.jsonl").read_bytes() for workers in "12")
    assert one == two
    assert run(tmp_path / "good.txt", tmp_path / "1", tokenizer) == 0
    assert capsys.readouterr().out.endswith("; refused nothing\n")
    assert not (tmp_path / "1.quarantine.jsonl").exists()


def test_text_that_the_tokenizer_drops_is_refused_with_its_place(tmp_path: Path, tokenizer: Path) -> None:
    text = (tokenizer / "tokenizer.json").read_text()
    stripping = json.loads(text) | {"normalizer": {"type": "Strip", "strip_left": True, "strip_right": True}}
    (tmp_path / "t.json").write_text(json.dumps(stripping))
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n\n{"text": " "}\n')
    assert run(tmp_path / "a.jsonl", tmp_path / "d", tmp_path / "t.json") == 0
    assert quarantined(tmp_path / "d") == [(f"{tmp_path}/a.jsonl", 3, "no tokens", "")]


def test_required_options_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--input", "a.txt"])
    assert "required: --output, --tokenizer" in capsys.readouterr().err


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
    assert "--input owner/name: no file, and no dataset that loads" in error
    assert "check the name and the network" in error
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
    assert "refused 1 invalid UTF-8 (" in capsys.readouterr().out
    assert quarantined(tmp_path / "d") == [(f"{tmp_path}/lib/a/bad.py", 1, "invalid UTF-8", "\\xff")]
