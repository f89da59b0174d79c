"""Two jobs and one run directory: the second ends on all ranks, and changes nothing there."""

import errno
import fcntl
import json
import os
import re
import signal
import subprocess
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.disks import fill, small_disk
from tests.support.forked import ROOT, launch, pretrain
from tests.support.jobs import command
from tests.support.runs import start_and_wait
from train.guard.lock import lock_holder, take_lock


def arguments(corpus: Path, run_dir: Path) -> list[str]:
    return ["conf=debug", f"data.sources=[{{path: {corpus}}}]", f"run_dir={run_dir}"]


def test_a_second_holder_learns_who_the_first_is(tmp_path: Path) -> None:
    first = take_lock(tmp_path / "run", "a:1", "42")
    assert first.holder is None
    assert lock_holder(tmp_path / "run", "a:1") is None
    second = take_lock(tmp_path / "run", "b:2", None)
    assert second.file is None
    assert second.holder is not None
    assert re.fullmatch(rf"another job \(host \S+, pid {os.getpid()}, Slurm job 42\)", second.holder)
    assert lock_holder(tmp_path / "run", "b:2") == second.holder
    assert first.file is not None
    first.file.close()
    assert lock_holder(tmp_path / "run", "b:2") is None
    assert take_lock(tmp_path / "run", "b:2", None).holder is None
    assert len((tmp_path / "run/.lock").read_text().splitlines()) == 1


def test_a_lock_without_text_still_counts(tmp_path: Path) -> None:
    """Its holder has not written it yet."""
    with (tmp_path / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert lock_holder(tmp_path, "a:1") == "another job"


def test_a_file_system_without_locks_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refused)
    assert take_lock(tmp_path, "a:1", None).holder is None
    assert "has no locks" in caplog.text


@pytest.mark.parametrize("where", ["below a file", pytest.param("full disk", marks=pytest.mark.faults)])
def test_a_run_directory_that_cannot_be_written_is_one_line_on_all_ranks(
    where: str, license_corpus: Path, tmp_path: Path
) -> None:
    with ExitStack() as stack:
        if where == "full disk":
            parent = stack.enter_context(small_disk(tmp_path / "disk", mebibytes=1))
            fill(parent)
        else:
            parent = tmp_path / "file"
            parent.touch()
        ended = launch(*arguments(license_corpus, parent / "run"), processes=2)
    assert ended.codes == [2, 2], ended.said
    errors = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "Traceback" not in "".join(ended.said)
    reason = "No space left on device" if where == "full disk" else "Not a directory"
    assert f"run_dir={parent / 'run'} cannot be used: " in errors[0]
    assert reason in errors[0]


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_the_second_job_is_refused_before_it_writes(
    resume: str, license_corpus: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    same = arguments(license_corpus, run_dir)
    first = start_and_wait(*same, "train.steps=100000", run_dir=run_dir)
    try:
        before = {path.name: path.stat().st_ino for path in run_dir.iterdir()}
        config = (run_dir / "config.yaml").read_bytes()
        second = launch(*same, "seed=5", f"checkpoint.resume={resume}", processes=2)
        wrong = launch(*same, "train.steps=0")
        assert {path.name: path.stat().st_ino for path in run_dir.iterdir()} == before
        assert (run_dir / "config.yaml").read_bytes() == config
        first.send_signal(signal.SIGTERM)
        assert first.wait(60) == 75
    finally:
        first.kill()
    errors = [line for line in second.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, second.stderr
    holder = rf"run_dir={run_dir} is in use by another job \(host \S+, pid {first.pid}\); stop it"
    assert re.search(holder, errors[0])
    assert second.codes == [2, 2]
    assert wrong.codes == [2]
    assert "train.steps=0" in wrong.stderr
    assert json.loads((run_dir / "REQUEUE").read_text())["code"] == 75


def test_the_lock_of_a_killed_job_does_not_block(license_corpus: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    same = arguments(license_corpus, run_dir)
    first = start_and_wait(*same, "train.steps=100000", run_dir=run_dir)
    first.kill()
    first.wait()
    assert json.loads((run_dir / ".lock").read_text())["pid"] == first.pid
    pretrain(*same, "train.steps=2")


def test_the_lock_names_the_slurm_job(license_corpus: Path, tmp_path: Path) -> None:
    subprocess.run(
        command(*arguments(license_corpus, tmp_path), "train.steps=1"),
        cwd=ROOT, env={**os.environ, "SLURM_JOB_ID": "4711"}, check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    assert json.loads((tmp_path / ".lock").read_text())["slurm_job"] == "4711"
