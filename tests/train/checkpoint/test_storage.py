"""Checkpoint folders: damage is found, and named with what was expected."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.support.forked import ROOT, Ended, launch, pretrain
from train.checkpoint.manifest import read_manifest
from train.checkpoint.restore import verify
from train.checkpoint.storage import Box, checksum, commit, write_shard

SHARD = "rank-00001.safetensors"


def make(root: Path, step: int) -> Path:
    folder = root / f".tmp-step-{step}"
    folder.mkdir(parents=True)
    values = torch.arange(8.0) + step
    files = [write_shard(folder, r, {"w": Box(values[4 * r :][:4], (8,), (4 * r,))}) for r in (0, 1)]
    commit(folder, root / f"step-{step}", files, {"step": step})
    return root / f"step-{step}"


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def edit_manifest(path: Path) -> None:
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "step": 7}))


def script(action: str, path: Path) -> Ended:
    return launch(action, str(path), program=ROOT / "scripts/checkpoint.py", timeout_s=60)


@pytest.mark.parametrize(
    ("name", "damage", "reason"),
    [
        (SHARD, flip, "sha256"),
        (SHARD, lambda path: path.write_bytes(path.read_bytes()[:-3]), "bytes, expected"),
        (SHARD, Path.unlink, "not readable: No such file"),
        (SHARD, lambda path: shutil.copy(path.parents[1] / "step-2" / SHARD, path), "sha256"),
        ("manifest.json", edit_manifest, "checksum"),
    ],
    ids=["bit flip", "truncated", "deleted", "of another step", "manifest"],
)
def test_damage_is_named(name: str, damage: Callable[[Path], None], reason: str, tmp_path: Path) -> None:
    path, other = make(tmp_path, 1), make(tmp_path, 2)
    assert verify(path) == verify(other) == []
    damage(path / name)
    (problem,) = verify(path)
    assert problem.startswith(f"{path / name}: ")
    assert reason in problem
    assert verify(other) == []


def test_a_name_that_leaves_the_folder_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.checkpoint.manifest.FILE_NAME", re.compile(".*"))
    path = make(tmp_path, 1)
    content = json.loads((path / "manifest.json").read_text())
    (tmp_path / "secret").write_text("x")
    content["files"]["../secret"] = {"size": 1, "sha256": 64 * "0"}
    del content["checksum"]
    (path / "manifest.json").write_text(json.dumps({**content, "checksum": checksum(content)}))
    assert ["sha256" in line for line in verify(path)] == [True]  # opened, where any name is taken
    monkeypatch.undo()
    (problem,) = verify(path)
    assert "names '../secret', which nobody writes" in problem


def test_two_processes_write_what_verifies(license_corpus: Path, tmp_path: Path) -> None:
    pretrain(
        "conf=debug", f"data.sources=[{{path: {license_corpus}}}]", f"run_dir={tmp_path}", "train.steps=2",
        processes=2,
    )  # fmt: skip
    path = tmp_path / "checkpoints/step-2"
    assert sorted(read_manifest(path).files) == ["rank-00000.safetensors", SHARD]
    assert verify(path) == []
    flip(path / SHARD)
    assert len(verify(path)) == 1


def test_script(tmp_path: Path) -> None:
    path = make(tmp_path / "checkpoints", 1)
    assert script("verify", tmp_path).returncode == script("inspect", path).returncode == 0
    flip(path / SHARD)
    result = script("verify", path)
    assert result.returncode == 3
    assert result.stdout.startswith(f"{path / SHARD}: sha256 ")
    (path / "manifest.json").write_text("")
    assert script("verify", path).returncode == script("inspect", path).returncode == 3
    assert script("verify", tmp_path / "none").returncode == 2
