"""What a run says about itself: a record a logged step on console, in metrics.jsonl, experts.jsonl, wandb.

Only rank 0 writes. A record is made from device values once an interval; nothing here can stop the run.
"""

import json
import logging
import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

log = logging.getLogger(__name__)

PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "H800": 989e12, "B200": 2250e12, "A100": 312e12}
"""Dense bf16 FLOP/s by a part of the device's name (vendor data sheets)."""


class WandbMode(StrEnum):
    """Where wandb's data goes."""

    online = "online"
    offline = "offline"
    disabled = "disabled"


@dataclass(kw_only=True)
class LogConfig:
    """How often a run speaks."""

    every: int = 10
    """Steps between records; step 1 and the last step always have one."""

    def __post_init__(self) -> None:
        """Check the range."""
        if self.every < 1:
            raise ValueError(f"log.every={self.every} must be at least 1")


@dataclass(kw_only=True)
class WandbConfig:
    """Weights & Biases, from rank 0 only."""

    mode: WandbMode = WandbMode.disabled
    """online, offline (sync later) or disabled."""
    project: str = "longspan"
    """Project of the run."""


def peak_flops(device: torch.device) -> float | None:
    """bf16 FLOP/s of one device; None where MFU means nothing."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)


def truncate_records(path: Path, step: int) -> None:
    """Drop what a file says about later steps (they will be run again), a torn last line included."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            break  # torn by a crash: nothing after it was written
        if record["step"] <= step:
            kept.append(line + "\n")
    path.write_text("".join(kept), encoding="utf-8")


class MetricsWriter:
    """Sends records to the files, the console and wandb."""

    def __init__(self, run_dir: Path, *, console: Console, total_steps: int, step: int) -> None:
        """Continue the files of `run_dir` after `step`."""
        self.console = console
        self.files = {name: run_dir / f"{name}.jsonl" for name in ("metrics", "experts")}
        for path in self.files.values():
            truncate_records(path, step)
        self.wandb: Any = None
        self.progress = _progress_bar(console) if console.is_terminal else None
        if self.progress is not None:
            self.task = self.progress.add_task("training", total=total_steps, completed=step, text="")
            self.progress.start()

    def start_wandb(self, cfg: WandbConfig, *, name: str, run_dir: Path, config: Mapping[str, Any]) -> None:
        """Open the wandb run, the same one after a resume; a failure is a warning."""
        if cfg.mode is WandbMode.disabled:
            return
        try:
            import wandb

            self.wandb = wandb.init(
                project=cfg.project,
                name=name,
                id=_wandb_id(run_dir),
                resume="allow",
                dir=str(run_dir),
                mode=cast(Any, cfg.mode.value),
                config=dict(config),
                settings=wandb.Settings(init_timeout=60, console="off"),
            )
        except Exception as error:  # whatever wandb meets, the run goes on
            log.warning("wandb is off: %s", error)

    def advance(self, step: int) -> None:
        """Move the live display."""
        if self.progress is not None:
            self.progress.update(self.task, completed=step)

    def write(self, record: Mapping[str, Any], experts: Mapping[str, Any]) -> None:
        """Write one record everywhere."""
        for name, content in (("metrics", record), ("experts", experts)):
            with self.files[name].open("a", encoding="utf-8") as file:
                file.write(json.dumps(content) + "\n")
        text = console_line(record)
        log.info("%s", text)
        if self.progress is not None:
            self.progress.update(self.task, text=f"loss {record['loss']:.4f}")
        if self.wandb is not None:
            try:
                self.wandb.log({f"train/{key}": value for key, value in record.items()}, step=record["step"])
            except Exception as error:  # as above
                log.warning("wandb is off from step %d: %s", record["step"], error)
                self.wandb = None

    def close(self) -> None:
        """End the live display and the wandb run."""
        if self.progress is not None:
            self.progress.stop()
        if self.wandb is not None:
            try:
                self.wandb.finish()
            except Exception as error:  # as above
                log.warning("wandb did not finish: %s", error)


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


def max_violation(load: torch.Tensor) -> float:
    """Largest max / mean - 1 of the expert load over the layers; load: [layers, experts]."""
    return (load.amax(1) / load.double().mean(1) - 1).max().item()


def _progress_bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[text]}"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )


def _wandb_id(run_dir: Path) -> str:
    """The wandb id kept in the run directory, so that every restart continues one run."""
    path = run_dir / "wandb_id"
    if not path.exists():
        path.write_text(secrets.token_hex(4) + "\n", encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()
