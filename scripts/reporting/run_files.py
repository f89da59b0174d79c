"""What a run directory says: metrics.jsonl, experts.jsonl, config.yaml and the sentinel file."""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import yaml

from train.monitor.alerts import Alert, ExpertWatch

Parsed = TypeVar("Parsed")
STATUS = {
    "FAILED": "failed",
    "REQUEUE": "stopped after saving, wants to go on",
    "DONE": "finished",
    "": "running or interrupted",  # no sentinel file: kill -9 and a lost node leave none
}
MEASURED = ("loss", "eval_loss", "grad_norm")  # null where they were not finite: JSON has no NaN
LATER_FIGURES = ("max_violation", "entropy", "aux_loss")  # of each layer; not in the lines of older runs


@dataclass(frozen=True)
class ExpertRow:
    """One line of experts.jsonl; `load` and `dropped` are [layers, experts], `moved` is [layers]."""

    step: int
    load: np.ndarray
    dropped: np.ndarray
    moved: np.ndarray


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """What a run directory says; `ending` is the sentinel file's name and text, `torn` names files."""

    name: str
    metrics: list[dict[str, float | None]]
    experts: list[ExpertRow]
    ending: tuple[str, str]
    torn: list[str]
    config: str
    alerts: list[Alert]


def read_run(run_dir: Path) -> RunRecord:
    """Read all files of a run directory; ValueError names the file and line that cannot be used."""
    metrics, experts, config = (run_dir / name for name in ("metrics.jsonl", "experts.jsonl", "config.yaml"))
    if not metrics.is_file():
        raise ValueError(
            f"{metrics} does not exist; RUN_DIR must be a run directory (run_dir=... of train/pretrain.py)"
        )
    rows, torn = read_jsonl(metrics, parse_metrics)
    if not rows:
        raise ValueError(f"{metrics} holds no complete line; wait for the first logged step")
    loads, torn_loads = read_jsonl(experts, parse_experts) if experts.is_file() else ([], False)
    if len({row.load.shape for row in loads}) > 1:
        raise ValueError(f"{experts}: the shape of load changes between lines; one file must hold one run")
    text = config.read_text(encoding="utf-8") if config.is_file() else f"{config} does not exist"
    return RunRecord(
        name=run_dir.resolve().name, metrics=rows, experts=loads, ending=read_ending(run_dir),
        torn=[path.name for path, found in ((metrics, torn), (experts, torn_loads)) if found], config=text,
        alerts=alerts_of(rows, loads, text),
    )  # fmt: skip


def read_jsonl(path: Path, parse: Callable[[Any], Parsed]) -> tuple[list[Parsed], bool]:
    """Parse each line; True if a torn last line (a crash while writing) was left out."""
    rows: list[Parsed] = []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for place, line in enumerate(lines, start=1):
        if place == len(lines) and not line:
            break
        try:
            rows.append(parse(json.loads(line)))
        except ValueError as error:
            if place == len(lines) and isinstance(error, json.JSONDecodeError):
                return rows, True
            remedy = "repair or delete the line"
            raise ValueError(
                f"{path}:{place}: {error}; every line but a torn last one is JSON; {remedy}"
            ) from error
    return rows, False


def parse_metrics(record: Any) -> dict[str, float | None]:
    """Check one line of metrics.jsonl: numbers or null, with step and tokens."""
    if not isinstance(record, dict):
        raise ValueError(f"got {type(record).__name__}, must be an object")
    if missing := {"step", "tokens", "loss"} - set(record):
        raise ValueError(f"misses {', '.join(sorted(missing))}")
    for key, value in record.items():
        rule = int if key in ("step", "tokens") else int | float | None
        if not isinstance(value, rule):
            raise ValueError(f"{key}={value!r} must be of type {getattr(rule, '__name__', rule)}")
    return {key: math.nan if key in MEASURED and value is None else value for key, value in record.items()}


def parse_experts(record: Any) -> ExpertRow:
    """Check one line of experts.jsonl; figures of each layer that older runs lack may be missing."""
    try:
        load, dropped, moved = (np.array(record[key], dtype=float) for key in ("load", "dropped", "moved"))
        step = int(record["step"])
        later = {key: np.array(record[key], dtype=float).shape for key in LATER_FIGURES if key in record}
    except (KeyError, TypeError, OverflowError) as error:
        raise ValueError(f"{error!r}; must hold step, load, dropped and moved") from error
    if load.ndim != 2 or not load.size or dropped.shape != load.shape or moved.shape != load.shape[:1]:
        rule = "must be [layers][experts], [layers][experts] and [layers]"
        raise ValueError(
            f"load, dropped and moved have the shapes {load.shape}, {dropped.shape}, {moved.shape}; {rule}"
        )
    for key, shape in later.items():
        if shape != moved.shape:
            raise ValueError(f"{key} has the shape {shape}; must be [layers], here {moved.shape}")
    return ExpertRow(step, load, dropped, moved)


def read_ending(run_dir: Path) -> tuple[str, str]:
    """Return the sentinel file's name and what it says; two empty strings if there is none."""
    for name in STATUS:
        path = run_dir / name
        if name and path.exists():
            try:
                end = json.loads(path.read_text(encoding="utf-8"))
                return name, f"exit code {end['code']} at step {end['step']}: {end['reason']}"
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{path}: {error!r}; must be JSON with code, step and reason; delete it"
                ) from error
    return "", ""


def alerts_of(rows: list[dict[str, float | None]], experts: list[ExpertRow], config: str) -> list[Alert]:
    """Dead experts and drops, as the run warned of them by the limits in its configuration; none without."""
    try:
        limits = yaml.safe_load(config)["log"]
        watch = ExpertWatch(dead_after=limits["dead_after"], max_drop_rate=limits["max_drop_rate"])
    except (yaml.YAMLError, KeyError, TypeError):
        return []
    by_step = {row["step"]: row for row in rows if row.get("drop_rate") is not None}
    fed = ((by_step[one.step], one) for one in experts if one.step in by_step)
    return [alert for row, one in fed for alert in watch.feed(row, asdict(one))]
