"""Text as a source of a run, in real processes: rank 0 tokenizes it once, the others wait for it."""

import json
import os
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from data.config import DataConfig, SourceConfig
from data.tokenizer import train_tokenizer
from parallel.collectives import Axis, from_leader
from parallel.config import ParallelConfig
from parallel.mesh import init_mesh
from scripts.prepare_data import main
from tests.support.dist import run_distributed
from tests.support.forked import ROOT, launch, pretrain
from tests.support.jobs import command
from tests.support.runs import column, ending
from train.guard.signals import StopRequest
from train.training_data import find_tokens


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """text.jsonl, of 400 documents and a bad line, and tokenizer.json."""
    folder = tmp_path_factory.mktemp("text")
    texts = [f"Document {i}: " + "a few words, more or less\n" * (i % 17) for i in range(400)]
    train_tokenizer(texts, size=500).save(str(folder / "tokenizer.json"))
    lines = [json.dumps({"body": text}) for text in texts]
    (folder / "text.jsonl").write_text("\n".join(["[]", *lines]))
    return folder


def arguments(folder: Path, run_dir: Path, source: str) -> list[str]:
    return [
        "conf=debug", "train.steps=4", f"run_dir={run_dir}", f"data.sources=[{source}]",
        f"data.tokenizer={folder}", f"data.cache_dir={run_dir.parent}/cache",
    ]  # fmt: skip


def text_source(folder: Path) -> str:
    return f"{{dataset: '{folder}/*.jsonl', text_key: body}}"


def test_a_run_on_text_is_the_run_on_prepared_files(folder: Path, tmp_path: Path) -> None:
    options = ["--input", f"{folder}/*.jsonl", "--text-key", "body", "--tokenizer", str(folder)]
    assert main([*options, "--output", f"{tmp_path}/prepared", "--workers", "1"]) == 0
    pretrain(*arguments(folder, tmp_path / "files", f"{{path: {tmp_path}/prepared}}"), processes=2)

    text = arguments(folder, tmp_path / "text", text_source(folder))
    said = pretrain(*text, processes=2)
    assert "400 documents" in said
    assert "refused 1 no text field, listed in" in said
    (cached,) = (tmp_path / "cache").iterdir()
    written = {path: path.stat().st_mtime_ns for path in cached.iterdir()}

    again = f"conf={tmp_path}/text/config.yaml"  # the resolved configuration reproduces the run
    said = pretrain(again, f"run_dir={tmp_path}/again", processes=2)
    assert "tokenized before" in said
    assert "400 documents" not in said
    assert {path: path.stat().st_mtime_ns for path in cached.iterdir()} == written
    for key in ("loss", "grad_norm"):
        expected = column(tmp_path / "files", key).tolist()
        assert [column(tmp_path / name, key).tolist() for name in ("text", "again")] == [expected] * 2


def test_a_changed_text_is_other_data_and_cannot_go_on(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text((folder / "text.jsonl").read_text())
    source = f"{{dataset: {tmp_path}/t.jsonl, text_key: body}}"
    pretrain(*arguments(folder, tmp_path / "run", source), "train.steps=2")
    (tmp_path / "t.jsonl").write_text((folder / "text.jsonl").read_text().replace("words", "other words"))
    result = launch(*arguments(folder, tmp_path / "run", source))
    assert result.returncode == 2
    assert "the saved data order has fingerprints=" in result.stderr
    assert len(list((tmp_path / "cache").iterdir())) == 2


def two_processes(*overrides: str, stderr: Path) -> list[subprocess.Popen]:
    """Both ranks without torchrun, which would hide their exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    return [
        subprocess.Popen(
            command(*overrides),
            cwd=ROOT,
            env=os.environ | shared | {"RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.DEVNULL,
            stderr=Path(f"{stderr}-{rank}").open("w"),
        )
        for rank in "01"
    ]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{dataset: FOLDER/none.txt}", "data.sources[0].dataset FOLDER/none.txt: no file matches"),
        ("{dataset: FOLDER/text.jsonl}", "nothing to train on; refused 401 no text field"),
    ],
)
def test_what_cannot_be_used_ends_all_ranks_with_one_message(
    source: str, message: str, folder: Path, tmp_path: Path
) -> None:
    source, message = (text.replace("FOLDER", str(folder)) for text in (source, message))
    result = launch(*arguments(folder, tmp_path / "run", source), processes=2, timeout_s=120)
    assert result.codes == [2, 2]
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, result.err
    assert message in errors[0], result.err
    assert "Traceback" not in result.stderr, result.err
    assert ending(tmp_path / "run")[1]["code"] == 2
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_a_killed_leader_ends_the_wait_and_leaves_no_half_cache(folder: Path, tmp_path: Path) -> None:
    line = json.dumps({"body": "def function(argument): return argument + 1\n" * 40}) + "\n"
    (tmp_path / "large.jsonl").write_text(line * 50_000)
    source = f"{{dataset: {tmp_path}/large.jsonl, text_key: body}}"
    ranks = two_processes(*arguments(folder, tmp_path / "run", source), stderr=tmp_path / "said")
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("cache/.*/partial/tokens.bin.partial")):
        assert ranks[0].poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    ranks[0].send_signal(signal.SIGKILL)
    assert [rank.wait(60) for rank in ranks] == [-signal.SIGKILL, 1]
    assert not [path for path in (tmp_path / "cache").iterdir() if not path.name.startswith(".")]


def wait_for_the_leader(rank: int, folder: str, cache: str) -> None:
    """Every batch is a beat, and each rank hears of all of them and of the end."""
    beats = []

    def count(value: Any, axis: Axis) -> Any:
        beats.append(value)
        return from_leader(value, axis)

    patch = pytest.MonkeyPatch()  # ends with this process
    patch.setattr("train.training_data.BEAT_SECONDS", 0)
    patch.setattr("train.training_data.from_leader", count)
    mesh = init_mesh(ParallelConfig(), "cpu")
    source = SourceConfig(dataset=f"{folder}/text.jsonl", text_key="body")
    cfg = DataConfig(sources=[source, source], tokenizer=folder, cache_dir=cache)
    prefixes = find_tokens(cfg, mesh, StopRequest())
    assert len(prefixes) == 2
    assert len(set(prefixes)) == 1
    assert Path(f"{prefixes[0]}.bin").exists()
    assert len(beats) == 5
    heard: list[list[str]] = [[], []]
    dist.all_gather_object(heard, prefixes)
    assert heard[0] == heard[1]


def test_the_others_wait_in_short_steps(folder: Path, tmp_path: Path) -> None:
    run_distributed(wait_for_the_leader, 2, str(folder), str(tmp_path / "cache"))
