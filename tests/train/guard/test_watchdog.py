"""A process that hangs ends itself and says where; limits hold for the section that it is in."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from parallel.launch import _record_collectives
from tests.support.forked import ROOT
from tests.support.jobs import Job, arguments, is_running, workers
from train.guard.spikes import HealthConfig


def in_a_process(body: str) -> subprocess.CompletedProcess[str]:
    code = f"import time\nfrom train.guard.watchdog import Watchdog\ndog = Watchdog(3)\n{body}"
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )  # fmt: skip


def test_a_section_over_its_limit_ends_the_process() -> None:
    result = in_a_process(
        "def stuck(): time.sleep(30)\nwith dog.section('setup', 0.5):\n    stuck()\nprint('not reached')"
    )
    assert result.returncode == 75
    assert result.stdout == ""
    assert "rank 3 hangs in setup; stacks of all threads:" in result.stderr
    assert "in stuck" in result.stderr


def test_a_section_within_pauses_the_one_around_it() -> None:
    """0.9 s within do not count for the 0.8 s around, and no limit outlives its section."""
    result = in_a_process(
        "with dog.section('step', 0.8):\n"
        "    with dog.section('save', None): time.sleep(0.9)\n"
        "    time.sleep(0.2)\n"
        "time.sleep(0.9)\n"
        "print('reached', flush=True)\n"
        "with dog.section('step', 0.5): time.sleep(30)"
    )
    assert result.stdout == "reached\n"
    assert result.returncode == 75
    assert "rank 3 hangs in step" in result.stderr


def test_a_stopped_rank_takes_the_job_down(license_corpus: Path, tmp_path: Path) -> None:
    limited = arguments(license_corpus, "train.steps=100000", "health.step_timeout_s=5")
    with Job(tmp_path, *limited) as job:
        job.wait_until(lambda: job.records() >= 3)
        ranks = workers(job.process.pid)
        os.kill(ranks[1], signal.SIGSTOP)
        stopped = time.monotonic()
        while is_running(ranks[0]):
            assert time.monotonic() < stopped + 10, job.said.read_text()
            time.sleep(0.1)
        os.kill(ranks[1], signal.SIGKILL)  # the launcher would wait 30 s for it before it does the same
        assert job.wait(10) != 0
    text = job.said.read_text()
    assert re.search(r"rank 0 hangs in step \d+; stacks of all threads:", text), text
    assert re.search(
        r"rank 0: last collective: gloo:\w+ over \w+, shapes .*, begun \d+\.\d s ago, not over", text
    )
    assert "in train_step" in text
    assert re.search(r"exitcode\s*: 75", text)
    assert not any((tmp_path / "run" / name).exists() for name in ("DONE", "REQUEUE", "FAILED"))


def test_the_flight_recorder_is_on_unless_the_user_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE", "TORCH_NCCL_DUMP_ON_TIMEOUT"):
        monkeypatch.setenv(name, "")  # so that it is as before after the test
        monkeypatch.delenv(name)
    _record_collectives("cpu")
    assert os.environ["TORCH_FR_BUFFER_SIZE"] == "2000"
    assert "TORCH_NCCL_DUMP_ON_TIMEOUT" not in os.environ
    monkeypatch.setenv("TORCH_FR_BUFFER_SIZE", "7")
    monkeypatch.setenv("TORCH_NCCL_DUMP_ON_TIMEOUT", "0")
    _record_collectives("cuda")
    assert (os.environ["TORCH_FR_BUFFER_SIZE"], os.environ["TORCH_NCCL_DUMP_ON_TIMEOUT"]) == ("7", "0")
    monkeypatch.delenv("TORCH_FR_BUFFER_SIZE")
    monkeypatch.delenv("TORCH_NCCL_DUMP_ON_TIMEOUT")
    monkeypatch.setenv("TORCH_NCCL_TRACE_BUFFER_SIZE", "5")
    _record_collectives("cuda")
    assert "TORCH_FR_BUFFER_SIZE" not in os.environ
    assert os.environ["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "1"


@pytest.mark.parametrize(
    "key", ["setup_timeout_s", "step_timeout_s", "eval_timeout_s", "checkpoint_timeout_s"]
)
def test_limits_are_checked(key: str) -> None:
    with pytest.raises(ValueError, match=rf"health.{key}=0 must be above 0, or null = never"):
        HealthConfig(**{key: 0})
