"""The program under torchrun, as a user starts it: its ranks, what it says, and nothing left after a test."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.support.forked import PROGRAM, ROOT

LAUNCHER = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")


def command(*overrides: str, processes: int = 0) -> list[str]:
    """The literal command; without `processes`, plain python. Most tests need forked.launch alone."""
    launcher = [*LAUNCHER, str(processes)] if processes else []
    return [sys.executable, *launcher, str(PROGRAM), *overrides]


def workers(launcher: int) -> dict[int, int]:
    """Process ids of the launcher's children by their rank."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    found = {}
    for child in children:
        try:
            variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        except (FileNotFoundError, ProcessLookupError):  # it has just ended
            continue
        ranks = [int(entry[5:]) for entry in variables if entry.startswith(b"RANK=")]
        found |= {rank: int(child) for rank in ranks}
    return found


def is_running(process: int) -> bool:
    """Whether it has neither gone nor become a zombie."""
    status = Path(f"/proc/{process}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


class Job:
    """A torchrun, what it says, and all ranks that it ever had."""

    def __init__(
        self,
        folder: Path,
        *arguments: str,
        launcher: Sequence[str] = (*LAUNCHER, "2"),
        options: Sequence[str] = (),
        program: Path = PROGRAM,
        **variables: str,
    ) -> None:
        """Start it.

        Args:
            folder: of its run directory `run` and of `said.txt`, what it writes.
            launcher: arguments of python; torchrun with two processes, if none are given.
            options: of the launcher.
            program: a script that runs train/pretrain.py some other way.
            variables: more of the environment.
        """
        self.run_dir, self.said = folder / "run", folder / "said.txt"
        full = [sys.executable, *launcher, *options, str(program), *arguments]
        with self.said.open("a") as file:
            self.process = subprocess.Popen(
                [*full, f"run_dir={self.run_dir}"], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
            )  # fmt: skip
        self.ranks: set[int] = set()

    def wait_until(self, is_so: Callable[[], bool]) -> None:
        """While the job runs; an error after 90 s."""
        deadline = time.monotonic() + 90
        while not is_so():
            assert self.process.poll() is None, self.said.read_text()
            assert time.monotonic() < deadline, self.said.read_text()
            self.ranks |= set(workers(self.process.pid).values())
            time.sleep(0.05)

    def records(self) -> int:
        """Steps on record."""
        metrics = self.run_dir / "metrics.jsonl"
        return metrics.read_bytes().count(b"\n") if metrics.exists() else 0

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing of it outlives a test that fails."""
        self.process.kill()
        for rank in filter(is_running, self.ranks):
            os.kill(rank, signal.SIGKILL)

    def wait(self, timeout_s: float = 150) -> int:
        """The launcher's exit code; no rank outlives it."""
        self.ranks |= set(workers(self.process.pid).values())
        code = self.process.wait(timeout_s)
        assert not [rank for rank in self.ranks if is_running(rank)]
        return code


def arguments(corpus: Path, *more: str) -> list[str]:
    """Of a debug run on this corpus."""
    return ["conf=debug", f"data.sources=[{{path: {corpus}}}]", *more]
