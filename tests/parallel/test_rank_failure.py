"""A rank that dies takes the job with it, soon, and the launcher says which one it was."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.train.test_pretrain import ROOT, command


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


def test_a_killed_rank_ends_the_job(license_corpus: Path, tmp_path: Path) -> None:
    overrides = ["conf=debug", f"data.sources=[{{path: {license_corpus}}}]", "train.steps=100000"]
    said, metrics = tmp_path / "said.txt", tmp_path / "run/metrics.jsonl"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with said.open("w") as file:
        job = subprocess.Popen(
            command(*overrides, f"run_dir={tmp_path}/run", processes=2),
            cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + 90
        while not metrics.exists() or metrics.read_text().count("\n") < 3:
            assert job.poll() is None and time.monotonic() < deadline, said.read_text()
            time.sleep(0.1)
        victim = workers(job.pid)[1]
        os.kill(victim, signal.SIGKILL)
        assert job.wait(30) != 0
    finally:
        job.kill()
    text = said.read_text()
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
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    start += [str(script), "conf=debug", f"run_dir={tmp_path}/run"]
    job = subprocess.run(
        [*start, f"data.sources=[{{path: {license_corpus}}}]"],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert job.returncode == 1, job.stderr
    report = job.stderr[job.stderr.index("ChildFailedError") :]
    assert re.search(cause, report), report
    assert not (tmp_path / "run/DONE").exists()
