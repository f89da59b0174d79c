"""What a run leaves behind, read back; and a run that is stopped in its middle."""

import json
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from tests.support.forked import ROOT
from tests.support.jobs import command


def lines(run_dir: Path, name: str = "metrics") -> list[dict]:
    return [json.loads(line) for line in (run_dir / f"{name}.jsonl").read_text().splitlines()]


def column(run_dir: Path, key: str) -> np.ndarray:
    return np.array([line[key] for line in lines(run_dir)])


def ending(run_dir: Path) -> tuple[str, dict]:
    found = [path for name in ("DONE", "REQUEUE", "FAILED") if (path := run_dir / name).exists()]
    assert len(found) == 1, found
    return found[0].name, json.loads(found[0].read_text())


def tensors(checkpoint: Path) -> dict[str, np.ndarray]:
    return {
        f"{path.name}/{key}": value
        for path in checkpoint.glob("*.safetensors")
        for key, value in load_file(path).items()
    }


def start_and_wait(*arguments: str, run_dir: Path, processes: int = 0) -> subprocess.Popen:
    """Start a run and return when three steps are on record."""
    process = subprocess.Popen(
        command(*arguments, processes=processes),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while (
        not (run_dir / "metrics.jsonl").exists()
        or len((run_dir / "metrics.jsonl").read_text().splitlines()) < 3
    ):
        assert process.poll() is None, "the run did not get to step 3"
        assert time.monotonic() < deadline, "the run did not get to step 3"
        time.sleep(0.1)
    return process


CLOCKS = {"tokens_per_second", "data_wait_ms", "slow_score"}
"""What a record says of the machine, not of the run."""


def outcome(run_dir: Path) -> dict[str, Any]:
    """All that must be equal: records, and the last manifest with clocks, data position, rolling windows."""
    folder = max((run_dir / "checkpoints").iterdir())
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["config"], manifest["checksum"]
    records = [
        {key: value for key, value in line.items() if key not in CLOCKS and not key.startswith("checkpoint")}
        for line in lines(run_dir)
    ]
    return {"manifest": manifest, "records": records, "experts": lines(run_dir, "experts")}
