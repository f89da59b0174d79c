"""Records: what is kept at a resume, the console line, the load figures, sentinels."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from train.metrics import LogConfig, MetricsWriter, console_line, truncate_records
from train.signals import Ending, StopRequest, clear_sentinels, write_sentinel

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
    assert path.read_bytes() == b"".join(good) and list(tmp_path.iterdir()) == [path]
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
    assert stop.is_set and stop.signal_name == "SIGTERM"
