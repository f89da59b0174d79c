"""A copy of the repository somewhere else, for tests that run what a user would type."""

import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PARTS = (
    "conf", "data", "docs", "kernels", "model", "parallel", "requirements", "scripts", "train",
    "LICENSE", "Makefile", "README.md",
)  # fmt: skip


def clone_repository(target: Path) -> Path:
    """Copy what the programs need; the environment is shared, and so are the files of the corpus."""
    target.mkdir()
    for name in PARTS:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, target / name)
    (target / ".venv").symlink_to(sys.prefix)
    (target / "corpus").mkdir()
    for file in (ROOT / "corpus").glob("*.*"):
        (target / "corpus" / file.name).symlink_to(file.resolve())
    return target
