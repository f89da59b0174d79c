"""Numbers that go wrong in real processes: who sees it, what is skipped, when the run ends."""

import json
import math
import re
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

from data.config import DataConfig, SourceConfig
from data.dataset import TokenDataset
from data.loader import Loader, Shape
from model.router import Micro, Router, Routing
from parallel.collectives import Axis
from parallel.gradients import Gradients
from tests.support.forked import ROOT, Ended, launch, run_forked
from tests.support.runs import column, ending, lines, tensors
from train.guard.spikes import Health, HealthConfig, OnSpike, find_non_finite

PROGRAM = ROOT / "tests/support/programs/poison_row.py"


def poisoned_run(
    tmp_path: Path,
    *overrides: str,
    numbers: list[int],
    row: int = 1,
    factor: str = "nan",
    ranks: Sequence[int] = (0, 1),
    processes: int = 0,
) -> Ended:
    """Run with what the head reads multiplied in one row of some micro-batches (by `MicroBatch.number`)."""
    poison = {"ROW": str(row), "FACTOR": factor, "NUMBERS": json.dumps(numbers), "RANKS": json.dumps(ranks)}
    return launch(
        "conf=debug", f"run_dir={tmp_path}/run", *overrides, processes=processes, program=PROGRAM,
        variables={f"POISON_{name}": value for name, value in poison.items()}, timeout_s=120,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("layout", "where"),
    [
        ([], "micro-batch 0, rows [3] of the step (data.sources[0] document"),
        (["parallel.pp=2", "parallel.schedule=1f1b"], "micro-batch 1, rows [2, 3] of the step"),
    ],
    ids=["dp", "pp"],
)
def test_nan_on_one_rank_skips_one_step_on_all_and_is_named(
    layout: list[str], where: str, license_corpus: Path, tmp_path: Path
) -> None:
    number = 2 * 4 + 1 if layout else 2 * 2  # of step 3
    result = poisoned_run(
        tmp_path, *layout, f"data.sources=[{{path: {license_corpus}}}]", "train.steps=4",
        "checkpoint.every=1", "checkpoint.keep=null", numbers=[number], ranks=[1], processes=2,
    )  # fmt: skip
    said = result.stdout + result.stderr
    assert result.returncode == 0, said
    assert f"step 3: non-finite on rank 1: loss of {where}" in said
    assert said.count("non-finite on") == 1
    assert [record["skipped"] for record in lines(tmp_path / "run")] == [0, 0, 1, 0]
    second, third, fourth = (tensors(tmp_path / f"run/checkpoints/step-{step}") for step in (2, 3, 4))
    assert {name.split("/")[0] for name in second} == {f"rank-0000{r}.safetensors" for r in range(2)}
    assert all(np.array_equal(second[key], third[key]) for key in second)
    assert not all(np.array_equal(third[key], fourth[key]) for key in third)
    manifests = [
        json.loads((tmp_path / f"run/checkpoints/step-{step}/manifest.json").read_text()) for step in (3, 4)
    ]
    assert [each["health"]["skips_in_row"] for each in manifests] == [1, 0]


def test_skips_in_a_row_end_the_run_over_a_resume(license_corpus: Path, tmp_path: Path) -> None:
    """Two before a planned end, one after: the count is part of the checkpoint."""
    overrides = [
        f"data.sources=[{{path: {license_corpus}}}]", "health.max_skips_in_row=3", "checkpoint.every=1",
        "checkpoint.keep=null",
    ]  # fmt: skip
    bad = list(range(2 * 4, 100))  # from step 3 on
    first = poisoned_run(tmp_path, *overrides, "train.steps=4", numbers=bad)
    assert first.returncode == 0, first.stderr
    second = poisoned_run(tmp_path, *overrides, "train.steps=20", numbers=bad)
    assert second.returncode == 1
    kind, facts = ending(tmp_path / "run")
    assert (kind, facts["code"], facts["step"]) == ("FAILED", 1, 5)
    assert facts["reason"].startswith("3 steps in a row were skipped (health.max_skips_in_row=3)")
    assert facts["reason"] in second.stdout
    assert [record["step"] for record in lines(tmp_path / "run")] == [1, 2, 3, 4, 5]
    saved = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert saved == ["step-1", "step-2", "step-3", "step-4"]


SPIKY = ["health.window=8", "health.spike_sigmas=20", "checkpoint.every=1", "checkpoint.keep=null"]


def health_at(run_dir: Path, step: int) -> dict:
    return json.loads((run_dir / f"checkpoints/step-{step}/manifest.json").read_text())["health"]


@pytest.mark.parametrize("action", ["skip", "log"])
def test_a_spike_is_skipped_alike_on_all_ranks(action: str, license_corpus: Path, tmp_path: Path) -> None:
    """Logits x 1000 in one row of one rank at step 8."""
    result = poisoned_run(
        tmp_path, f"data.sources=[{{path: {license_corpus}}}]", *SPIKY, "train.steps=9",
        f"health.on_spike={action}", numbers=[2 * 7], factor="1000", ranks=[1], processes=2,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    run_dir, skipped = tmp_path / "run", action == "skip"
    records = lines(run_dir)
    assert [record["skipped"] for record in records] == [0] * 7 + [int(skipped), 0]
    assert [record["spike_score"] is None for record in records] == [True] * 4 + [False] * 5
    assert records[7]["spike_score"] > 20
    assert np.isfinite(records[7]["loss"])
    assert result.stdout.count("step 8: spike, skipped: " if skipped else "step 8: spike, not skipped: ") == 1
    before, after = (tensors(run_dir / f"checkpoints/step-{step}") for step in (7, 8))
    assert all(np.array_equal(before[key], after[key]) for key in before) is skipped
    assert (health_at(run_dir, 7)["windows"] == health_at(run_dir, 8)["windows"]) is skipped
    assert (records[7]["loss"] in health_at(run_dir, 8)["windows"]["loss"]) is not skipped


def gradients_times(factor: float, step: int, rank: int) -> None:
    """A fault for run_forked: all gradients of one step are too large, on every rank."""
    calls, inner = [0], Gradients.collect

    def collect(gradients: Gradients) -> None:
        inner(gradients)
        calls[0] += 1
        if calls[0] == step:
            gradients.scale(factor)

    mock.patch.object(Gradients, "collect", collect).start()


def applied_norm(run_dir: Path, step: int) -> float:
    """Norm of the gradient that a step's update used, from the first moments around it."""
    before, after = (tensors(run_dir / f"checkpoints/step-{n}") for n in (step - 1, step))
    names = [key for key in after if "/exp_avg." in key]
    gradients = [(after[key].astype(float) - 0.9 * before[key]) / 0.1 for key in names]
    return float(np.sqrt(sum(np.square(each).sum() for each in gradients)))


@pytest.mark.parametrize("action", ["clip", "skip", "log"])
def test_a_gradient_of_a_thousand_times_its_size(action: str, license_corpus: Path, tmp_path: Path) -> None:
    """Only the gradient is wrong, at step 8, and optimizer.max_grad_norm does not help."""
    ended = run_forked(
        tmp_path, f"data.sources=[{{path: {license_corpus}}}]", *SPIKY, "train.steps=9",
        "optimizer.max_grad_norm=1e9", f"health.on_spike={action}", processes=2,
        fault=partial(gradients_times, 1000.0, 8),
    )  # fmt: skip
    assert ended.codes == [0, 0], ended.said
    records = lines(tmp_path)
    norms = health_at(tmp_path, 7)["windows"]["grad_norm"]
    assert records[7]["grad_norm"] > 100 * max(norms)
    assert records[6]["grad_norm"] == norms[-1]
    windows = health_at(tmp_path, 8)["windows"]["grad_norm"]
    entered = {"skip": norms[-1], "clip": np.mean(norms) + 20 * np.std(norms), "log": records[7]["grad_norm"]}
    assert windows[-1] == pytest.approx(entered[action], rel=1e-9)
    assert len(windows) == 7 + (action != "skip")
    assert [r["skipped"] for r in records[7:]] == [action == "skip", 0]
    before, after = (tensors(tmp_path / f"checkpoints/step-{step}") for step in (7, 8))
    if action == "skip":
        assert all(np.array_equal(before[key], after[key]) for key in before)
    else:
        score = records[7]["spike_score"]
        usual = np.mean(norms) + 20**2 / score * (records[7]["grad_norm"] - np.mean(norms)) / score
        assert np.mean(norms) < usual < 2 * np.mean(norms)
        expected = usual if action == "clip" else records[7]["grad_norm"]
        assert applied_norm(tmp_path, 8) == pytest.approx(expected, rel=1e-3)
    said = {"clip": "clipped to norm", "skip": "skipped:", "log": "not skipped:"}[action]
    assert ended.said[0].count(f"step 8: spike, {said}") == 1


def nan_in_router(layer: int, number: int, on_rank: int, rank: int) -> None:
    """A fault for run_forked: the logits of one token in one layer are NaN in one micro-batch of one rank."""
    inner = Router.forward

    def forward(self: Router, x: torch.Tensor, micro: Micro) -> Routing:
        if (rank, self.layer, int(micro.number)) != (on_rank, layer, number):
            return inner(self, x, micro)

        def spoil(gate: torch.nn.Module, inputs: object, logits: torch.Tensor) -> torch.Tensor:
            spoiled = logits.clone()
            spoiled[1, 70] = float("nan")
            return spoiled

        hook = self.gate.register_forward_hook(spoil)
        try:
            return inner(self, x, micro)
        finally:
            hook.remove()

    Router.forward = forward  # type: ignore[method-assign]


@pytest.mark.parametrize("layout", ["parallel.ep=2", "router.capacity_factor=1.0"])
def test_nan_in_router_logits_skips_one_step_on_all(
    layout: str, license_corpus: Path, tmp_path: Path
) -> None:
    """Also the router's own state stays: the bias does not move by the choices of such a step."""
    ended = run_forked(
        tmp_path, f"data.sources=[{{path: {license_corpus}}}]", "train.steps=4", "router.balancing=bias",
        "checkpoint.every=1", "checkpoint.keep=null", layout, processes=2,
        fault=partial(nan_in_router, 2, 2 * 2 + 1, 1),
    )  # fmt: skip
    assert ended.codes == [0, 0], ended.said
    assert [record["skipped"] for record in lines(tmp_path)] == [0, 0, 1, 0]
    assert ["schedule.decay_tokens=8192 is more than" in said for said in ended.said] == [True, False]
    second, third, fourth = (tensors(tmp_path / f"checkpoints/step-{step}") for step in (2, 3, 4))
    assert any("router.bias.2" in key for key in second)
    assert all(np.array_equal(second[key], third[key]) for key in second)
    assert not any(np.array_equal(third[key], fourth[key]) for key in third if "router.bias" in key)
    progress = [
        json.loads((tmp_path / f"checkpoints/step-{step}/manifest.json").read_text())["progress"]
        for step in (2, 3, 4)
    ]
    assert [each["optimizer_steps"] for each in progress] == [2, 2, 3]
    assert [each["step"] for each in progress] == [2, 3, 4]
    (warning,) = [line for said in ended.said for line in said.splitlines() if "non-finite on" in line]
    assert warning in ended.said[1]
    found = re.search(
        r"step 3: non-finite on rank 1: loss of micro-batch 1, rows \[7\] of the step "
        r"\(data.sources\[0\] document (\d+)\)$",
        warning,
    )
    assert found, warning
    assert int(found[1]) == document_at(license_corpus, step=3, row=7, place=70)


def document_at(corpus: Path, *, step: int, row: int, place: int) -> int:
    """The document at a place of a row, read by a loader of one rank."""
    loader = Loader(
        [TokenDataset(str(corpus))], DataConfig(sources=[SourceConfig(path=str(corpus))]), split="train",
        shape=Shape(128, 8, 8), rank=0, size=1, seed=0, vocab_size=512,
    )  # fmt: skip
    for _ in range(step):
        prepared = loader.prepare(Shape(128, 8, 8), loader.mixture)
    starts = prepared.batches[0].offsets[row].tolist()
    index = max(i for i, start in enumerate(starts) if start <= place)
    source, document = prepared.documents[0][row][index]
    assert source == 0
    dataset = TokenDataset(str(corpus))
    tokens = np.empty(int(dataset.document_lengths[document]), np.int64)
    dataset.read(int(document), 0, tokens)
    assert int(prepared.batches[0].tokens[row, place]) in tokens.tolist()
    return int(document)


def test_a_resumed_run_judges_spikes_alike(license_corpus: Path, tmp_path: Path) -> None:
    overrides = [f"data.sources=[{{path: {license_corpus}}}]", *SPIKY, "health.on_spike=skip"]
    spike = {"numbers": [4 * 7], "factor": "1000"}
    for steps in ("train.steps=9", "train.steps=9"):
        result = poisoned_run(tmp_path, *overrides, steps, **spike)
        assert result.returncode == 0, result.stderr
        assert "step 8: spike, skipped" in result.stdout, result.stderr
        if not (tmp_path / "whole").exists():
            shutil.copytree(tmp_path / "run", tmp_path / "whole")
            for step in (7, 8, 9):
                shutil.rmtree(tmp_path / f"run/checkpoints/step-{step}")
    for key in ("loss", "grad_norm", "spike_score", "skipped"):
        assert column(tmp_path / "run", key).tolist() == column(tmp_path / "whole", key).tolist()
    first, second = (tensors(tmp_path / f"{name}/checkpoints/step-9") for name in ("run", "whole"))
    assert all(np.array_equal(first[key], second[key]) for key in first)
    assert health_at(tmp_path / "run", 9) == health_at(tmp_path / "whole", 9)


def test_the_window_holds_finite_unskipped_values() -> None:
    """A NaN does not blind the policy; under `log` a spike is part of what is usual from then on."""
    health = Health(HealthConfig(window=4, on_spike=OnSpike.skip))
    for loss in (1.0, 1.1, float("nan"), 1.0, 1.1):
        health.judge(loss, 1.0)
    assert list(health.windows["loss"]) == [1.0, 1.1, 1.0, 1.1]
    verdict = health.judge(1.2, 1.0)
    assert not verdict.skipped
    assert verdict.score == pytest.approx(3.0)
    verdict = health.judge(5.0, 1.0)
    assert verdict.skipped
    assert verdict.spike is not None
    assert "loss 5 is" in verdict.spike
    verdict = health.judge(1.1, 2.0)
    assert verdict.skipped
    assert verdict.spike is not None
    assert "grad_norm 2 is" in verdict.spike
    assert list(health.windows["loss"]) == [1.1, 1.0, 1.1, 1.2]
    assert health.skips_in_row == 2
    assert health.judge(0.1, 1.0).spike is None, "below the mean is no spike"
    health = Health(HealthConfig(window=4))
    verdicts = [health.judge(loss, 1.0) for loss in (1.0, 1.1, 5.0)]
    assert not any(verdict.skipped for verdict in verdicts)
    assert verdicts[-1].spike
    assert list(health.windows["loss"]) == [1.0, 1.1, 5.0]


def level(health: Health, mean: float, steps: int) -> list[str | None]:
    """What was a spike in so many steps around a loss."""
    pairs = [(mean * (1 + 0.01 * math.sin(step)), 1 + 0.01 * math.cos(step)) for step in range(steps)]
    return [health.judge(*pair).spike for pair in pairs]


def test_clipping_follows_a_level_that_changes_for_good() -> None:
    health = Health(HealthConfig(on_spike=OnSpike.clip))
    assert not any(level(health, 2.0, 500))
    spikes = level(health, 4.0, 500)
    assert all(spikes[:10])
    assert not any(spikes[50:])
    verdict = health.judge(40.0, 1.0)
    assert not verdict.skipped, "what is far off is still a spike"
    assert verdict.spike, "what is far off is still a spike"


def test_skipping_ends_where_a_level_changes_for_good() -> None:
    health = Health(HealthConfig(on_spike=OnSpike.skip))
    level(health, 2.0, 500)
    for number in range(10):
        verdict = health.judge(4.0, 1.0)
        assert verdict.skipped, number
        assert not verdict.gave_up, number
    verdict = health.judge(4.0, 1.0)
    assert not verdict.skipped
    assert verdict.spike is not None
    assert verdict.spike.endswith("; 10 in a row were skipped, so this is the new level")
    assert list(health.windows["loss"]) == [4.0]
    assert health.skips_in_row == 0
    assert not any(level(health, 4.0, 500))
    for number in range(10):
        verdict = health.judge(4.0 if number < 9 else float("nan"), 1000.0)
        assert verdict.skipped
    assert verdict.gave_up is not None
    assert verdict.gave_up.startswith("10 steps in a row"), "the last was not finite"


def test_judging_without_a_limit_goes_on() -> None:
    health = Health(HealthConfig(max_skips_in_row=None))
    verdicts = [health.judge(float("nan"), 1.0) for _ in range(50)]
    assert all(verdict.skipped and not verdict.gave_up for verdict in verdicts)
    health = Health(HealthConfig(max_skips_in_row=2))
    verdicts = [health.judge(*pair) for pair in ((1.0, float("inf")), (1.0, 1.0), (float("nan"), 1.0))]
    assert [verdict.skipped for verdict in verdicts] == [True, False, True]
    assert not any(verdict.gave_up for verdict in verdicts)
    verdict = health.judge(1.0, float("nan"))
    assert verdict.skipped
    assert verdict.gave_up is not None
    assert verdict.gave_up.startswith("2 steps in a row")


def test_find_non_finite_names_few_of_many() -> None:
    losses = [torch.tensor([[1.0, float("nan")], [1.0, 1.0]])] * 8
    found = find_non_finite(losses, [], dp=Axis("dp", 2, (0, 1, 2)), micro_rows=2)
    assert found is not None
    assert found.startswith("loss of micro-batch 0, rows [4] of the step; loss of micro-batch 1, rows [10]")
    assert found.endswith(" and 3 more")
    assert find_non_finite([torch.ones(2, 2)], [], dp=Axis("dp", 0, (0,)), micro_rows=2) is None


def test_limits_are_checked() -> None:
    for key, value in (("max_skips_in_row", 0), ("window", 3), ("spike_sigmas", 0.0)):
        with pytest.raises(ValueError, match=rf"health.{key}={value} must be"):
            HealthConfig(**{key: value})
