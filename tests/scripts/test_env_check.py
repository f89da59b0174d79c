"""What a machine gives, and what keeps a training from running, each in one line."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from scripts.env_check import NEEDED
from tests.support.clone import ROOT


def check(
    *folders: Path, program: Sequence[str] = ("scripts/env_check.py",)
) -> subprocess.CompletedProcess[str]:
    """Run it with more folders on the path."""
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders))}
    return subprocess.run([sys.executable, *program], cwd=ROOT, env=variables, capture_output=True, text=True)


def test_this_machine_can_train() -> None:
    result = check()
    assert result.returncode == 0, result.stderr
    assert not result.stderr, result.stderr
    rows = {line[:20].strip(): line[20:].strip() for line in result.stdout.splitlines()}
    assert rows["torch"] == torch.__version__
    assert rows["quack-kernels"]
    assert rows["softmax attention"]
    assert rows["experts"]
    if not torch.cuda.is_available():
        assert rows["softmax attention"] == "twin: tensors are not on a GPU"
        assert rows["experts"] == "torch: tensors are not on a GPU"
    assert result.stdout.endswith("training can run\n")


@pytest.mark.parametrize(
    ("name", "version", "problem"),
    [
        ("kernels", "0.1", "package 'kernels' hides this repository's kernels/; pip uninstall kernels"),
        ("torch", "2.9.1", "torch 2.9.1 is too old: use 2.11 or newer"),
    ],
)
def test_what_is_in_the_way_is_named(name: str, version: str, problem: str, tmp_path: Path) -> None:
    facts = tmp_path / f"{name}-{version}.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    result = check(tmp_path)
    assert result.returncode == 2
    assert result.stdout.endswith("training cannot run\n")
    assert result.stderr == f"error: {problem}\n"


def test_a_missing_package_is_named() -> None:
    result = check(program=["tests/support/programs/without_packages.py", "scripts/env_check.py"])
    assert result.returncode == 2
    lines = result.stderr.splitlines()
    assert "error: torch is missing: run make .venv/runtime, or pip install torch" in lines
    assert len(lines) == len(NEEDED)
