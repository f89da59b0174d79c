"""The program under torchrun --max-restarts."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest

from parallel.mesh import JoinError, join_job
from tests.parallel.test_rank_failure import workers
from tests.train.forked import run_forked
from tests.train.test_pretrain import ROOT
from tests.train.test_resume import outcome
from tests.train.test_watchdog import is_running

LAUNCHER = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


class Job:
    """A torchrun of two processes, what it says, and all ranks that it ever had."""

    def __init__(
        self, folder: Path, *arguments: str, options: Sequence[str] = (), launcher: Sequence[str] = LAUNCHER,
        **variables: str,
    ) -> None:  # fmt: skip
        self.run_dir, self.said = folder / "run", folder / "said.txt"
        full = [sys.executable, *launcher, *options, str(ROOT / "train/pretrain.py"), *arguments]
        with self.said.open("a") as file:
            self.process = subprocess.Popen(
                [*full, f"run_dir={self.run_dir}"], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
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

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing of it outlives a test that fails."""
        self.process.kill()
        for rank in filter(is_running, self.ranks):
            os.kill(rank, signal.SIGKILL)

    def wait(self) -> int:
        """The launcher's exit code; no rank outlives it."""
        self.ranks |= set(workers(self.process.pid).values())
        code = self.process.wait(150)
        assert not [rank for rank in self.ranks if is_running(rank)]
        return code


def arguments(corpus: Path, *more: str) -> list[str]:
    return ["conf=debug", f"data.sources=[{{path: {corpus}}}]", *more]


@pytest.mark.faults
def test_a_rank_killed_twice_costs_nothing(license_corpus: Path, tmp_path: Path) -> None:
    """R23: the launcher starts all ranks again, they go on from the last checkpoint; bitwise the same run."""
    same = arguments(license_corpus, "train.steps=60", "checkpoint.every=5", "batch.micro_rows=1")
    with Job(tmp_path, *same, options=("--max-restarts", "2")) as job:
        for number, records in enumerate((12, 35), start=1):
            job.wait_until(lambda: job.records() >= records)  # noqa: B023
            os.kill(workers(job.process.pid)[1], signal.SIGKILL)
            job.wait_until(lambda: job.said.read_text().count("resumed from") == number)  # noqa: B023
        assert job.wait() == 0, job.said.read_text()
    whole = run_forked(tmp_path / "whole", *same[1:], processes=2)
    assert whole.codes == [0, 0], whole.said
    assert outcome(job.run_dir) == outcome(tmp_path / "whole")


@pytest.mark.faults
def test_several_launchers_start_again(license_corpus: Path, tmp_path: Path) -> None:
    """R23 on two machines, here two launchers that meet: the rank of the second is killed."""
    same = arguments(license_corpus, "train.steps=24", "checkpoint.every=2", "batch.micro_rows=1")
    with socket.create_server(("127.0.0.1", 0)) as free:
        place = f"127.0.0.1:{free.getsockname()[1]}"
    launcher = "-m torch.distributed.run --nnodes 2 --nproc-per-node 1 --max-restarts 1 --rdzv-backend c10d"
    options = ("--rdzv-id", "test", "--rdzv-endpoint", place)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/run").symlink_to(tmp_path / "run")
    start = partial(Job, launcher=launcher.split(), options=options, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
    with start(tmp_path, *same) as one, start(tmp_path / "other", *same) as other:
        one.wait_until(lambda: one.records() >= 5)
        (victim,) = workers(other.process.pid).values()
        os.kill(victim, signal.SIGKILL)
        assert [one.wait(), other.wait()] == [0, 0], one.said.read_text() + other.said.read_text()
        assert "resumed from" in one.said.read_text() + other.said.read_text()
    whole = run_forked(tmp_path / "whole", *same[1:], processes=2)
    assert whole.codes == [0, 0], whole.said
    assert outcome(one.run_dir) == outcome(tmp_path / "whole")


@pytest.mark.parametrize(
    "changes", [{}, {"GROUP_WORLD_SIZE": "1"}, {"TORCHELASTIC_USE_AGENT_STORE": "False"}]
)
def test_restarts_that_would_hang_are_refused(
    changes: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only with several launchers that share their store; the others go on, to nobody they could meet."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    launched = {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "RANK": "1",
        "GROUP_WORLD_SIZE": "2", "TORCHELASTIC_MAX_RESTARTS": "3", "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_USE_AGENT_STORE": "True", **changes,
    }  # fmt: skip
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(JoinError) as caught:
        join_job("cpu", timeout_minutes=0.01)
    refused = "--max-restarts=3 on 2 machines" in str(caught.value)
    assert refused is not bool(changes) and ("TORCH_DISABLE_SHARE" in str(caught.value)) is refused
