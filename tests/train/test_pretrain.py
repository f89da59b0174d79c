"""The program itself, in real processes: its files, equal losses on any number of ranks, stop and resume."""

import json
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from data.dataset import DatasetWriter
from parallel.pipeline import SingleStage
from tests.support.forked import ROOT, launch, pretrain
from tests.support.jobs import command
from tests.support.runs import column, ending, lines, start_and_wait, tensors

GOLDEN = Path(__file__).with_name("golden_debug.json")
METRICS = {
    "step", "tokens", "loss", "aux_loss", "grad_norm", "lr", "row_tokens", "global_tokens",
    "tokens_per_second", "mfu", "max_memory_gib", "drop_rate", "max_violation", "skipped",
    "moved_rate", "router_entropy", "z_loss", "padding", "data_wait_ms",
    "truncated_tokens", "spike_score", "slow_score", "checkpoint_seconds", "checkpoint_age_steps", "stage",
}  # fmt: skip


@pytest.fixture(scope="module")
def base(license_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A finished debug run of plain python, a checkpoint in its middle, and the overrides that made it."""
    run_dir = tmp_path_factory.mktemp("runs") / "base"
    overrides = [
        "conf=debug",
        f"data.sources=[{{path: {license_corpus}}}]",
        "batch.micro_rows=4",
        "checkpoint.every=10",
        "eval.every=10",
        "data.eval_fraction=0.1",
    ]
    subprocess.run(command(*overrides, f"run_dir={run_dir}"), cwd=ROOT, check=True, timeout=240)
    return run_dir, overrides


def test_run_directory(base: tuple[Path, list[str]]) -> None:
    run_dir, _ = base
    records, experts = lines(run_dir), lines(run_dir, "experts")
    assert [record["step"] for record in records] == list(range(1, 21))
    for record in records:
        assert set(record) - {"eval_loss"} == METRICS
        assert record["tokens"] == 1024 * record["step"]
        assert record["mfu"] is None
        assert record["skipped"] == 0
    assert [record["step"] for record in records if "eval_loss" in record] == [10, 20]
    assert records[0]["lr"] == pytest.approx(1e-3 / 4)
    assert records[-1]["lr"] == pytest.approx(1e-4)
    assert records[-1]["loss"] < records[0]["loss"] - 0.2
    for line in experts:
        assert np.array(line["load"]).shape == (4, 4)
        assert np.array(line["load"]).sum(1).tolist() == [2048] * 4
        assert not np.any(line["dropped"])
        assert line["moved"] == [0] * 4
    violation = max(max(load) / 512 - 1 for load in experts[3]["load"])
    assert records[3]["max_violation"] == pytest.approx(violation)
    assert ending(run_dir) == ("DONE", {"code": 0, "step": 20, "reason": "train.steps reached"})
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == ["step-10", "step-20"]
    manifest = json.loads((run_dir / "checkpoints/step-20/manifest.json").read_text())
    consumed = {"": [20 * 8 * 129]}  # rows of 128 tokens take one token more from the stream
    assert manifest["progress"] == {
        "step": 20, "tokens": 20480, "optimizer_steps": 20, "consumed": consumed, "rewinds": [],
    }  # fmt: skip
    assert manifest["config"]["model"]["num_layers"] == 4
    assert len(manifest["git_commit"]) == 40
    assert {path.name for path in run_dir.iterdir()} == {
        "config.yaml", "metrics.jsonl", "experts.jsonl", "checkpoints", "DONE", ".lock",
    }  # fmt: skip


def test_golden_losses(base: tuple[Path, list[str]]) -> None:
    """Losses of 20 steps; a change of the maths must show its own table (other CPUs sum in another order)."""
    np.testing.assert_allclose(column(base[0], "loss"), json.loads(GOLDEN.read_text()), rtol=1e-5)


def test_resolved_config_reproduces_the_run(base: tuple[Path, list[str]], tmp_path: Path) -> None:
    run_dir, _ = base
    assert yaml.safe_load((run_dir / "config.yaml").read_text())["run_dir"] == str(run_dir)
    pretrain(f"conf={run_dir}/config.yaml", f"run_dir={tmp_path}/again", cwd=tmp_path)
    for key in ("loss", "grad_norm", "aux_loss"):
        assert column(run_dir, key).tolist() == column(tmp_path / "again", key).tolist()
    assert list(tmp_path.iterdir()) == [tmp_path / "again"]  # Hydra left nothing of its own
    first, second = (tensors(path / "checkpoints/step-20") for path in (run_dir, tmp_path / "again"))
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize(("processes", "stage"), [(1, 1), (2, 1), (4, 3)])
def test_same_losses_on_any_number_of_processes(
    processes: int, stage: int, base: tuple[Path, list[str]], tmp_path: Path
) -> None:
    run_dir, overrides = base
    pretrain(
        *overrides,
        f"batch.micro_rows={4 // processes}",
        f"parallel.zero_stage={stage}",
        f"run_dir={tmp_path}",
        processes=processes,
    )
    np.testing.assert_allclose(column(tmp_path, "loss"), column(run_dir, "loss"), rtol=1e-6)
    np.testing.assert_allclose(column(tmp_path, "grad_norm"), column(run_dir, "grad_norm"), rtol=1e-5)
    np.testing.assert_allclose(column(tmp_path, "aux_loss"), column(run_dir, "aux_loss"), rtol=1e-5)
    assert [line["load"] for line in lines(tmp_path, "experts")] == [
        line["load"] for line in lines(run_dir, "experts")
    ]
    held_out = [record["eval_loss"] for record in lines(tmp_path) if "eval_loss" in record]
    expected = [record["eval_loss"] for record in lines(run_dir) if "eval_loss" in record]
    np.testing.assert_allclose(held_out, expected, rtol=1e-6)
    assert len(list((tmp_path / "checkpoints/step-20").glob("rank-*.safetensors"))) == processes


@pytest.mark.parametrize(
    "layout",
    [
        ["parallel.tp=2", "parallel.ep=2"],
        ["parallel.cp=2", "parallel.zero_stage=3", "train.recompute=selective"],
        ["parallel.pp=2", "parallel.schedule=zbv"],
    ],
    ids=" ".join,
)
def test_layouts_resume_each_other(layout: list[str], base: tuple[Path, list[str]], tmp_path: Path) -> None:
    """From one process's step 10 to step 20 on two ranks: the losses of the uninterrupted run."""
    run_dir, overrides = base
    shutil.copytree(run_dir, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/step-20")
    pretrain(*overrides, *layout, f"run_dir={tmp_path}/run", processes=2)
    np.testing.assert_allclose(column(tmp_path / "run", "loss"), column(run_dir, "loss"), rtol=1e-5)
    np.testing.assert_allclose(column(tmp_path / "run", "grad_norm"), column(run_dir, "grad_norm"), rtol=1e-5)
    held_out = [lines(path)[-1]["eval_loss"] for path in (tmp_path / "run", run_dir)]
    assert held_out[0] == pytest.approx(held_out[1], rel=1e-6)
    assert [line["load"] for line in lines(tmp_path / "run", "experts")] == [
        line["load"] for line in lines(run_dir, "experts")
    ]


def test_resumed_run_is_bitwise_the_uninterrupted_one(base: tuple[Path, list[str]], tmp_path: Path) -> None:
    """Crash after step 13, checkpoint at 10: later lines and a torn one go, then all bits are the same."""
    run_dir, overrides = base
    shutil.copytree(run_dir, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/step-20")
    (tmp_path / "run/DONE").unlink()
    for name in ("metrics", "experts"):
        path = tmp_path / f"run/{name}.jsonl"
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:13]) + '{"step": 14, "lo')
    pretrain(*overrides, f"run_dir={tmp_path}/run")
    assert [record["step"] for record in lines(tmp_path / "run")] == list(range(1, 21))
    for key in ("loss", "grad_norm", "tokens", "max_violation"):
        assert column(tmp_path / "run", key).tolist() == column(run_dir, key).tolist()
    assert lines(tmp_path / "run", "experts") == lines(run_dir, "experts")
    first, second = (tensors(path / "checkpoints/step-20") for path in (run_dir, tmp_path / "run"))
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[key], second[key]) for key in first)


def test_finished_run_says_so_and_keeps_its_lines(base: tuple[Path, list[str]], tmp_path: Path) -> None:
    run_dir, overrides = base
    shutil.copytree(run_dir, tmp_path / "run")
    said = pretrain(*overrides, f"run_dir={tmp_path}/run")
    assert "finished" in said
    assert lines(tmp_path / "run") == lines(run_dir)
    assert ending(tmp_path / "run")[0] == "DONE"


def test_resume_never_sets_earlier_results_aside(base: tuple[Path, list[str]], tmp_path: Path) -> None:
    run_dir, overrides = base
    shutil.copytree(run_dir, tmp_path / "run")
    said = pretrain(*overrides, f"run_dir={tmp_path}/run", "checkpoint.resume=never")
    assert "earlier results moved to" in said
    assert lines(tmp_path / "run/previous-1") == lines(run_dir)
    assert column(tmp_path / "run", "loss").tolist() == column(run_dir, "loss").tolist()
    assert (tmp_path / "run/previous-1/checkpoints/step-10/manifest.json").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_stop_request_saves_and_the_run_goes_on(
    number: signal.Signals, base: tuple[Path, list[str]], tmp_path: Path
) -> None:
    _, overrides = base
    arguments = [*overrides, f"run_dir={tmp_path}", "checkpoint.every=null", "eval.every=null"]
    process = start_and_wait(*arguments, "train.steps=100000", run_dir=tmp_path)
    process.send_signal(number)
    process.send_signal(number)  # a second one changes nothing
    assert process.wait(60) == 75
    step = lines(tmp_path)[-1]["step"]
    assert ending(tmp_path) == ("REQUEUE", {"code": 75, "step": step, "reason": number.name})
    assert (tmp_path / f"checkpoints/step-{step}/manifest.json").exists()
    pretrain(*arguments, f"train.steps={step + 2}")
    assert [record["step"] for record in lines(tmp_path)] == list(range(1, step + 3))


def test_ctrl_c_under_torchrun(base: tuple[Path, list[str]], tmp_path: Path) -> None:
    """The agent passes a stop on to its workers; one of them is enough for all to save the same step."""
    arguments = [
        *base[1],
        f"run_dir={tmp_path}",
        "checkpoint.every=null",
        "eval.every=null",
        "batch.micro_rows=2",
    ]
    process = start_and_wait(*arguments, "train.steps=100000", run_dir=tmp_path, processes=2)
    process.send_signal(signal.SIGINT)
    process.wait(60)
    kind, facts = ending(tmp_path)
    assert kind == "REQUEUE"
    assert facts["code"] == 75
    assert len(list((tmp_path / f"checkpoints/step-{facts['step']}").glob("*.safetensors"))) == 2


def poison_third_step(rank: int) -> None:
    """A fault for launch: a NaN in one gradient."""
    inner, calls = SingleStage.forward_backward, []

    def poisoned(self: SingleStage, *arguments: Any) -> torch.Tensor:
        loss = inner(self, *arguments)
        calls.append(1)
        if len(calls) == 3:
            list(self.model.parameters())[3].grad.view(-1)[0] = float("nan")
        return loss

    SingleStage.forward_backward = poisoned


def test_non_finite_gradients_skip_one_step(base: tuple[Path, list[str]], tmp_path: Path) -> None:
    """A NaN in one gradient at step 3 leaves weights, moments and update count alone."""
    saves = ["checkpoint.every=1", "checkpoint.keep=null", "train.steps=4"]
    result = launch(*base[1], f"run_dir={tmp_path}", *saves, fault=poison_third_step)
    assert result.codes == [0], result.said
    assert re.search(r"step 3: non-finite on rank 0: gradient of blocks\.0\.\S+$", result.stdout, re.M)
    assert [record["skipped"] for record in lines(tmp_path)] == [0, 0, 1, 0]
    assert [record["grad_norm"] is None for record in lines(tmp_path)] == [False, False, True, False]
    second, third, fourth = (tensors(tmp_path / f"checkpoints/step-{step}") for step in (2, 3, 4))
    assert all(np.array_equal(second[key], third[key]) for key in second)
    assert not any(
        np.array_equal(third[key], fourth[key]) for key in third if ".norm" not in key and "model" in key
    )
    manifest = json.loads((tmp_path / "checkpoints/step-4/manifest.json").read_text())
    progress = manifest["progress"]
    assert (progress["step"], progress["tokens"], progress["optimizer_steps"]) == (4, 4096, 3)
    assert progress["consumed"] == {"": [4 * 8 * 129]}  # a skipped step's tokens are gone, too


def broken_corpus(source: Path, target: Path, change: str) -> None:
    for suffix in (".bin", ".idx", ".json"):
        shutil.copy(f"{source}{suffix}", f"{target}{suffix}")
    data = Path(f"{target}.bin")
    if change == "truncated":
        data.write_bytes(data.read_bytes()[:-7])
    elif change == "foreign id":
        Path(f"{target}.json").unlink()
        values = np.fromfile(data, dtype=np.uint16)
        values[:] = 5000
        values.tofile(data)


@pytest.mark.parametrize(
    ("overrides", "message", "code"),
    [
        (["data.sources=[{path: no/such}]"], "no/such", 2),
        (["data.sources=[{path: TRUNCATED}]"], "truncated.bin", 2),
        (["data.sources=[{path: FOREIGN}]"], "token id 5000", 2),
        (["model.vocab_size=100"], "model.vocab_size=100", 2),
        (["train.device=cuda"], "train.device=cuda", 2),
        (["checkpoint.resume=must"], "checkpoint.resume=must", 3),
        (["batch.global_tokens=1000"], "batch.global_tokens=1000", 2),
        (["parallel.tp=0"], "parallel.tp=0 must be at least 1", 2),
    ],
)
def test_wrong_inputs_end_with_one_line(
    overrides: list[str],
    message: str,
    code: int,
    base: tuple[Path, list[str]],
    license_corpus: Path,
    tmp_path: Path,
) -> None:
    for name, change in (("TRUNCATED", "truncated"), ("FOREIGN", "foreign id")):
        target = tmp_path / change.split()[0]
        if any(name in override for override in overrides):
            broken_corpus(license_corpus, target, change)
            overrides = [override.replace(name, str(target)) for override in overrides]
    run_dir = tmp_path / "run"
    result = launch(*base[1], *overrides, f"run_dir={run_dir}")
    assert result.returncode == code
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, result.stderr
    assert message in errors[0], result.stderr
    assert "Traceback" not in result.stderr
    kind, facts = ending(run_dir)
    assert kind == "FAILED"
    assert facts["code"] == code
    assert message in facts["reason"]


def test_world_size_that_does_not_divide(base: tuple[Path, list[str]], tmp_path: Path) -> None:
    result = launch(*base[1], "batch.micro_rows=1", f"run_dir={tmp_path}", processes=3)
    assert result.codes == [2, 2, 2]
    assert result.stderr.count("error: batch.global_tokens=1024 must be a multiple of") == 1
    assert ending(tmp_path)[1]["code"] == 2


def test_unknown_key_is_refused_by_the_program() -> None:
    result = launch("conf=debug", "train.step=3")
    assert result.returncode == 2
    expected = "error: train.step: Key 'step' not in 'TrainConfig'; did you mean train.steps"
    assert result.stderr.startswith(expected)
    assert result.stderr.count("\n") == 1


def test_cfg_and_help() -> None:
    shown = yaml.safe_load(launch("conf=debug", "--cfg", "job", "train.steps=3").stdout)
    assert shown["train"]["steps"] == 3
    assert shown["run_dir"] == "runs/debug"
    helped = launch("--help")
    assert helped.returncode == 0
    assert "run: curriculum_small, debug, demo" in helped.stdout
    assert "conf=NAME" in helped.stdout


def test_wandb_offline_keeps_one_run_over_a_resume(base: tuple[Path, list[str]], tmp_path: Path) -> None:
    arguments = [*base[1], f"run_dir={tmp_path}", "wandb.mode=offline", "checkpoint.every=2"]
    pretrain(*arguments, "train.steps=2")
    identifier = (tmp_path / "wandb_id").read_text()
    pretrain(*arguments, "train.steps=4")
    assert (tmp_path / "wandb_id").read_text() == identifier
    folders = [path.name for path in (tmp_path / "wandb").glob("offline-run-*")]
    assert len(folders) == 2
    assert all(name.endswith(identifier.strip()) for name in folders)


def test_wandb_that_fails_does_not_stop_the_run(
    base: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Online without a key: a warning, and all the files."""
    for key in filter(lambda key: key.startswith("WANDB"), list(os.environ)):
        monkeypatch.delenv(key)
    variables = {"HOME": str(tmp_path), "WANDB_BASE_URL": "http://127.0.0.1:9"}
    arguments = [*base[1], f"run_dir={tmp_path}/run", "wandb.mode=online", "train.steps=2"]
    result = launch(*arguments, variables=variables)
    assert result.codes == [0], result.said
    assert "wandb is off" in result.stdout + result.stderr
    assert len(lines(tmp_path / "run")) == 2


def test_corpus_with_too_few_documents_for_evaluation(base: tuple[Path, list[str]], tmp_path: Path) -> None:
    with DatasetWriter(tmp_path / "one", vocab_size=512) as writer:
        writer.add(np.arange(300))
    result = launch(*base[1], f"data.sources=[{{path: {tmp_path}/one}}]", f"run_dir={tmp_path}/run")
    assert result.returncode == 2
    assert "the eval split is empty" in result.stderr
