"""What a run says about itself: a record a logged step on console, in metrics.jsonl and experts.jsonl.

Only rank 0 writes. A record is made from device values once an interval; nothing here can stop the run.
"""

import json
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from train.monitor.alerts import Alert, ExpertWatch
from train.monitor.event_files import EventFiles, TensorboardConfig
from train.monitor.wandb_run import Dashboard, WandbConfig

log = logging.getLogger(__name__)

PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "H800": 989e12, "B200": 2250e12, "A100": 312e12}
"""Dense bf16 FLOP/s by a part of the device's name (vendor data sheets)."""


@dataclass(kw_only=True)
class LogConfig:
    """How often a run speaks, and what it warns about."""

    every: int = 10
    """Steps between records; step 1 and the last step always have one."""
    dead_after: int | None = 3
    """Records in a row without a choice after which an expert counts as dead; null = never."""
    max_drop_rate: float | None = 0.1
    """Dropped / all choices since the last record above which a run warns; null = never."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.every < 1:
            raise ValueError(f"log.every={self.every} must be at least 1")
        if self.dead_after is not None and self.dead_after < 1:
            raise ValueError(f"log.dead_after={self.dead_after} must be at least 1, or null")
        if self.max_drop_rate is not None and not 0 <= self.max_drop_rate <= 1:
            raise ValueError(f"log.max_drop_rate={self.max_drop_rate} must lie in [0, 1], or null")


def peak_flops(device: torch.device) -> float | None:
    """bf16 FLOP/s of one device; None where MFU means nothing."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)


def truncate_records(path: Path, step: int) -> None:
    """Drop what a file says about later steps (they will be run again), and lines that are no records."""
    if not path.exists():
        return
    content = path.read_bytes()
    lines = [line for line in content.split(b"\n") if _is_record(line, step)]
    kept = b"".join(line + b"\n" for line in lines)
    if kept != content:
        beside = path.with_name(f".{path.name}.partial")
        beside.write_bytes(kept)
        beside.replace(path)  # a crash in between loses nothing


def _is_record(line: bytes, step: int) -> bool:
    """Whether a line is a whole record of a step up to `step`; a crash tears the last one."""
    try:
        record = json.loads(line.decode())
    except ValueError:
        return False
    return isinstance(record, dict) and isinstance(record.get("step"), int) and record["step"] <= step


def append_record(path: Path, record: Mapping[str, Any]) -> None:
    """Add one line of strict JSON, or nothing: null stands for what is not finite.

    Raises:
        OSError: the line did not fit or the file cannot be written; it ends with the line before.
    """
    line = (json.dumps(_without_nan(record), allow_nan=False) + "\n").encode()
    size = path.stat().st_size if path.exists() else 0
    try:
        with path.open("ab", buffering=0) as file:
            while line:
                line = line[file.write(line) :]
    except OSError:
        if path.exists():
            os.truncate(path, size)  # half a line would spoil the next one
        raise


def _without_nan(value: Any) -> Any:
    match value:
        case float():
            return value if math.isfinite(value) else None
        case Mapping():
            return {key: _without_nan(each) for key, each in value.items()}
        case list():
            return [_without_nan(each) for each in value]
    return value


class MetricsWriter:
    """Sends records to files, console, wandb and TensorBoard, and alerts to all of these but the files."""

    def __init__(
        self, run_dir: Path, *, log_config: LogConfig, console: Console, total_steps: int, step: int
    ) -> None:
        """Continue the files of `run_dir` after `step`."""
        self.console = console
        self.files = {name: run_dir / f"{name}.jsonl" for name in ("metrics", "experts")}
        for path in self.files.values():
            truncate_records(path, step)
        self.watch = ExpertWatch(dead_after=log_config.dead_after, max_drop_rate=log_config.max_drop_rate)
        self.dashboards: list[Dashboard | EventFiles] = []
        self.progress = _progress_bar(console) if console.is_terminal else None
        if self.progress is not None:
            self.task = self.progress.add_task("training", total=total_steps, completed=step, text="")
            self.progress.start()

    def start_wandb(self, cfg: WandbConfig, *, name: str, run_dir: Path, config: Mapping[str, Any]) -> None:
        """Open the wandb run, the same one after a resume; a failure is a warning."""
        self.dashboards.append(Dashboard(cfg, name=name, run_dir=run_dir, config=config))

    def start_tensorboard(self, cfg: TensorboardConfig, *, run_dir: Path, step: int) -> None:
        """Go on with the event files after `step`; a failure is a warning."""
        self.dashboards.append(EventFiles(cfg, run_dir, step))

    def advance(self, step: int) -> None:
        """Move the live display."""
        if self.progress is not None:
            self.progress.update(self.task, completed=step)

    def write(self, record: Mapping[str, Any], experts: Mapping[str, Any]) -> None:
        """Write one record everywhere; what a disk does not take is missing there, and said."""
        for name, content in (("metrics", record), ("experts", experts)):
            try:
                append_record(self.files[name], content)
            except OSError as error:
                log.warning("%s: no record of step %d: %s", self.files[name], record["step"], error.strerror)
        text = console_line(record)
        log.info("%s", text)
        if self.progress is not None:
            self.progress.update(self.task, text=f"loss {record['loss']:.4f}")
        for dashboard in self.dashboards:
            dashboard.write(record, experts)
        for alert in self.watch.feed(record, experts):
            log.warning("%s at %s", alert.title, alert.text)
            self.alert(alert)

    def alert(self, alert: Alert) -> None:
        """Pass an alert on to wandb and TensorBoard."""
        for dashboard in self.dashboards:
            dashboard.alert(alert)

    def close(self) -> None:
        """End the live display, the wandb run and TensorBoard's files."""
        if self.progress is not None:
            self.progress.stop()
        for dashboard in self.dashboards:
            dashboard.close()


def console_line(record: Mapping[str, Any]) -> str:
    """`step 120  loss 2.3412  grad 0.81  lr 3.0e-04  tok/s 11,432 ...`."""
    parts = [
        f"step {record['step']}",
        f"loss {record['loss']:.4f}",
        f"grad {record['grad_norm']:.2f}",
        f"lr {record['lr']:.1e}",
        f"tok/s {record['tokens_per_second']:,.0f}",
    ]
    if "eval_loss" in record:
        parts.insert(2, f"eval {record['eval_loss']:.4f}")
    if record["mfu"] is not None:
        parts.append(f"mfu {100 * record['mfu']:.1f}%")
    if record["max_memory_gib"] is not None:
        parts.append(f"mem {record['max_memory_gib']:.1f}GiB")
    if record.get("drop_rate"):
        parts.append(f"drop {100 * record['drop_rate']:.1f}%")
    if "max_violation" in record:
        parts.append(f"maxvio {record['max_violation']:.2f}")
    if record["skipped"]:
        parts.append(f"skipped {record['skipped']}")
    return "  ".join(parts)


class Throughput:
    """Tokens a second of the whole job and MFU since the last record."""

    def __init__(self, tokens: int) -> None:
        self.tokens, self.time = tokens, time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out time that is not training: evaluation, checkpoints."""
        start = time.perf_counter()
        yield
        self.time += time.perf_counter() - start

    def read(self, tokens: int) -> float:
        """Tokens a second since the last call."""
        now = time.perf_counter()
        speed = (tokens - self.tokens) / max(now - self.time, 1e-9)
        self.tokens, self.time = tokens, now
        return speed


def _progress_bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
        TextColumn("{task.fields[text]}"), TimeRemainingColumn(), console=console, transient=True,
    )  # fmt: skip
