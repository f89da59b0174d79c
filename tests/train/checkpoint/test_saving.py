"""Saves that are killed, broken off and starved: what was safe before stays safe, bit for bit."""

import errno
import json
import multiprocessing
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor
from torch.torch_version import TorchVersion

from parallel.collectives import Axis
from parallel.launch import launcher_grace_s
from tests.support import disks
from tests.support.dist import _enter, run_distributed
from train.checkpoint.contents import CheckpointConfig, SaveMode
from train.checkpoint.restore import verify
from train.checkpoint.saving import Saver
from train.checkpoint.storage import Box, sweep

LEADER = [
    "start", "reported", "folder_made", "mid_shard", "after_shard", "reported 2", "gathered",
    "manifest_written", "before_rename", "after_rename", "mid_retention",
]  # fmt: skip
"""Failpoints in their order; `reported` is passed twice in a save."""
OTHER = ["start", "reported", "mid_shard", "after_shard", "reported 2"]
POINTS = [(0, point) for point in LEADER] + [(1, point) for point in OTHER]
SAFE = ["after_rename", "mid_retention"]
"""From here on, the step is saved."""


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail() -> None:
    raise RuntimeError("injected")


def fill() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


FAULTS: dict[str, Callable[[], None]] = {"kill": kill, "exception": fail, "ENOSPC": fill}
MODES = ["sync", "async"]


def cases(kinds: Sequence[str], points: Sequence[tuple[int, str]]) -> list[tuple[str, str, int, str]]:
    """An exception between two collectives is a death: no code of ours runs there."""
    return [
        (mode, kind, rank, point)
        for mode in MODES
        for kind in kinds
        for rank, point in points
        if kind == "kill" or not point.startswith("reported")
    ]


def arm(point: str, fault: Callable[[], None]) -> None:
    """Let a fault strike when this process passes a point, the second time where its name says so."""
    name, _, count = point.partition(" ")
    left = [int(count or 1)]

    def strike(passed: str) -> None:
        if passed == name:
            left[0] -= 1
            if left[0] == 0:
                fault()

    replace_failpoint(strike)


def replace_failpoint(function: Callable[[str], None]) -> None:
    """For the rest of this process."""
    for module in ("train.checkpoint.storage", "train.checkpoint.saving"):
        mock.patch(f"{module}.failpoint", function).start()


def disarm() -> None:
    mock.patch.stopall()


def axis(rank: int) -> Axis:
    return Axis("saving", rank, (0, 1), dist.new_group(backend="gloo", timeout=timedelta(seconds=60)))


def state(rank: int, step: int) -> dict[str, Tensor]:
    """A rank's half of a matrix, and something only rank 0 has."""
    torch.manual_seed(step)
    whole = torch.randn(8, 3)
    return {"w": whole[4 * rank :][:4].clone()} | ({"bias": torch.randn(5)} if rank == 0 else {})


def boxes(values: dict[str, Tensor], rank: int) -> dict[str, Box]:
    places = {"w": ((8, 3), (4 * rank, 0)), "bias": ((5,), (0,))}
    return {name: Box(tensor, *places[name]) for name, tensor in values.items()}


def save(saver: Saver, rank: int, step: int, mode: str) -> list[str]:
    """A save, with training's own collectives and updates beside it; what failed."""
    values = state(rank, step)
    saver.save(step, boxes(values, rank), {"step": step}, SaveMode[mode])
    for tensor in values.values():
        tensor.fill_(float("nan"))  # the next step's update
    dist.all_reduce(torch.zeros(3))
    saver.wait()
    return saver.read_failures()


def problems(root: Path, steps: Sequence[int]) -> list[str]:
    """What differs from exactly these steps, whole and bit-exact."""
    found = sorted(path.name for path in root.iterdir())
    wrong = [] if found == sorted(f"step-{step}" for step in steps) else [f"folders {found}"]
    for step in steps:
        folder = root / f"step-{step}"
        wrong += verify(folder)
        for rank in (0, 1):
            held = load_file(folder / f"rank-0000{rank}.safetensors")
            expected = state(rank, step)
            if held.keys() != expected.keys() or any(not torch.equal(held[k], expected[k]) for k in held):
                wrong.append(f"{folder}: rank {rank} has other values")
    return wrong


def three_good_then(rank: int, root: Path, mode: str, kind: str, at: int, point: str) -> None:
    saver = Saver(root, CheckpointConfig(keep=2), axis(rank), step=0)
    for step in (1, 2, 3):
        assert save(saver, rank, step, mode) == []
    if rank == at:
        arm(point, FAULTS[kind])
    failures = save(saver, rank, 4, mode)
    disarm()
    if rank == 0:
        assert not list(root.glob(".tmp-*"))  # at once, not only at the next start
    assert kind != "kill" or point == "reported 2", "a dead rank was not noticed"
    if point == "mid_retention":
        assert failures == []
        assert saver.saved_step == 4
    else:
        (text,) = failures  # the same on both ranks
        assert text.startswith(f"checkpoint 4 failed: rank {at}: "), text
        assert text.endswith("; the last good one is step 3")
        assert saver.saved_step == 3
        reason = {"exception": "RuntimeError: injected", "ENOSPC": "No space left"}[kind]
        assert reason in text, text
    assert save(saver, rank, 5, mode) == []
    assert saver.saved_step == 5


def next_start(rank: int, root: Path, steps: Sequence[int], options: Sequence[Sequence[int]]) -> None:
    """Sweep, look what is there, save once more."""
    if rank == 0:
        sweep(root)
        found = [problems(root, steps) for steps in options]
        assert [] in found, found
    dist.barrier()
    saver = Saver(root, CheckpointConfig(keep=1), axis(rank), step=3)
    assert save(saver, rank, 9, "sync") == []
    if rank == 0:
        assert problems(root, [9]) == []


def end_within(seconds: float, processes: Sequence[Any]) -> list[int]:
    """Exit codes; a process that still runs is a hang."""
    deadline = time.monotonic() + seconds
    for process in processes:
        process.join(max(0, deadline - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return codes


def strike(tmp_path: Path, mode: str, kind: str, rank: int, point: str) -> None:
    root = tmp_path / "checkpoints"
    arguments = (root, mode, kind, rank, point)
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=_enter, args=(r, three_good_then, 2, tmp_path / "store", arguments))
        for r in (0, 1)
    ]
    for process in processes:
        process.start()
    codes = end_within(10, processes)
    if kind != "kill":
        assert codes == [0, 0]
        options = [[4, 5]] if point in SAFE else [[3, 5]]
    else:
        assert codes[rank] == -signal.SIGKILL, codes
        assert codes[1 - rank] not in (0, None), codes
        kept = {"before": [[2, 3]], "after_rename": [[2, 3, 4]], "mid_retention": [[3, 4]]}
        options = kept.get(point, kept["before"])
        if (rank, point) == (1, "reported 2"):  # the leader may have all it needs by then
            options = [[2, 3], [2, 3, 4], [3, 4]]
    run_distributed(next_start, 2, root, [], options)


SAMPLE = [
    ("async", "kill", 1, "mid_shard"), ("sync", "kill", 0, "before_rename"),
    ("async", "exception", 1, "after_shard"), ("sync", "ENOSPC", 0, "mid_shard"),
]  # fmt: skip


@pytest.mark.parametrize("case", SAMPLE, ids=lambda case: "-".join(map(str, case)))
def test_a_save_that_is_struck_loses_nothing(case: tuple[str, str, int, str], tmp_path: Path) -> None:
    strike(tmp_path, *case)


@pytest.mark.faults
@pytest.mark.parametrize("case", cases(list(FAULTS), POINTS), ids=lambda case: "-".join(map(str, case)))
def test_every_point_of_every_rank(case: tuple[str, str, int, str], tmp_path: Path) -> None:
    strike(tmp_path, *case)


@pytest.fixture(name="small_disk")
def _small_disk(tmp_path: Path) -> Iterator[Path]:
    with disks.small_disk(tmp_path / "disk", mebibytes=1) as disk:
        yield disk


def on_a_full_disk(rank: int, disk: Path, mode: str) -> None:
    root = disk / "checkpoints"
    saver = Saver(root, CheckpointConfig(keep=None), axis(rank), step=0)
    assert save(saver, rank, 1, mode) == []
    if rank == 0:
        disks.fill(disk)
    (early,) = save(saver, rank, 2, mode)
    room = r"No space left: need \S+e-0\d GiB, have 0"
    assert re.fullmatch(rf"checkpoint 2 failed: rank 0: {room}: {root}; the last good one is step 1", early)
    if rank == 0:
        (disk / "filler").unlink()
        arm("folder_made", lambda: disks.fill(disk))  # after the look at the room
    (late,) = save(saver, rank, 3, mode)
    assert re.match(rf"checkpoint 3 failed: rank 0: {room}: {root}/\S+/rank-00000.safetensors; ", late), late
    if rank == 0:
        (disk / "filler").unlink()
    assert save(saver, rank, 4, mode) == []
    if rank == 0:
        assert problems(root, [1, 4]) == []


@pytest.mark.parametrize("mode", MODES)
def test_a_full_disk_is_survived_and_says_how_much_is_missing(mode: str, small_disk: Path) -> None:
    run_distributed(on_a_full_disk, 2, small_disk, mode)


def forbidden(disk: Path, on: bool) -> None:
    """Take the right to write away from others than root, and root's rights from this process."""
    if os.getuid() == 0:
        os.seteuid(65534 if on else 0)
    else:
        (disk / "checkpoints").chmod(0o555 if on else 0o755)


def read_only(disk: Path, on: bool) -> None:
    subprocess.run(["mount", "-o", f"remount,{'ro' if on else 'rw'}", str(disk)], check=True)


def where_writing_is_refused(rank: int, disk: Path, refuse: Callable[[Path, bool], None], says: str) -> None:
    root = disk / "checkpoints"
    saver = Saver(root, CheckpointConfig(), axis(rank), step=0)
    assert save(saver, rank, 1, "sync") == []
    if rank == 0:
        refuse(disk, True)
    (text,) = save(saver, rank, 2, "async")
    assert re.match(rf"checkpoint 2 failed: rank 0: {says}: {root}/\.tmp-step-2-\w+; ", text), text
    if rank == 0:
        refuse(disk, False)
    assert save(saver, rank, 3, "sync") == []
    if rank == 0:
        assert problems(root, [1, 3]) == []


@pytest.mark.parametrize(
    ("refuse", "says"),
    [(forbidden, "Permission denied"), (read_only, "Read-only file system")],
    ids=["EACCES", "EROFS"],
)
def test_a_folder_that_takes_nothing_is_named(
    refuse: Callable[[Path, bool], None], says: str, small_disk: Path
) -> None:
    for folder in small_disk.parents:
        if folder.stat().st_mode & 0o777 == 0o700 and os.getuid() == 0:
            folder.chmod(0o711)  # so that a user without rights gets as far as the folder
    run_distributed(where_writing_is_refused, 2, small_disk, refuse, says)


def alone(root: Path, *, step: int = 0, grace_s: float | None = None, **config: Any) -> Saver:
    return Saver(root, CheckpointConfig(**config), Axis("saving", 0, (0,)), step=step, grace_s=grace_s)


def test_retention_keeps_the_newest_and_every_nth(tmp_path: Path) -> None:
    saver = alone(tmp_path, keep=2, keep_every=4)
    for step in range(1, 11):
        saver.save(step, boxes(state(0, step), 0), {"step": step}, SaveMode.sync)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-10", "step-4", "step-8", "step-9"]


def test_a_start_sweeps_and_gives_a_name_back(tmp_path: Path) -> None:
    alone(tmp_path).save(3, {"w": Box(torch.ones(5), (5,), (0,))}, {"step": 3}, SaveMode.sync)
    (tmp_path / "step-3").rename(tmp_path / ".old-step-3")  # killed between two renames
    for name in (".tmp-step-4-ab", ".trash-step-1", ".old-step-2", "step-2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rank-00000.safetensors").write_text("x")
    sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-2", "step-3"]
    assert verify(tmp_path / "step-3") == []
    sweep(tmp_path / "none")


def test_a_step_that_is_saved_again_replaces_the_first(tmp_path: Path) -> None:
    saver = alone(tmp_path)
    for kind in ("first", "second"):
        saver.save(3, boxes(state(0, 3), 0), {"step": 3, "kind": kind}, SaveMode.sync)
    assert [path.name for path in tmp_path.iterdir()] == ["step-3"]
    assert json.loads((tmp_path / "step-3/manifest.json").read_text())["kind"] == "second"


def test_one_save_is_in_flight_and_training_does_not_wait_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second waits for the first; host memory is taken once; facts are those of the step."""
    gate, events = threading.Event(), []

    def hold(name: str) -> None:
        if name in ("start", "after_rename"):
            events.append(name)
        assert name != "start" or gate.wait(10)

    for module in ("train.checkpoint.storage", "train.checkpoint.saving"):
        monkeypatch.setattr(f"{module}.failpoint", hold)
    saver, facts = alone(tmp_path), {"step": 1, "window": [1.0]}
    saver.save(1, boxes(state(0, 1), 0), facts, SaveMode["async"])
    facts["window"] = [2.0]
    assert not list(tmp_path.glob("step-*"))
    assert saver.saved_step == 0
    threading.Timer(0.2, gate.set).start()
    slab = saver._slab.data_ptr()
    saver.save(2, boxes(state(0, 2), 0), {"step": 2}, SaveMode["async"])
    assert saver.read_stall_s() > 0.15
    assert saver.read_stall_s() == 0
    saver.wait()
    assert events == ["start", "after_rename"] * 2
    assert saver._slab.data_ptr() == slab
    assert saver.saved_step == 2
    assert json.loads((tmp_path / "step-1/manifest.json").read_text())["window"] == [1.0]


def test_a_lost_rank_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What collectives raise is no failed save: no later one could work."""

    def gone(*_: object) -> None:
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr("train.checkpoint.saving.gather_values", gone)
    saver = alone(tmp_path)
    saver.save(1, {}, {}, SaveMode["async"])
    with pytest.raises(RuntimeError, match="Connection closed"):
        saver.wait()


def test_memory_for_the_copy_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: object) -> None:
        raise RuntimeError("out of host memory")

    saver = alone(tmp_path)
    monkeypatch.setattr(saver, "reserve", refuse)
    assert save_alone(saver, 1) == [
        "checkpoint 1 failed: rank 0: RuntimeError: out of host memory; there is none before"
    ]
    monkeypatch.undo()
    assert save_alone(saver, 2) == []


def save_alone(saver: Saver, step: int) -> list[str]:
    saver.save(step, boxes(state(0, step), 0), {"step": step}, SaveMode["async"])
    saver.wait()
    return saver.read_failures()


def test_a_save_longer_than_the_grace_is_warned_of_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    saver = alone(tmp_path, grace_s=30)
    for step, seconds in ((1, 14.0), (2, 16.0), (3, 40.0)):
        clock = iter([0.0, 0.0, seconds, seconds])  # save and, within, its part that writes
        monkeypatch.setattr("train.checkpoint.saving.time", SimpleNamespace(monotonic=clock.__next__))
        saver.save(step, {}, {"step": step}, SaveMode.sync)
        assert ("a save took" in caplog.text) == (step > 1)
    assert caplog.text.count("torchrun kills its ranks 30 s after a stop signal") == 1
    assert "a save took 16 s" in caplog.text
    assert "PET_SHUTDOWN_TIMEOUT=64" in caplog.text


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, None),
        ({"TORCHELASTIC_RUN_ID": "a"}, 30),
        ({"TORCHELASTIC_RUN_ID": "a", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "50"}, 50),
        (
            {
                "TORCHELASTIC_RUN_ID": "a",
                "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "50",
                "PET_SHUTDOWN_TIMEOUT": "120",
            },
            120,
        ),
    ],
)
def test_grace_of_the_launcher(
    variables: dict[str, str], expected: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key in ("TORCHELASTIC_RUN_ID", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "PET_SHUTDOWN_TIMEOUT"):
        monkeypatch.delenv(key, raising=False)
    for key, value in variables.items():
        monkeypatch.setenv(key, value)
    is_fixed = torch.__version__ < TorchVersion("2.12") and expected
    assert launcher_grace_s() == (30 if is_fixed else expected)


def test_the_config_is_checked() -> None:
    with pytest.raises(ValueError, match=r"checkpoint.keep_every=0 must be at least 1, or null"):
        CheckpointConfig(keep_every=0)
