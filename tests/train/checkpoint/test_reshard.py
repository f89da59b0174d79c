"""R8: what a run takes along to another layout besides weights and moments."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.support.forked import run_forked
from tests.support.runs import column, lines, tensors


@pytest.fixture(scope="module")
def whole(license_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """Six steps of one process, saved after three, and what was asked for."""
    run_dir = tmp_path_factory.mktemp("reshard")
    asked = [
        f"data.sources=[{{path: {license_corpus}}}]", "train.steps=6", "log.every=1", "train.dtype=fp32",
        "checkpoint.every=3", "checkpoint.keep=null", "batch.micro_rows=4", "router.balancing=bias",
        "router.bias_update_rate=0.01", "router.jitter=0.1",
    ]  # fmt: skip
    ended = run_forked(run_dir, *asked, processes=1)
    assert ended.codes == [0], ended.said
    return run_dir, asked


def biases(checkpoint: Path) -> dict[str, list[float]]:
    """Of the routers, by the name of the tensor, whatever file it is in."""
    found = {
        key[key.index("router.") :]: value
        for key, value in tensors(checkpoint).items()
        if "router.bias" in key
    }
    return {key: value.tolist() for key, value in found.items()}


@pytest.mark.parametrize(
    "layout",
    [
        ["parallel.tp=2", "parallel.ep=2"],
        pytest.param(["parallel.pp=2"], marks=pytest.mark.faults),
        pytest.param(["parallel.cp=2", "parallel.zero_stage=3"], marks=pytest.mark.faults),
    ],
    ids=" ".join,
)
def test_clocks_rng_and_router_bias_come_along(
    layout: list[str], whole: tuple[Path, list[str]], tmp_path: Path
) -> None:
    """From one process's step 3 on two ranks: rates, noise and biases of the uninterrupted run."""
    first, asked = whole
    shutil.copytree(first, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/step-6")
    ended = run_forked(tmp_path / "run", *asked, *layout, processes=2)
    assert ended.codes == [0, 0], ended.said
    assert "resumed from" in ended.said[0], ended.said
    rates = column(first, "lr")
    assert len(set(rates.tolist())) > 3
    assert column(tmp_path / "run", "lr").tolist() == rates.tolist()
    for key in ("tokens", "loss", "grad_norm"):
        np.testing.assert_allclose(column(tmp_path / "run", key), column(first, key), rtol=1e-5)
    loads = [[line["load"] for line in lines(each, "experts")] for each in (tmp_path / "run", first)]
    assert loads[0] == loads[1]
    mine, truth = (biases(each / "checkpoints/step-6") for each in (tmp_path / "run", first))
    assert len(truth) == 4
    assert mine == truth
    assert all(map(any, truth.values()))
