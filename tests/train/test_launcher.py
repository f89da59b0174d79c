"""The program under torchrun: stop signals at any time, and restarts."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.parallel.test_rank_failure import workers
from tests.train.forked import run_forked
from tests.train.test_pretrain import ROOT, ending, lines
from tests.train.test_resume import outcome
from tests.train.test_watchdog import is_running

LAUNCHER = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
FAULTS = pytest.mark.faults


class Job:
    """A torchrun of two processes, what it says, and all ranks that it ever had."""

    def __init__(
        self, folder: Path, *arguments: str, options: tuple[str, ...] = (), **environment: str
    ) -> None:
        self.run_dir, self.said = folder / "run", folder / "said.txt"
        full = [sys.executable, *LAUNCHER, *options, str(ROOT / "train/pretrain.py"), *arguments]
        with self.said.open("a") as file:
            self.process = subprocess.Popen(
                [*full, f"run_dir={self.run_dir}"], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            )  # fmt: skip
        self.ranks: set[int] = set()

    def wait_until(self, is_so: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 90
        while not is_so():
            assert self.process.poll() is None and time.monotonic() < deadline, self.said.read_text()
            self.ranks |= set(workers(self.process.pid).values())
            time.sleep(0.05)

    def records(self) -> int:
        metrics = self.run_dir / "metrics.jsonl"
        return metrics.read_bytes().count(b"\n") if metrics.exists() else 0

    def wait(self) -> int:
        """The launcher's exit code; no rank outlives it."""
        self.ranks |= set(workers(self.process.pid).values())
        code = self.process.wait(150)
        assert not [rank for rank in self.ranks if is_running(rank)]
        return code


def arguments(corpus: Path, *more: str) -> list[str]:
    return ["conf=debug", f"data.sources=[{{path: {corpus}}}]", *more]


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=FAULTS)])
def test_a_signal_to_the_launcher_saves_one_step(
    number: signal.Signals, license_corpus: Path, tmp_path: Path
) -> None:
    """R6, as Slurm sends it: twice, and most likely in the middle of a save, since every step is saved."""
    same = arguments(license_corpus, "train.steps=100000", "checkpoint.every=1")
    signals = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
    job = Job(tmp_path, *same, PET_SIGNALS_TO_HANDLE=signals)
    job.wait_until(lambda: job.records() >= 3)
    job.process.send_signal(number)
    job.wait()
    kind, facts = ending(job.run_dir)
    assert kind == "REQUEUE" and facts["code"] == 75 and facts["reason"] == number.name
    newest = job.run_dir / f"checkpoints/step-{facts['step']}"
    assert json.loads((newest / "manifest.json").read_text())["step"] == facts["step"]
    assert len(list(newest.glob("*.safetensors"))) == 2
    assert lines(job.run_dir)[-1]["step"] == facts["step"]
    assert not list(job.run_dir.glob("checkpoints/.*"))


@FAULTS
def test_a_rank_killed_twice_costs_nothing(license_corpus: Path, tmp_path: Path) -> None:
    """R23: the launcher starts all ranks again, they go on from the last checkpoint; bitwise the same run."""
    same = arguments(license_corpus, "train.steps=60", "checkpoint.every=5", "batch.micro_rows=1")
    job = Job(tmp_path, *same, options=("--max-restarts", "2"))
    for number, records in enumerate((12, 35), start=1):
        job.wait_until(lambda: job.records() >= records)  # noqa: B023
        os.kill(workers(job.process.pid)[1], signal.SIGKILL)
        job.wait_until(lambda: job.said.read_text().count("resumed from") == number)  # noqa: B023
    assert job.wait() == 0, job.said.read_text()
    whole = run_forked(tmp_path / "whole", *same[1:], processes=2)
    assert whole.codes == [0, 0], whole.said
    assert outcome(job.run_dir) == outcome(tmp_path / "whole")
