"""scripts/sweep.py without Slurm: which jobs it would submit, what it refuses before it submits any."""

import re
import shlex
from pathlib import Path

import pytest

from scripts.sweep import main

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def printed(capsys: pytest.CaptureFixture[str]) -> list[list[str]]:
    return [shlex.split(line) for line in capsys.readouterr().out.splitlines()]


def test_every_combination_becomes_a_job(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["conf=debug", "optimizer.lr=1e-4,2e-4", "seed=1,2", "data.sources=[{path: a},{path: b}]"]
    assert main([*arguments, "--dry-run", "--folder", "runs/grid", "--", "--nodes=2"]) == 0
    commands = printed(capsys)
    names = [f"optimizer.lr-{lr}_seed-{seed}" for lr in ("0.0001", "0.0002") for seed in (1, 2)]
    for command, name in zip(commands, names, strict=True):
        lr, seed = name.removeprefix("optimizer.lr-").split("_seed-")
        assert command == [
            "sbatch", "--parsable", "--nodes=2", f"--job-name=grid/{name}", "scripts/slurm/pretrain.sbatch",
            "conf=debug", f"optimizer.lr={lr}", f"seed={seed}", "data.sources=[{path: a},{path: b}]",
            f"run_dir=runs/grid/{name}",
        ]  # fmt: skip


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        (["conf=debug,demo"], ["conf-debug", "conf-demo"]),
        (["conf=debug", "seed=range(1,4)"], ["seed-1", "seed-2", "seed-3"]),
        (["conf=debug", "eval.every=null,4", "model=debug"], ["eval.every-null", "eval.every-4"]),
        (["conf=conf/run/debug.yaml", "seed=1"], ["single"]),
        (["conf=debug", "name='a b','c/d'"], ["name-a-b", "name-c-d"]),
    ],
)
def test_names(overrides: list[str], names: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*overrides, "--dry-run"]) == 0
    assert [command[-1] for command in printed(capsys)] == [f"run_dir=runs/sweep/{name}" for name in names]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["conf=debug", "optimizer.lrr=1e-4,2e-4"], "optimizer.lrr-0.0001: .*did you mean optimizer.lr"),
        (["conf=debug", "seed=1,two"], "seed-two: .*nothing was submitted"),
        (["conf=nowhere"], "no such run"),
        (["seed=1,2"], "conf=NAME or conf=FILE.yaml is required"),
        (["conf=debug", "run_dir=runs/x", "seed=1,2"], "run_dir=runs/x: each job has a run_dir of its own"),
        (["conf=debug", "seed=1,1"], "2 jobs would write to seed-1"),
        (["conf=debug", "seed=interval(1,2)"], "use a list of values"),
        (["conf=debug", "seed=1,("], "seed=1,\\("),
        (["conf=debug", "checkpoint.resume=auto,never"], "would begin again at each requeue"),
        (["conf=debug", "batch.micro_rows=2,3", "--processes=2"], "batch.micro_rows-3: batch.global_tokens"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_is_submitted(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")  # a submission would be another error
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert re.search(message, error), error


def test_finished_members_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = tmp_path / "seed-1"
    done.mkdir()
    (done / "DONE").write_text("{}")
    assert main(["conf=debug", "seed=1,2", "--dry-run", "--folder", str(tmp_path)]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == f"finished: {done}"
    assert second.endswith(f"run_dir={tmp_path}/seed-2")


def test_sbatch_that_fails_is_reported(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert main(["conf=debug", "seed=1,2"]) == 2
    assert "error: sbatch, after 0 of 2 jobs: " in capsys.readouterr().err
