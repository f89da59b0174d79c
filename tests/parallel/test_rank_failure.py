"""A rank that dies takes the job with it, soon, and the launcher says which one it was."""

import os
import re
import signal
from pathlib import Path

import pytest

from tests.support.forked import ROOT
from tests.support.jobs import Job, arguments, workers


def test_a_killed_rank_ends_the_job(license_corpus: Path, tmp_path: Path) -> None:
    with Job(tmp_path, *arguments(license_corpus, "train.steps=100000")) as job:
        job.wait_until(lambda: job.records() >= 3)
        victim = workers(job.process.pid)[1]
        os.kill(victim, signal.SIGKILL)
        assert job.wait(30) != 0
    text = job.said.read_text()
    # "Root Cause" is what the launcher heard of first: the death, or the other rank's lost peer.
    report = text[text.index("ChildFailedError") :]
    assert re.search(rf"rank\s*: 1 \(local_rank: 1\)\s+exitcode\s*: -9 \(pid: {victim}\)", report), text
    assert f"Signal 9 (SIGKILL) received by PID {victim}" in report
    assert not (tmp_path / "run/DONE").exists()


@pytest.mark.faults
@pytest.mark.parametrize(
    ("failure", "cause"),
    [
        (
            "segv",
            r"exitcode\s*: -11 [\s\S]*Signal 11 \(SIGSEGV\) received by PID",
        ),
        ("raise", r"rank\s*: 1 [\s\S]*RuntimeError: broken on purpose"),
        (
            "exit",
            r"rank\s*: 0 [\s\S]*RuntimeError: .*(Connection closed|Connection reset|closed by peer)",
        ),
    ],
    ids=["SIGSEGV", "exception", "exit 0"],
)
def test_the_launcher_shows_what_ended_a_rank(
    failure: str, cause: str, license_corpus: Path, tmp_path: Path
) -> None:
    """No time limit is set: whoever waits for the rank hears that it is gone."""
    program = ROOT / "tests/support/programs/fail_rank.py"
    with Job(tmp_path, *arguments(license_corpus), program=program, FAILURE=failure) as job:
        assert job.wait(120) == 1, job.said.read_text()
    text = job.said.read_text()
    report = text[text.index("ChildFailedError") :]
    assert re.search(cause, report), report
    assert not (tmp_path / "run/DONE").exists()
