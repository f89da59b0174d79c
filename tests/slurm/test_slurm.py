"""scripts/slurm/pretrain.sbatch on a real Slurm of two nodes: preemption, warnings, crashes, requeues."""

import json
import os
import re
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.slurm.cluster import Cluster, running_cluster
from tests.support.clone import clone_repository

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1500)]
STEPS = 30
ON_THE_WAY = ("PENDING", "RUNNING", "SIGNALING", "COMPLETING")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """In a short folder of its own: pytest's is closed to munge, and sockets want short paths."""
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder, running_cluster(Path(folder)) as running:
        yield running


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone of the repository, somewhere else, with a space in its name."""
    return clone_repository(tmp_path_factory.mktemp("clones") / "a clone")


class Job:
    """A job of pretrain.sbatch."""

    def __init__(self, cluster: Cluster, clone: Path, name: str, *options: str, overrides: list[str]) -> None:
        self.cluster, self.run_dir = cluster, clone / "runs" / name
        script = "scripts/slurm/pretrain.sbatch"
        command = ["sbatch", "--parsable", *options, script, *overrides, f"run_dir=runs/{name}"]
        self.number = cluster.ask(*command, cwd=clone, OMP_NUM_THREADS="1")
        self.output = clone / f"slurm-{self.number}.out"

    def facts(self) -> dict[str, str]:
        return self.cluster.job(self.number)

    def state(self) -> str:
        return self.facts()["JobState"]

    def wait(self, what: str, is_true, seconds: float = 600) -> None:
        try:
            self.cluster.wait(what, is_true, seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}\n--- {self.facts()}\n{self.said()[-5000:]}") from None

    def wait_for_state(self, state: str) -> None:
        def ended() -> bool:
            now = self.state()
            assert now == state or now in ON_THE_WAY, f"{now}\n{self.said()}"
            return now == state

        self.wait(state, ended)

    def wait_for_step(self, step: int) -> None:
        self.wait(f"step {step}", lambda: len(self.records()) >= step)

    def said(self) -> str:
        return self.output.read_text() if self.output.exists() else ""

    def restarts(self) -> int:
        return int(self.facts()["Restarts"])

    def records(self) -> list[dict]:
        path = self.run_dir / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def rank_0(self) -> int | None:
        """Process number of rank 0, if it is at work."""
        try:
            return json.loads((self.run_dir / ".lock").read_text())["pid"]
        except (FileNotFoundError, json.JSONDecodeError):
            return None


@pytest.fixture(scope="module")
def overrides(license_corpus: Path) -> list[str]:
    return ["conf=debug", f"data.sources=[{{path: {license_corpus}}}]", f"train.steps={STEPS}"]


@pytest.fixture(scope="module")
def uninterrupted(cluster: Cluster, clone: Path, overrides: list[str]) -> Job:
    """A job on two nodes that nobody disturbs."""
    job = Job(cluster, clone, "uninterrupted", "--nodes=2", overrides=overrides)
    job.wait_for_state("COMPLETED")
    return job


def tensors(job: Job) -> dict[str, np.ndarray]:
    files = (job.run_dir / f"checkpoints/step-{STEPS}").glob("*.safetensors")
    return {f"{path.name}/{key}": value for path in files for key, value in load_file(path).items()}


def assert_bitwise_equal(job: Job, other: Job) -> None:
    """All records' numbers and all weights and moments."""
    for key in ("step", "tokens", "loss", "grad_norm", "lr"):
        assert [record[key] for record in job.records()] == [record[key] for record in other.records()]
    ours, theirs = tensors(job), tensors(other)
    assert ours.keys() == theirs.keys()
    assert len({key.split("/")[0] for key in ours}) == 2
    assert all(np.array_equal(ours[key], theirs[key]) for key in ours)


def test_two_nodes_train_to_the_end(uninterrupted: Job) -> None:
    job = uninterrupted
    assert [record["step"] for record in job.records()] == list(range(1, STEPS + 1))
    assert job.records()[-1]["loss"] < job.records()[0]["loss"] - 0.5
    assert job.facts()["NodeList"] == "n[1-2]"
    assert job.restarts() == 0
    assert (job.run_dir / "DONE").exists()
    assert not (job.run_dir / ".requeues").exists()
    assert job.said().count("== job") == 1
    assert "== DONE" in job.said()


def test_preempted_job_goes_on_bitwise(
    uninterrupted: Job, cluster: Cluster, clone: Path, overrides: list[str]
) -> None:
    """A job of a higher partition takes both nodes: the run saves, is requeued, finishes."""
    job = Job(cluster, clone, "preempted", "--nodes=2", overrides=overrides)
    job.wait_for_step(5)
    urgent = cluster.ask(
        "sbatch", "--parsable", "--partition=urgent", "--nodes=2", f"--output={clone}/urgent.out",
        "--wrap", f"ls '{job.run_dir}'",
    )  # fmt: skip
    job.wait_for_state("COMPLETED")
    assert cluster.job(urgent)["JobState"] == "COMPLETED"
    assert "REQUEUE" in (clone / "urgent.out").read_text()  # the urgent job ran between the two starts
    assert job.restarts() == 1
    assert '"reason": "SIGUSR1"' in job.said()
    assert "== requeued" in job.said()
    assert "== DONE" in job.said()
    assert job.said().count("== job") == 2  # the second start wrote behind the first
    assert_bitwise_equal(job, uninterrupted)


def test_warning_before_the_time_limit(cluster: Cluster, clone: Path, overrides: list[str]) -> None:
    """Slurm sends --signal's USR1 by itself; the run saves and is requeued. Cancelled, it stays away."""
    settings = [
        *overrides,
        "train.steps=100000",
        "batch.global_tokens=16384",
    ]  # steps of seconds, to wait for
    job = Job(cluster, clone, "warned", "--nodes=2", overrides=settings)
    job.wait_for_step(1)
    hours, minutes, _ = map(int, job.facts()["RunTime"].split(":"))
    cluster.ask("scontrol", "update", f"JobId={job.number}", f"TimeLimit={60 * hours + minutes + 5}")
    job.wait("a requeue", lambda: "== requeued" in job.said())
    cluster.ask("scontrol", "update", f"JobId={job.number}", "TimeLimit=60")
    assert '"reason": "SIGUSR1"' in job.said()
    assert "asked to stop: saved step" in job.said()
    saved = len(job.records())
    job.wait_for_step(saved + 1)
    cluster.ask("scancel", job.number)
    job.wait("the end", lambda: "== not requeued: Slurm is ending this job" in job.said())
    job.wait_for_state("CANCELLED")
    steps = [record["step"] for record in job.records()]
    assert job.restarts() == 1
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) > saved


@pytest.mark.parametrize(
    ("override", "message", "sentinel"),
    [
        ("data.sources=[{path: corpus/nowhere}]", "corpus/nowhere", True),
        ("optimizer.lrr=1e-3", "did you mean optimizer.lr", False),  # refused before any step of srun
        ("checkpoint.resume=never", "would begin again at each requeue", False),
    ],
)
def test_failed_job_is_not_requeued(
    override: str, message: str, sentinel: bool, cluster: Cluster, clone: Path, overrides: list[str]
) -> None:
    name = override.partition("=")[0]
    job = Job(cluster, clone, name, "--nodes=1", overrides=[*overrides, override])
    job.wait_for_state("FAILED")
    assert message in job.said()
    assert "== requeued" not in job.said()
    assert job.restarts() == 0
    assert (job.run_dir / "FAILED").exists() == sentinel


def test_three_requeues_in_a_row_without_a_checkpoint(
    cluster: Cluster, clone: Path, overrides: list[str]
) -> None:
    """Rank 0 is killed at every start: at the second after a checkpoint, which begins the count again."""
    settings = [*overrides, "train.steps=100000", "checkpoint.every=3", "checkpoint.keep=1"]
    (clone / "runs/killed").mkdir(parents=True)
    (clone / "runs/killed/DONE").write_text("{}")  # an earlier, shorter run's
    job = Job(cluster, clone, "killed", "--nodes=1", overrides=settings)
    killed: list[int] = []
    for start in range(1, 6):
        job.wait("rank 0", lambda: job.rank_0() not in (None, *killed))
        if start == 2:
            job.wait("a checkpoint", lambda: any(job.run_dir.glob("checkpoints/step-*/manifest.json")))
        pid = job.rank_0()
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        killed.append(pid)
    job.wait_for_state("FAILED")
    assert job.restarts() == 4
    assert job.said().count("== requeued") == 4
    assert "== not requeued: 3 times in a row without a new checkpoint (step-" in job.said()
    assert not any((job.run_dir / name).exists() for name in ("DONE", "REQUEUE", "FAILED"))


def test_second_job_in_a_run_directory_ends(cluster: Cluster, clone: Path, overrides: list[str]) -> None:
    first = Job(cluster, clone, "shared", "--nodes=1", overrides=[*overrides, "train.steps=100000"])
    first.wait_for_step(1)
    second = Job(cluster, clone, "shared", "--nodes=1", overrides=overrides)
    second.wait_for_state("FAILED")
    assert "is in use by {" in second.said()
    assert f'"slurm_job": "{first.number}"' in second.said()
    assert first.state() == "RUNNING"
    assert second.restarts() == 0
    cluster.ask("scancel", first.number)
    first.wait_for_state("CANCELLED")


def test_sweep_submits_a_job_for_each_combination(
    cluster: Cluster, clone: Path, overrides: list[str]
) -> None:
    """Two at a time on one machine: their ports do not meet. Again: nothing is left to do."""
    command = [
        sys.executable, "scripts/sweep.py", *overrides[:-1], "train.steps=2", "optimizer.lr=1e-4,2e-4",
        "seed=1,2", "--folder", "runs/grid", "--", "--nodes=1",
    ]  # fmt: skip
    said = cluster.ask(*command, cwd=clone)
    found = dict(re.findall(r"^job (\d+): (\S+)$", said, re.M))
    names = [f"optimizer.lr-{lr}_seed-{seed}" for lr in ("0.0001", "0.0002") for seed in (1, 2)]
    assert list(found.values()) == [f"runs/grid/{name}" for name in names]
    for number, run_dir in found.items():
        cluster.wait(f"job {number}", lambda number=number: cluster.job(number)["JobState"] == "COMPLETED")
        records = [json.loads(line) for line in (clone / run_dir / "metrics.jsonl").read_text().splitlines()]
        assert [record["step"] for record in records] == [1, 2]
        assert (clone / run_dir / "DONE").exists()
        assert f"lr: {run_dir.split('-')[1].split('_')[0]}" in (clone / run_dir / "config.yaml").read_text()
    again = cluster.ask(*command, cwd=clone)
    assert again.splitlines() == [f"finished: runs/grid/{name}" for name in names]
