"""Stops at any moment and meetings that fail, with the launcher and its real processes."""

import json
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from data.tokenizer import train_tokenizer
from parallel.launch import JoinError, join_job
from tests.support.forked import ROOT
from tests.support.jobs import command, is_running, workers
from tests.support.runs import ending, lines
from train.checkpoint.storage import find_checkpoints

HOLD = str(ROOT / "tests/support/programs/hold_rank.py")
MANY_STEPS = "train.steps=100000"


def debug(corpus: Path, run_dir: Path, *more: str) -> list[str]:
    return [
        "conf=debug",
        f"data.sources=[{{path: {corpus}}}]",
        "batch.micro_rows=2",
        f"run_dir={run_dir}",
        *more,
    ]


def start(said: Path, arguments: list[str], program: str = "", **variables: str) -> subprocess.Popen:
    """Two ranks under the launcher, of another program if one is named."""
    entry = str(ROOT / "train/pretrain.py")
    words = [program or part if part == entry else part for part in command(*arguments, processes=2)]
    with said.open("a") as file:
        return subprocess.Popen(
            words, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
        )  # fmt: skip


def wait_for(what: Callable[[], bool], job: subprocess.Popen, said: Path) -> None:
    deadline = time.monotonic() + 120
    while not what():
        assert job.poll() is None, said.read_text()
        assert time.monotonic() < deadline, said.read_text()
        time.sleep(0.02)


@pytest.mark.faults
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=["SIGTERM", "SIGUSR1"])
@pytest.mark.parametrize("place", ["step", "data", "save"])
def test_a_stop_at_any_moment(
    place: str, number: signal.Signals, license_corpus: Path, tmp_path: Path
) -> None:
    """To the launcher, twice: one agreed step is saved within the grace, and no process is left."""
    run_dir, said = tmp_path / "run", tmp_path / "said.txt"
    handled = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
    arguments = debug(license_corpus, run_dir, MANY_STEPS, "checkpoint.every=1")
    job = start(said, arguments, HOLD, HOLD_AT=place, PET_SIGNALS_TO_HANDLE=handled)
    wait_for(lambda: len(list(run_dir.glob("held-*"))) == 2, job, said)
    ranks = workers(job.pid).values()
    assert len(ranks) == 2
    job.send_signal(number)
    job.send_signal(number)
    job.wait(30)
    assert not any(map(is_running, ranks))
    kind, facts = ending(run_dir)
    assert (kind, facts["code"], facts["reason"]) == ("REQUEUE", 75, number.name), said.read_text()
    assert facts["step"] == {"step": 4, "data": 4, "save": 5}[place]
    newest, step = next(iter(find_checkpoints(run_dir / "checkpoints", complete=True).items()))
    assert step == facts["step"] == lines(run_dir)[-1]["step"]
    assert len(list(newest.glob("*.safetensors"))) == 2


@pytest.mark.faults
def test_a_stop_while_text_is_tokenized(tmp_path: Path) -> None:
    run_dir, said = tmp_path / "run", tmp_path / "said.txt"
    train_tokenizer(["a few words"] * 9, size=300).save(str(tmp_path / "tokenizer.json"))
    line = json.dumps({"text": "def function(argument): return argument + 1\n" * 40}) + "\n"
    (tmp_path / "large.jsonl").write_text(line * 100_000)
    job = start(
        said,
        debug(
            Path("unused"), run_dir, f"data.sources=[{{dataset: {tmp_path}/large.jsonl}}]",
            f"data.tokenizer={tmp_path}", f"data.cache_dir={tmp_path}/cache",
        ),
    )  # fmt: skip
    wait_for(lambda: bool(list(tmp_path.glob("cache/.*/partial/tokens.bin.partial"))), job, said)
    job.send_signal(signal.SIGTERM)
    job.wait(20)
    expected = {"code": 75, "step": None, "reason": "SIGTERM while text was tokenized"}
    assert ending(run_dir) == ("REQUEUE", expected), said.read_text()
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.faults
def test_a_port_in_use_is_one_line(license_corpus: Path, tmp_path: Path) -> None:
    """Without a launcher: no traceback, and no sentinel: trying again makes sense."""
    with socket.create_server(("", 0)) as taken:
        port = str(taken.getsockname()[1])
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "RANK": "0"}
        done = subprocess.run(
            command(*debug(license_corpus, tmp_path / "run")), cwd=ROOT, capture_output=True, text=True,
            env={**os.environ, **place, "LOCAL_RANK": "0"}, timeout=120,
        )  # fmt: skip
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 1, done.stderr
    assert len(errors) == 1, done.stderr
    assert re.search(
        rf"rank 0 of 2 did not meet .*127\.0\.0\.1:{port}: .*in use.*choose a free port", errors[0]
    )
    assert "Traceback" not in done.stderr
    assert not [name for name in ("DONE", "REQUEUE", "FAILED") if (tmp_path / "run" / name).exists()]


@pytest.mark.parametrize("rank", [0, 1])
def test_processes_that_do_not_meet(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "RANK": str(rank)}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(JoinError, match=f"rank {rank} of 2 did not meet .*:{port}: .*start all processes"):
        join_job("cpu", timeout_minutes=0.02)


@pytest.mark.parametrize("page", ["reliability", "parallelism", "decisions"])
def test_the_tests_that_the_table_names_exist(page: str) -> None:
    file, missing = "", []
    for named, test in re.findall(
        r"`(tests/\S+\.py)?::(\w+)[^`]*`", (ROOT / "docs/design" / f"{page}.md").read_text(encoding="utf-8")
    ):
        file = named or file
        path = ROOT / file
        if not path.is_file() or not re.search(rf"^def {test}\(", path.read_text(encoding="utf-8"), re.M):
            missing.append(f"{file}::{test}")
    assert not missing
