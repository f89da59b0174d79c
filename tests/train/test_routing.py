"""Routing in the program itself: records that agree with each other, biases that survive a stop."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.support.forked import pretrain
from tests.support.runs import column, lines, tensors

LAYERS, EXPERTS, CHOICES = 4, 4, 2 * 1024
RATE = 0.01


@pytest.fixture(scope="module")
def base(license_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """Eight steps in one process, saved in the middle, and the overrides that made them."""
    run_dir = tmp_path_factory.mktemp("runs") / "base"
    overrides = [
        "conf=debug",
        f"data.sources=[{{path: {license_corpus}}}]",
        "batch.micro_rows=4",
        "train.steps=8",
        "checkpoint.every=4",
        "router.capacity_factor=1.0",
        "router.balancing=bias",
        f"router.bias_update_rate={RATE}",
        "router.aux_scope=global_batch",
    ]
    pretrain(*overrides, f"run_dir={run_dir}")
    return run_dir, overrides


def biases(checkpoint: Path) -> dict[str, np.ndarray]:
    """By layer's name, from the file that the manifest names; each is saved whole and once."""
    entries = json.loads((checkpoint / "manifest.json").read_text())["tensors"]
    found = {}
    for key, entry in entries.items():
        if key.startswith("router."):
            (part,) = entry["parts"]
            assert entry["shape"] == part["shape"] == [EXPERTS]
            assert part["offset"] == [0]
            found[key] = load_file(checkpoint / part["file"])[key]
    return found


def back_to_step_4(run_dir: Path, target: Path) -> Path:
    shutil.copytree(run_dir, target)
    shutil.rmtree(target / "checkpoints/step-8")
    return target


def check_records(run_dir: Path) -> None:
    """metrics.jsonl is the summary of experts.jsonl; capacity 1.0 drops; one EP group moves nothing."""
    for record, experts in zip(lines(run_dir), lines(run_dir, "experts"), strict=True):
        load, dropped, moved = (np.array(experts[key]) for key in ("load", "dropped", "moved"))
        assert load.shape == dropped.shape == (LAYERS, EXPERTS)
        assert moved.shape == (LAYERS,)
        assert load.sum(1).tolist() == [CHOICES] * LAYERS
        assert (dropped >= 0).all()
        assert (dropped <= load).all()
        # What is above an equal share of a step is above it in some micro-batch, too.
        assert (dropped >= load - CHOICES / EXPERTS).all()
        assert dropped.any()
        assert not moved.any()
        assert record["moved_rate"] == 0
        violation = load.max(1) / load.mean(1) - 1
        assert experts["max_violation"] == pytest.approx(violation.tolist())
        assert record["max_violation"] == pytest.approx(violation.max())
        assert record["drop_rate"] == pytest.approx(dropped.sum() / load.sum())
        assert record["aux_loss"] == pytest.approx(np.mean(experts["aux_loss"]))
        assert record["router_entropy"] == pytest.approx(np.mean(experts["entropy"]))
        assert 0.8 < record["aux_loss"] < EXPERTS
        assert 0 < record["router_entropy"] <= np.log(EXPERTS)


def test_records_agree(base: tuple[Path, list[str]]) -> None:
    check_records(base[0])


def test_biases_are_saved_and_follow_the_load(base: tuple[Path, list[str]]) -> None:
    """Each step moves them by the rate, away from what the record of the step has too much of."""
    run_dir, _ = base
    load = np.array([line["load"] for line in lines(run_dir, "experts")])
    for step in (4, 8):
        found = biases(run_dir / f"checkpoints/step-{step}")
        assert set(found) == {f"router.bias.{layer}" for layer in range(LAYERS)}
        expected = RATE * np.sign(CHOICES / EXPERTS - load[:step]).sum(0)
        for layer in range(LAYERS):
            np.testing.assert_allclose(found[f"router.bias.{layer}"], expected[layer], atol=1e-6)
        assert expected.any(1).all()


def test_resumed_run_is_bitwise_the_uninterrupted_one(base: tuple[Path, list[str]], tmp_path: Path) -> None:
    run_dir, overrides = base
    again = back_to_step_4(run_dir, tmp_path / "run")
    pretrain(*overrides, f"run_dir={again}")
    for key in ("loss", "grad_norm", "aux_loss", "drop_rate"):
        assert column(again, key).tolist() == column(run_dir, key).tolist()
    assert lines(again, "experts") == lines(run_dir, "experts")
    first, second = (tensors(path / "checkpoints/step-8") for path in (run_dir, again))
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize(
    "layout",
    [["parallel.ep=2", "batch.micro_rows=2", "train.recompute=full"], ["parallel.pp=2"]],
    ids=" ".join,
)
def test_another_layout_goes_on(layout: list[str], base: tuple[Path, list[str]], tmp_path: Path) -> None:
    """From one process's step 4 on two ranks: the same losses, loads, drops and biases."""
    run_dir, overrides = base
    again = back_to_step_4(run_dir, tmp_path / "run")
    pretrain(*overrides, *layout, f"run_dir={again}", processes=2)
    np.testing.assert_allclose(column(again, "loss"), column(run_dir, "loss"), rtol=1e-5)
    np.testing.assert_allclose(column(again, "aux_loss"), column(run_dir, "aux_loss"), rtol=1e-5)
    for key in ("load", "dropped"):
        assert [line[key] for line in lines(again, "experts")] == [
            line[key] for line in lines(run_dir, "experts")
        ]
    check_records(again)
    mine, theirs = (biases(path / "checkpoints/step-8") for path in (again, run_dir))
    assert mine.keys() == theirs.keys()
    assert all(np.array_equal(mine[key], theirs[key]) for key in mine)
