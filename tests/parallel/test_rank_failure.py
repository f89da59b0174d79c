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


FAULT = """
import os, runpy, signal, sys
sys.path.insert(0, {root!r})
from train import loop
inner = loop.train_step
def step(run, batches):
    if run.progress.step == 2 and run.mesh.rank == 1:
        {action}
    return inner(run, batches)
loop.train_step = step
sys.argv[0] = {root!r} + "/train/pretrain.py"
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.faults
@pytest.mark.parametrize(
    ("action", "cause"),
    [
        (
            "os.kill(os.getpid(), signal.SIGSEGV)",
            r"exitcode\s*: -11 [\s\S]*Signal 11 \(SIGSEGV\) received by PID",
        ),
        ("raise RuntimeError('broken on purpose')", r"rank\s*: 1 [\s\S]*RuntimeError: broken on purpose"),
        (
            "os._exit(0)",
            r"rank\s*: 0 [\s\S]*RuntimeError: .*(Connection closed|Connection reset|closed by peer)",
        ),
    ],
    ids=["SIGSEGV", "exception", "exit 0"],
)
def test_the_launcher_shows_what_ended_a_rank(
    action: str, cause: str, license_corpus: Path, tmp_path: Path
) -> None:
    """No time limit is set: whoever waits for the rank hears that it is gone."""
    script = tmp_path / "fault.py"
    script.write_text(FAULT.format(root=str(ROOT), action=action))
    with Job(tmp_path, *arguments(license_corpus), program=script) as job:
        assert job.wait(120) == 1, job.said.read_text()
    text = job.said.read_text()
    report = text[text.index("ChildFailedError") :]
    assert re.search(cause, report), report
    assert not (tmp_path / "run/DONE").exists()
