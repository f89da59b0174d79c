"""The program around its saves: disks that fill up, graces that are too short, saves beside training."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.torch_version import TorchVersion

from tests.support.disks import fill, small_disk
from tests.support.forked import ROOT, pretrain
from tests.support.jobs import command, workers
from tests.support.runs import column, ending, lines, tensors


def wait_for(condition: Callable[[], object], job: subprocess.Popen, said: Path) -> None:
    deadline = time.monotonic() + 90
    while not condition():
        assert job.poll() is None, said.read_text()
        assert time.monotonic() < deadline, said.read_text()
        time.sleep(0.05)


def saved(run_dir: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (run_dir / "checkpoints").glob("step-*"))


@pytest.fixture
def run_with_small_disk(tmp_path: Path) -> Iterator[Path]:
    """A run directory whose checkpoints lie on a file system of their own."""
    with small_disk(tmp_path / "run/checkpoints", mebibytes=64):
        yield tmp_path / "run"


@pytest.mark.faults
@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_run_outlives_a_full_disk(
    mode: str, license_corpus: Path, run_with_small_disk: Path, tmp_path: Path
) -> None:
    """It trains on, saves again when there is room, and a stop without a save does not look like one."""
    run_dir, said = run_with_small_disk, tmp_path / "said.txt"
    disk = run_dir / "checkpoints"
    overrides = [
        "conf=debug", f"data.sources=[{{path: {license_corpus}}}]", f"run_dir={run_dir}", "log.every=1",
        "train.steps=100000", f"checkpoint.mode={mode}", "checkpoint.every=2",
    ]  # fmt: skip
    fill(disk)
    with said.open("w") as file:
        job = subprocess.Popen(
            command(*overrides, processes=2), cwd=ROOT, stdout=file, stderr=subprocess.STDOUT
        )
        try:
            full = (
                r"ERROR checkpoint 4 failed: rank 0: No space left: need \S+ GiB, have 0: \S+; there is none"
            )
            wait_for(lambda: re.search(full, said.read_text()), job, said)
            assert saved(run_dir) == []
            (disk / "filler").unlink()
            wait_for(lambda: saved(run_dir), job, said)
            fill(disk)
            count = said.read_text().count("failed: ")
            wait_for(lambda: said.read_text().count("failed: ") > count, job, said)
            kept = saved(run_dir)
            job.send_signal(signal.SIGTERM)
            assert job.wait(60) == 1
        finally:
            job.kill()
    kind, facts = ending(run_dir)
    assert (kind, facts["code"]) == ("FAILED", 1)
    assert saved(run_dir) == kept
    last = (
        rf"checkpoint {facts['step']} failed: rank 0: No space left: .*; the last good one is step {kept[-1]}"
    )
    assert re.fullmatch(last, facts["reason"])
    ages = column(run_dir, "checkpoint_age_steps")
    assert ages[:4].tolist() == [1, 2, 3, 4]
    assert ages[-1] >= facts["step"] - kept[-1]
    (disk / "filler").unlink()
    pretrain(*overrides, f"train.steps={kept[-1] + 1}", processes=2)
    assert saved(run_dir)[-1] == kept[-1] + 1


@pytest.mark.faults
def test_a_save_that_the_grace_cuts_off_is_no_checkpoint(license_corpus: Path, tmp_path: Path) -> None:
    """And the run had said so at its first save."""
    run_dir, said, flag = tmp_path / "run", tmp_path / "said.txt", tmp_path / "slow"
    script = ROOT / "tests/support/programs/slow_saves.py"
    grace = 2 if torch.__version__ >= TorchVersion("2.12") else 30  # fixed before
    variables = {"PET_SHUTDOWN_TIMEOUT": str(grace), "FLAG": str(flag), "SECONDS_TO_WAIT": str(2 * grace)}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    overrides = [
        "conf=debug", f"data.sources=[{{path: {license_corpus}}}]", f"run_dir={run_dir}",
        "train.steps=100000", "checkpoint.every=4", "checkpoint.keep=null", "log.every=1",
    ]  # fmt: skip
    with said.open("w") as file:
        job = subprocess.Popen(
            [*launcher, str(script), *overrides], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT,
            env={**os.environ, **variables},
        )  # fmt: skip
        try:
            wait_for(lambda: saved(run_dir), job, said)
            ranks = workers(job.pid)
            flag.touch()
            wait_for((tmp_path / "slow.reached").exists, job, said)
            job.send_signal(signal.SIGTERM)
            assert job.wait(60) == 1
        finally:
            job.kill()
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks.values())
    assert not any((run_dir / name).exists() for name in ("DONE", "REQUEUE", "FAILED"))
    (partial,) = (run_dir / "checkpoints").glob(".tmp-step-*")
    kept = saved(run_dir)
    assert int(partial.name.split("-")[2]) == kept[-1] + 4
    flag.unlink()
    again = pretrain(*overrides, f"train.steps={kept[-1] + 1}", processes=2)
    assert f"resumed from {run_dir}/checkpoints/step-{kept[-1]}" in again
    assert not partial.exists()


@pytest.mark.faults
def test_a_run_that_saves_beside_training_resumes_bit_for_bit(license_corpus: Path, tmp_path: Path) -> None:
    """Every step is saved while the next ones train; resumed in the middle, all bits are the same."""
    overrides = ["conf=debug", f"data.sources=[{{path: {license_corpus}}}]", "train.steps=12"]
    overrides += ["checkpoint.every=1", "checkpoint.keep=null"]
    for mode in ("sync", "async"):
        pretrain(*overrides, f"checkpoint.mode={mode}", f"run_dir={tmp_path}/{mode}", processes=2)
    for step in range(1, 13):
        first, second = (tensors(tmp_path / f"{mode}/checkpoints/step-{step}") for mode in ("sync", "async"))
        assert first.keys() == second.keys(), step
        assert all(np.array_equal(first[k], second[k]) for k in first), step
    for step in range(7, 13):
        shutil.rmtree(tmp_path / f"async/checkpoints/step-{step}")
    pretrain(*overrides, "checkpoint.mode=async", f"run_dir={tmp_path}/async", processes=2)
    assert [line["step"] for line in lines(tmp_path / "async")] == list(range(1, 13))
    for key in ("loss", "grad_norm"):
        assert column(tmp_path / "sync", key).tolist() == column(tmp_path / "async", key).tolist()
    first, second = (tensors(tmp_path / f"{mode}/checkpoints/step-12") for mode in ("sync", "async"))
    assert all(np.array_equal(first[key], second[key]) for key in first)
