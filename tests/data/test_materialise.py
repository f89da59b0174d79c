"""Text that a run names: tokens written once, found again by what they depend on, never half there."""

import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest

from data.config import DataConfig, SourceConfig
from data.dataset import TokenDataset
from data.materialise import BATCH, materialise
from data.tokenizer import load_tokenizer, train_tokenizer
from scripts.prepare_data import main

TEXTS = [f"Document {i}: " + "one two three\nzwei ☃ " * (i % 7) for i in range(2 * BATCH + 50)]
MakeConfig = Callable[..., DataConfig]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer(TEXTS, size=300).save(str(file))
    return file


@pytest.fixture
def make_config(tmp_path: Path, tokenizer: Path) -> MakeConfig:
    """A function that makes a configuration of one source, at first of TEXTS and one bad line."""
    lines = [json.dumps({"text": text, "n": "other"}) for text in TEXTS]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines[:70], "{bad", *lines[70:]]) + "\n")

    def make(**source: object) -> DataConfig:
        source = {"dataset": f"{tmp_path}/*.jsonl", **source}
        return DataConfig(
            sources=[SourceConfig(**source)], tokenizer=str(tokenizer), cache_dir=str(tmp_path / "cache")
        )

    return make


def write(cfg: DataConfig) -> str:
    return materialise(cfg, 0, lambda documents: None)


def decoded(prefix: str) -> list[str]:
    dataset, tokenizer = TokenDataset(prefix), load_tokenizer(f"{prefix}.tokenizer.json")
    texts = []
    for document, length in enumerate(dataset.document_lengths):
        tokens = np.empty(length, np.int64)
        dataset.read(document, 0, tokens)
        texts.append(tokenizer.decode(tokens[:-1].tolist()))
    return texts


def test_it_writes_what_prepare_data_would(make_config: MakeConfig, tmp_path: Path, tokenizer: Path) -> None:
    seen: list[int] = []
    prefix = materialise(make_config(), 0, seen.append)
    assert seen == [100, 200, 250]
    assert decoded(prefix) == TEXTS
    options = ["--input", f"{tmp_path}/*.jsonl", "--tokenizer", str(tokenizer), "--workers", "1"]
    assert main([*options, "--output", f"{tmp_path}/d"]) == 0
    for suffix in ("bin", "idx", "tokenizer.json", "quarantine.jsonl"):
        assert Path(f"{prefix}.{suffix}").read_bytes() == (tmp_path / f"d.{suffix}").read_bytes()
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [Path(prefix).parent.name]
    assert Path(prefix).parent.stat().st_mode == (tmp_path / "cache").stat().st_mode


def test_prepared_files_are_taken_as_they_are(tmp_path: Path) -> None:
    cfg = DataConfig(sources=[SourceConfig(path="no/such")], cache_dir=str(tmp_path / "cache"))
    assert write(cfg) == "no/such"
    assert not (tmp_path / "cache").exists()


def test_the_second_time_nothing_is_read(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    first = write(make_config())
    monkeypatch.delattr("data.materialise.read_documents")
    monkeypatch.delattr("data.materialise.DatasetWriter")
    assert write(make_config()) == first
    assert write(make_config(weight=3.0, max_epochs=2)) == first  # what tokens are used for is not in them


@pytest.mark.parametrize(
    "change", ["content", "another file", "text_key", "max_documents", "tokenizer", "FORMAT"]
)
def test_all_that_decides_the_content_is_in_the_fingerprint(
    change: str, make_config: MakeConfig, tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = make_config()
    first = write(cfg)
    match change:
        case "content":
            (tmp_path / "a.jsonl").write_text((tmp_path / "a.jsonl").read_text().replace("zwei", "drei"))
        case "another file":
            (tmp_path / "b.jsonl").write_text('{"text": "more"}\n')
        case "text_key":
            cfg = make_config(text_key="n")
        case "max_documents":
            cfg = make_config(max_documents=7)
        case "tokenizer":
            train_tokenizer(TEXTS, size=280).save(str(tmp_path / "smaller.json"))
            cfg = replace(cfg, tokenizer=str(tmp_path / "smaller.json"))
        case "FORMAT":
            monkeypatch.setattr("data.materialise.FORMAT", 2)
    second = write(cfg)
    assert second != first
    assert len(list((tmp_path / "cache").iterdir())) == 2
    if change != "FORMAT":
        assert TokenDataset(second).fingerprint != TokenDataset(first).fingerprint
    if change == "max_documents":
        assert decoded(second) == TEXTS[:7]


def test_killed_while_writing_nothing_is_half_there(make_config: MakeConfig, tmp_path: Path) -> None:
    cfg = make_config()

    def kill(documents: int) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    process = multiprocessing.get_context("fork").Process(target=materialise, args=(cfg, 0, kill))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    (left,) = (tmp_path / "cache").iterdir()
    assert left.name.startswith(".")
    assert [*left.rglob("*.partial")]
    assert not [*left.rglob("*.json")]
    prefix = write(cfg)
    assert decoded(prefix) == TEXTS
    assert [*(tmp_path / "cache").iterdir()] == [Path(prefix).parent]


def test_text_that_changes_meanwhile_is_not_kept(make_config: MakeConfig, tmp_path: Path) -> None:
    def append(documents: int) -> None:
        with (tmp_path / "a.jsonl").open("a") as file:
            file.write('{"text": "more"}\n')

    with pytest.raises(ValueError, match=r"\[0\]\.dataset .*: changed while it was read; start again"):
        materialise(make_config(), 0, append)
    assert not [*(tmp_path / "cache").iterdir()]


def test_of_two_runs_at_once_the_faster_one_wins(make_config: MakeConfig, tmp_path: Path) -> None:
    cfg, faster = make_config(), []

    def overtake(documents: int) -> None:
        faster.append(write(cfg))

    assert materialise(cfg, 0, overtake) == faster[0]
    assert decoded(faster[0]) == TEXTS
    assert [*(tmp_path / "cache").iterdir()] == [Path(faster[0]).parent]


def test_a_named_dataset_is_streamed(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library's own streaming, of a file in place of the hub's."""
    calls = []
    load = datasets.load_dataset_builder

    def from_file(path: str, config: str | None, *, revision: str | None) -> datasets.DatasetBuilder:
        calls.append((path, config, revision))
        return load(
            "json", data_files={"test": str(tmp_path / "named.jsonl")}, cache_dir=str(tmp_path / "hf")
        )

    (tmp_path / "named.jsonl").write_text('{"text": "one"}\n{"text": null}\n{"text": "two"}\n')
    monkeypatch.setattr(datasets, "load_dataset_builder", from_file)
    named = {"dataset": "owner/name:small@v1", "split": "test"}
    first = write(make_config(**named))
    assert decoded(first) == ["one", "two"]
    assert calls == [("owner/name", "small", "v1")]
    quarantined = json.loads(Path(f"{first}.quarantine.jsonl").read_text())
    assert (quarantined["file"], quarantined["line"]) == (named["dataset"], 2)
    assert not [path for path in (tmp_path / "hf").rglob("*") if path.suffix == ".arrow"]  # no copy was made
    assert write(make_config(**named)) == first
    (tmp_path / "named.jsonl").write_text('{"text": "three"}\n')
    assert decoded(write(make_config(**named))) == ["three"]
    for wrong, message in (({"split": "train"}, "Bad split"), ({"text_key": "body"}, "no strings in 'body'")):
        with pytest.raises(
            ValueError, match=rf"data\.sources\[0\]\.dataset owner/name:small@v1: .*{message}"
        ):
            write(make_config(**named | wrong))


class Endless:
    """A dataset of the hub that counts what is read of it, and may fail."""

    cache_dir = "x"

    def __init__(self, fails_at: int | None = None) -> None:
        self.read, self._fails_at = 0, fails_at

    def as_streaming_dataset(self, split: str) -> datasets.IterableDataset:
        return datasets.IterableDataset.from_generator(self._records)

    def _records(self) -> Iterator[dict[str, str]]:
        while True:
            if self.read == self._fails_at:
                raise ConnectionError("the line is dead\nand so on")
            self.read += 1
            yield {"text": f"number {self.read}"}


def test_a_cap_ends_the_stream(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    endless = Endless()
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *args, **options: endless)
    prefix = write(make_config(dataset="name", max_documents=BATCH + 5))
    assert decoded(prefix)[-1] == f"number {BATCH + 5}"
    assert endless.read == BATCH + 5


def test_a_stream_that_breaks_leaves_nothing(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = Endless(fails_at=BATCH + 5)
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *args, **options: broken)
    with pytest.raises(
        ValueError, match=r"dataset name: .*\(ConnectionError: the line is dead\); check"
    ) as e:
        write(make_config(dataset="name"))
    assert "\n" not in str(e.value)
    assert not [*(tmp_path / "cache").iterdir()]


def test_what_cannot_be_used_is_named(
    make_config: MakeConfig, tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.csv").write_text("x")
    (tmp_path / "bad.json").write_text("{bad")
    cases = [
        (make_config(dataset=f"{tmp_path}/none*.txt"), r"data\.sources\[0\]\.dataset .*: no file matches"),
        (
            make_config(dataset=f"{tmp_path}/a.csv"),
            r"unknown kind of file; data\.sources\[0\]\.dataset reads",
        ),
        (make_config(dataset=f"{tmp_path}/bad.json"), r"bad\.json: nothing to train on; refused 1 malformed"),
        (make_config(text_key="body"), r"nothing to train on; refused 250 no text field, 1 malformed JSON; "),
        (replace(make_config(), tokenizer="none"), r"tokenizer none/tokenizer\.json not found"),
        (replace(make_config(), cache_dir=str(tokenizer)), r"\[0\]\.dataset .*File exists.*data\.cache_dir"),
        (make_config(dataset="owner/name"), r"\[0\]\.dataset owner/name: no file, and no dataset that loads"),
    ]
    for cfg, message in cases:
        with pytest.raises(ValueError, match=message):
            write(cfg)
    assert not [*(tmp_path / "cache").iterdir()]
