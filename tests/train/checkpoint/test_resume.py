"""R9: save and resume give bitwise what the uninterrupted run gives, on each kind of layout and mode."""

import os
import signal
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

from data.packing import Batch
from tests.support.forked import run_forked
from tests.support.runs import outcome, tensors
from train.build import Run
from train.step import StepResult

FAULTS = pytest.mark.faults
CASES = [
    pytest.param(1, [], id="plain, accumulating"),
    pytest.param(2, ["parallel.ep=2", "router.capacity_factor=0.7"], id="drops"),
    pytest.param(2, ["parallel.pp=2"], id="pp", marks=FAULTS),
    pytest.param(2, ["parallel.pp=2", "parallel.schedule=zbv"], id="pp zbv", marks=FAULTS),
    pytest.param(2, ["parallel.cp=2"], id="cp", marks=FAULTS),
    pytest.param(2, ["parallel.zero_stage=3"], id="zero 3", marks=FAULTS),
    pytest.param(
        2, ["router.balancing=bias", "router.bias_update_rate=0.01"], id="router bias", marks=FAULTS
    ),
    pytest.param(
        4,
        ["parallel.tp=2", "parallel.ep=2", "parallel.etp=2", "router.jitter=0.1"],
        id="tp etp",
        marks=FAULTS,
    ),
    pytest.param(
        2, ["checkpoint.mode=async", "checkpoint.every=1", "checkpoint.keep=null"], id="async", marks=FAULTS
    ),
    pytest.param(1, ["data.packing=best_fit", "health.on_spike=clip"], id="best fit", marks=FAULTS),
]


def stop_at(last: int, signalled: int) -> Callable[[int], None]:
    """One rank gets SIGTERM during a step, which nobody notices if it is the run's last."""

    def fault(rank: int) -> None:
        loop = import_module("train.loop")
        real = loop.train_step

        def step(run: Run, batches: Sequence[Batch]) -> StepResult:
            if run.progress.step + 1 == last and rank == signalled:
                os.kill(os.getpid(), signal.SIGTERM)
            return real(run, batches)

        loop.train_step = step  # in this process, which ends with the run

    return fault


@pytest.mark.parametrize(("processes", "overrides"), CASES)
def test_resumed_is_bitwise_the_uninterrupted(
    processes: int, overrides: list[str], license_corpus: Path, tmp_path: Path
) -> None:
    """Eight steps, and three, two and three, each in processes of their own, ended by a real signal."""
    common = [f"data.sources=[{{path: {license_corpus}}}]", "train.steps=8", *overrides]
    runs = {"whole": [(8, 0)], "cut": [(3, 75), (5, 75), (8, 0)]}
    for name, parts in runs.items():
        for last, code in parts:
            fault = stop_at(last, processes - 1)
            ended = run_forked(tmp_path / name, *common, processes=processes, fault=fault)
            assert ended.codes == [code] * processes, "\n".join(ended.said)
    whole, cut = (outcome(tmp_path / name) for name in runs)
    assert [record["step"] for record in cut["records"]] == list(range(1, 9))
    for key, value in whole.items():
        assert cut[key] == value, key
    first, second = (tensors(tmp_path / name / "checkpoints/step-8") for name in runs)
    assert first.keys() == second.keys()
    assert any("exp_avg_sq" in key for key in first)
    for key, value in first.items():
        np.testing.assert_array_equal(second[key], value, err_msg=key)
