"""The ends of a run's data, steps and dashboards: what stands in the run directory afterwards."""

import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from parallel.collectives import Axis
from tests.support.forked import run_forked
from tests.support.runs import column, ending, lines, tensors
from train.checkpoint.contents import CheckpointConfig, SaveMode
from train.checkpoint.saving import Saver
from train.checkpoint.storage import Box
from train.monitor.tracing import ProfileConfig


def source(corpus: Path, **more: float) -> str:
    fields = ", ".join([f"path: {corpus}", *(f"{key}: {value}" for key, value in more.items())])
    return f"data.sources=[{{{fields}}}]"


def steps_in(run_dir: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in run_dir.glob("checkpoints/step-*"))


def same(first: Path, second: Path, step: int) -> bool:
    a, b = (tensors(each / f"checkpoints/step-{step}") for each in (first, second))
    return a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)


def test_exhausted_data_end_the_run_after_a_save(license_corpus: Path, tmp_path: Path) -> None:
    """Twice at the same step with the same bits; with more epochs the same command goes on."""
    ended = {}
    for name in ("first", "second"):
        result = run_forked(
            tmp_path / name, source(license_corpus, max_epochs=1.0), "train.steps=50", processes=2
        )
        assert result.codes == [2, 2], result.said
        kind, facts = ending(tmp_path / name)
        ended[name] = step = lines(tmp_path / name)[-1]["step"]
        assert kind == "FAILED"
        assert facts["code"] == 2
        assert facts["reason"].endswith(f"step {step} is saved")
        assert "raise data.sources[*].max_epochs" in facts["reason"]
        assert steps_in(tmp_path / name) == [step]
    step = ended["first"]
    assert 1 < step < 48
    assert ended["second"] == step
    assert same(tmp_path / "first", tmp_path / "second", step)
    result = run_forked(tmp_path / "first", source(license_corpus), f"train.steps={step + 2}", processes=2)
    assert result.codes == [0, 0], result.said
    assert [record["step"] for record in lines(tmp_path / "first")] == list(range(1, step + 3))


@pytest.mark.parametrize(("steps", "saved"), [(5, [2, 4, 5]), (4, [2, 4])], ids=["no multiple", "both due"])
def test_the_last_step_is_saved_once_and_again_changes_nothing(
    steps: int, saved: list[int], license_corpus: Path, tmp_path: Path
) -> None:
    overrides = [source(license_corpus), f"train.steps={steps}", "checkpoint.every=2", "checkpoint.keep=null"]
    seen = []
    for _ in range(2):
        result = run_forked(tmp_path, *overrides, processes=1)
        assert result.codes == [0], result.said
        assert steps_in(tmp_path) == saved, result.said
        saves = {path: path.stat().st_mtime_ns for path in tmp_path.glob("checkpoints/*/*.safetensors")}
        seen.append((saves, [(tmp_path / name).read_bytes() for name in ("metrics.jsonl", "experts.jsonl")]))
        assert result.said[0].count(f"saved {tmp_path}/checkpoints/step-{steps}") == 2 - len(seen)
    assert seen[0] == seen[1]
    assert ending(tmp_path)[0] == "DONE"


def stopped_in(name: str, rank: int) -> None:
    """A fault for run_forked: a rank gets SIGTERM while it builds the run."""
    build = import_module("train.build")
    inner = getattr(build, name)

    def signalled(*arguments: Any, **named: Any) -> Any:
        if rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return inner(*arguments, **named)

    setattr(build, name, signalled)


def test_a_stop_before_the_first_step_costs_no_step(license_corpus: Path, tmp_path: Path) -> None:
    """One rank is asked while the run is built, afresh and at a resume: nothing is done or saved."""
    arguments = [source(license_corpus), "checkpoint.every=2", "log.every=1"]
    for step, name in ((0, "build_model"), (2, "load_checkpoint")):
        if step:
            assert run_forked(tmp_path, *arguments, "train.steps=2", processes=2).codes == [0, 0]
        files = [tmp_path / "metrics.jsonl", *tmp_path.glob("checkpoints/*/*")]
        before = [(path.stat().st_mtime_ns, path.read_bytes()) for path in files if path.exists()]
        result = run_forked(
            tmp_path, *arguments, "train.steps=4", processes=2, fault=partial(stopped_in, name)
        )
        assert result.codes == [75, 75], result.said
        reason = "another rank was asked to stop before the first step of this start"
        assert ending(tmp_path) == ("REQUEUE", {"code": 75, "step": step, "reason": reason})
        assert steps_in(tmp_path) == ([2] if step else [])
        assert [(path.stat().st_mtime_ns, path.read_bytes()) for path in files if path.exists()] == before


def fails_while_it_saves(rank: int) -> None:
    """A fault for run_forked: rank 1 fails in step 3; step 2's save lasts until that rank waits for it."""
    storage, loop = import_module("train.checkpoint.storage"), import_module("train.loop")
    inner, settle, waits = loop.train_step, Saver.settle, threading.Event()

    def step(run: Any, batches: Any) -> Any:
        if rank == 1 and run.progress.step == 2:
            raise RuntimeError("out of luck")
        return inner(run, batches)

    def noted(self: Saver, limit_s: float | None) -> None:
        waits.set()
        settle(self, limit_s)

    loop.train_step, Saver.settle = step, noted  # type: ignore[method-assign]
    if rank == 1:
        storage.failpoint = lambda name: name == "mid_shard" and waits.wait(60)


def test_a_run_that_fails_keeps_the_save_in_flight(license_corpus: Path, tmp_path: Path) -> None:
    arguments = [source(license_corpus), "checkpoint.mode=async", "checkpoint.every=2", "train.steps=4"]
    result = run_forked(tmp_path, *arguments, processes=2, fault=fails_while_it_saves)
    assert result.codes == [1, 1], result.said
    assert "out of luck" in result.said[1], result.said
    assert steps_in(tmp_path) == [2]
    assert run_forked(tmp_path, *arguments, processes=2).codes == [0, 0]
    assert [record["step"] for record in lines(tmp_path)] == [1, 2, 3, 4]


def test_a_save_that_hangs_does_not_keep_a_failed_run(tmp_path: Path) -> None:
    root, hangs = tmp_path / "checkpoints", threading.Event()
    saver = Saver(root, CheckpointConfig(), Axis("world", 0, (0,)), step=0)
    with mock.patch("train.checkpoint.storage.failpoint", side_effect=lambda name: hangs.wait(20)):
        saver.save(1, {"x": Box(torch.ones(2), (2,), (0,))}, {"step": 1}, SaveMode["async"])
        saver.settle(0.01)
        assert not steps_in(tmp_path)
        hangs.set()
        saver.wait()
    assert steps_in(tmp_path) == [1]


def wandb_is_missing(rank: int) -> None:
    sys.modules["wandb"] = None  # type: ignore[assignment]


def wandb_is_down(rank: int) -> None:
    mock.patch("wandb.init", side_effect=ConnectionError("no route to host")).start()


def wandb_has_no_room(rank: int) -> None:
    mock.patch("wandb.sdk.wandb_run.Run.log", side_effect=OSError(28, "No space left on device")).start()


@pytest.mark.parametrize("fault", [wandb_is_missing, wandb_is_down, wandb_has_no_room])
def test_wandb_cannot_harm_a_run(fault: Callable[[int], None], license_corpus: Path, tmp_path: Path) -> None:
    overrides = [source(license_corpus), "train.steps=3", "log.every=1"]
    assert run_forked(tmp_path / "plain", *overrides, processes=1).codes == [0]
    mode = "offline" if fault is wandb_has_no_room else "online"
    result = run_forked(tmp_path / "run", *overrides, f"wandb.mode={mode}", processes=1, fault=fault)
    assert result.codes == [0], result.said
    assert result.said[0].count("wandb is off") == 1
    for name in ("metrics", "experts"):
        assert [line["step"] for line in lines(tmp_path / "run", name)] == [1, 2, 3]
    assert column(tmp_path / "run", "loss").tolist() == column(tmp_path / "plain", "loss").tolist()
    assert same(tmp_path / "run", tmp_path / "plain", 3)
    assert ending(tmp_path / "run")[0] == "DONE"


def test_a_trace_has_the_steps_that_were_asked_for(license_corpus: Path, tmp_path: Path) -> None:
    result = run_forked(
        tmp_path,
        source(license_corpus),
        "train.steps=4",
        "profile.steps=[2,9]",
        "model.num_layers=2",
        processes=2,
    )
    assert result.codes == [0, 0], result.said
    for rank in range(2):
        trace = json.loads((tmp_path / f"profile/rank-0000{rank}-steps-2-4.json").read_text())
        names = [event.get("name") for event in trace["traceEvents"]]
        assert {name for name in names if str(name).startswith("step ")} == {"step 2", "step 3", "step 4"}
        assert "aten::mm" in names
    with pytest.raises(ValueError, match=r"profile.steps=\[3, 3\] must be \[a, b\] with 1 <= a < b"):
        ProfileConfig(steps=[3, 3])
