"""The program under torchrun --max-restarts."""

import os
import signal
import socket
from functools import partial
from pathlib import Path

import pytest

from parallel.launch import JoinError, join_job
from tests.support.forked import run_forked
from tests.support.jobs import Job, arguments, workers
from tests.support.runs import outcome


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
    assert refused is not bool(changes)
    assert ("TORCH_DISABLE_SHARE" in str(caught.value)) is refused
