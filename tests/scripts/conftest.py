"""A small model trained on needles by two processes, for what reads checkpoints."""

from pathlib import Path

import pytest

from scripts.needles import main as write_needles
from tests.support.forked import pretrain


@pytest.fixture(scope="session")
def needles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """PREFIX of 300 documents of 24 to 64 tokens."""
    prefix = tmp_path_factory.mktemp("needles") / "needles"
    assert write_needles(["--output", str(prefix), "--documents", "300", "--tokens", "64"]) == 0
    return prefix


@pytest.fixture(scope="session")
def trained(needles: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run directory of three steps on two processes; weights and experts are cut over tp and ep."""
    run_dir = tmp_path_factory.mktemp("runs") / "trained"
    pretrain(
        "conf=needles", f"data.sources=[{{path: {needles}}}]", f"run_dir={run_dir}", "train.steps=3",
        "batch.row_tokens=64", "batch.micro_rows=4", "batch.global_tokens=1024", "eval.every=3",
        "eval.rows=8", "data.eval_fraction=0.1", "parallel.tp=2", "parallel.ep=2", "router.balancing=bias",
        "router.bias_update_rate=0.05", processes=2,
    )  # fmt: skip
    return run_dir
