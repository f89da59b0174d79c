"""Small checkpoints and their manifests."""

import json
from pathlib import Path
from typing import Any

import torch

from train.checkpoint.storage import Box, checksum, commit, write_shard

VALUES = torch.arange(24.0).view(6, 4)


FACTS = {"step": 3, "progress": {"step": 3}, "config": {"model": {"num_layers": 2}, "lr": 1e-3, "name": None}}


def make(root: Path, step: int = 3, shift: float = 0.0) -> Path:
    """Two ranks: `w` cut in two, `b` whole on the first, a scalar on the second."""
    folder = root / f".tmp-step-{step}"
    folder.mkdir(parents=True)
    boxes = [
        {"w": Box(VALUES[:2] + shift, (6, 4), (0, 0)), "b": Box(torch.ones(5), (5,), (0,))},
        {"w": Box(VALUES[2:] + shift, (6, 4), (2, 0)), "s": Box(torch.tensor(7.0), (), ())},
    ]
    written = [write_shard(folder, rank, part) for rank, part in enumerate(boxes)]
    commit(folder, root / f"step-{step}", written, {**FACTS, "step": step})
    return root / f"step-{step}"


def content_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text())


def write(folder: Path, content: Any) -> None:
    """With the right checksum, so that it is the content that is judged."""
    if isinstance(content, dict):
        content.pop("checksum", None)
        content = {**content, "checksum": checksum(content)}
    (folder / "manifest.json").write_text(json.dumps(content))
