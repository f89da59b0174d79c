"""Records: what is kept at a resume, full disks, the console line, the load figures, sentinels."""

import io
import json
import logging
import math
import re
from collections.abc import Iterator, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from rich.console import Console

from data.packing import Batch
from parallel.pipeline import SingleStage
from scripts.report import main as report
from tests.support.disks import fill, small_disk
from tests.support.forked import run_forked
from train.build import Run
from train.guard.signals import Ending, StopRequest, clear_sentinels, write_sentinel
from train.monitor.metrics import LogConfig, MetricsWriter, append_record, console_line, truncate_records
from train.step import StepResult

RECORD = {
    "step": 120,
    "loss": 2.34123,
    "grad_norm": 0.812,
    "lr": 3e-4,
    "tokens_per_second": 11432.4,
    "mfu": 0.4123,
    "max_memory_gib": 61.31,
    "drop_rate": 0.0,
    "skipped": 0,
}
EXPERTS = {"step": 120, "load": [[1]], "dropped": [[0]], "moved": [0]}


def test_console_line() -> None:
    expected = "step 120  loss 2.3412  grad 0.81  lr 3.0e-04  tok/s 11,432  mfu 41.2%  mem 61.3GiB"
    assert console_line(RECORD) == expected
    on_cpu = {**RECORD, "mfu": None, "max_memory_gib": None, "skipped": 2, "eval_loss": 2.5}
    expected = "step 120  loss 2.3412  eval 2.5000  grad 0.81  lr 3.0e-04  tok/s 11,432  skipped 2"
    assert console_line(on_cpu) == expected
    uneven = {**on_cpu, "drop_rate": 0.0123, "max_violation": 0.534}
    expected = expected.replace("skipped", "drop 1.2%  maxvio 0.53  skipped")
    assert console_line(uneven) == expected


def test_truncate_drops_later_steps_and_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    truncate_records(path, 3)
    assert not path.exists()
    path.write_text('{"step": 1}\n{"step": 3, "x": 1}\n{"step": 4}\n{"st')
    truncate_records(path, 3)
    assert path.read_text() == '{"step": 1}\n{"step": 3, "x": 1}\n'


def test_truncate_drops_what_is_no_record_and_leaves_a_good_file_alone(tmp_path: Path) -> None:
    """Rubbish of a damaged disk, JSON of another kind; records behind it stay."""
    path = tmp_path / "metrics.jsonl"
    good = [b'{"step": 1}\n', '{"step": 2, "said": "a\\u2028b \u2028"}\n'.encode()]
    path.write_bytes(good[0] + b"\xff\xfe\n[3]\n5\n{}\n" + good[1] + b'{"step": 3}\n{"st')
    truncate_records(path, 2)
    assert path.read_bytes() == b"".join(good)
    assert list(tmp_path.iterdir()) == [path]
    before = path.stat().st_ino
    truncate_records(path, 2)
    assert path.stat().st_ino == before  # not rewritten


@pytest.mark.parametrize("terminal", [True, False])
def test_writer_appends_and_shows_progress_on_a_terminal(terminal: bool, tmp_path: Path) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=terminal, width=100)
    writer = MetricsWriter(tmp_path, log_config=LogConfig(), console=console, total_steps=200, step=119)
    writer.advance(120)
    writer.write(RECORD, EXPERTS)
    writer.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == RECORD
    assert json.loads((tmp_path / "experts.jsonl").read_text()) == EXPERTS
    assert ("120/200" in screen.getvalue()) is terminal


@pytest.fixture(name="small_disk")
def _small_disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", mebibytes=32) as disk:
        yield disk


def strict(path: Path) -> list[dict[str, Any]]:
    """The records of a file of whole lines, each of them JSON as the standard has it."""

    def refuse(constant: str) -> NoReturn:
        raise AssertionError(f"{constant} is no JSON")

    text = path.read_text()
    assert text.endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def test_a_record_is_there_as_a_whole_or_not_at_all(
    small_disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A line of which the disk takes a part leaves no half behind; what follows finds room again."""
    with caplog.at_level(logging.WARNING):
        writer = MetricsWriter(
            small_disk, log_config=LogConfig(), console=Console(file=io.StringIO()), total_steps=9, step=0
        )
        wide = {**EXPERTS, "padding": "x" * 10_000}  # more than a page: its beginning fits on a full disk
        for step in (1, 2, 3, 4):
            if step == 2:
                fill(small_disk)
            if step == 4:
                (small_disk / "filler").unlink()
            writer.write({**RECORD, "step": step}, {**wide, "step": step})
    assert [line["step"] for line in strict(small_disk / "experts.jsonl")] == [1, 4]
    said = [record.getMessage() for record in caplog.records]
    for step in (2, 3):
        assert f"{small_disk}/experts.jsonl: no record of step {step}: No space left on device" in said
    steps = [line["step"] for line in strict(small_disk / "metrics.jsonl")]
    missing = [step for step in (2, 3) if any(f"metrics.jsonl: no record of step {step}" in s for s in said)]
    assert sorted(steps + missing) == [1, 2, 3, 4]


def test_a_line_that_cannot_be_opened_for_is_an_error_and_makes_no_file(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        append_record(tmp_path / "gone/metrics.jsonl", RECORD)
    assert not list(tmp_path.iterdir())


def full_disk_and_nan(disk: Path, rank: int) -> None:
    """A fault for run_forked: no room after step 1 until step 14, a loss of NaN in step 15."""
    loop, inner = import_module("train.loop"), SingleStage.forward_backward
    real, number = loop.train_step, [0]

    def step(run: Run, batches: Sequence[Batch]) -> StepResult:
        number[0] = run.progress.step + 1
        result = real(run, batches)
        if number[0] == 2:
            fill(disk)
        if number[0] == 14:
            (disk / "filler").unlink()
        return result

    def forward_backward(self: SingleStage, *arguments: Any) -> torch.Tensor:
        return inner(self, *arguments) * (math.nan if number[0] == 15 else 1)

    loop.train_step = step
    SingleStage.forward_backward = forward_backward  # type: ignore[method-assign]


def test_a_run_trains_on_where_its_records_find_no_room(
    license_corpus: Path, small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And a loss that is no number is null, as the record says that a step was skipped."""
    ended = run_forked(
        small_disk, f"data.sources=[{{path: {license_corpus}}}]", "train.steps=16", "log.every=1",
        processes=1, fault=partial(full_disk_and_nan, small_disk),
    )  # fmt: skip
    assert ended.codes == [0], ended.said
    for name in ("metrics", "experts"):
        steps = {record["step"] for record in strict(small_disk / f"{name}.jsonl")}
        missing = set(
            map(int, re.findall(rf"{name}.jsonl: no record of step (\d+): No space", ended.said[0]))
        )
        assert missing
        assert missing < set(range(2, 14))
        assert steps == set(range(1, 17)) - missing
    records = {record["step"]: record for record in strict(small_disk / "metrics.jsonl")}
    assert [(records[step]["loss"] is None, records[step]["skipped"]) for step in (14, 15, 16)] == [
        (False, 0),
        (True, 1),
        (False, 0),
    ]
    assert (small_disk / "DONE").exists()
    assert (small_disk / "checkpoints/step-16/manifest.json").exists()
    assert report([str(small_disk)]) == 0
    assert "loss" in capsys.readouterr().out
    assert "1 not finite" in (small_disk / "report.html").read_text()


def test_what_is_not_finite_is_null_at_any_depth(tmp_path: Path) -> None:
    path = tmp_path / "experts.jsonl"
    append_record(path, {"step": 1, "a": math.nan, "b": [[math.inf, 2.5]], "c": {"d": -math.inf}, "e": True})
    assert strict(path) == [{"step": 1, "a": None, "b": [[None, 2.5]], "c": {"d": None}, "e": True}]


def test_a_sentinel_that_finds_no_room_changes_no_ending(
    small_disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fill(small_disk)
    write_sentinel(small_disk, Ending.FAILED, code=1, step=7, reason="a")
    assert (small_disk / "FAILED").exists()
    assert "it would say" in caplog.text
    assert '"step": 7' in caplog.text


def test_a_sentinel_replaces_the_one_before(tmp_path: Path) -> None:
    run_dir = tmp_path / "new" / "run"
    write_sentinel(run_dir, Ending.FAILED, code=2, step=None, reason="a")
    write_sentinel(run_dir, Ending.DONE, code=0, step=7, reason="b")
    assert [path.name for path in run_dir.iterdir()] == ["DONE"]
    assert json.loads((run_dir / "DONE").read_text()) == {"code": 0, "step": 7, "reason": "b"}
    clear_sentinels(run_dir)
    assert not list(run_dir.iterdir())


def test_first_signal_stays() -> None:
    stop = StopRequest()
    assert not stop.is_set
    for number in (15, 2):
        stop._note(number, None)
    assert stop.is_set
    assert stop.signal_name == "SIGTERM"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"every": 0}, "log.every=0 must be at least 1"),
        ({"dead_after": 0}, "log.dead_after=0 must be at least 1, or null"),
        ({"max_drop_rate": 1.5}, r"log.max_drop_rate=1.5 must lie in \[0, 1\], or null"),
        ({"max_drop_rate": math.nan}, r"log.max_drop_rate=nan must lie in \[0, 1\], or null"),
    ],
)
def test_log_config_ranges(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LogConfig(**changes)
    LogConfig(every=1, dead_after=1, max_drop_rate=0.0)
    LogConfig(dead_after=None, max_drop_rate=None)
