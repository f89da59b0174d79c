"""Two GPUs of one machine: NCCL and kernels instead of gloo and twins, through the program itself."""

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from parallel.config import V_SHAPED
from tests.support.jobs import command
from tests.support.runs import column

DEVICE = os.environ.get("LONGSPAN_TEST_DEVICE", "cuda")
"""`cpu`: look at the test itself where there are no two GPUs."""
LAYOUTS = """
dp2, dp2 zero_stage=2, dp2 zero_stage=3, dp2 ep=2, dp2 etp=2, dp2 ep=2 zero_stage=3
tp=2, tp=2 ep=2, tp=2 etp=2
cp=2, cp=2 cp_state_exchange=scan, cp=2 ep=2
pp=2, pp=2 schedule=interleaved, pp=2 schedule=zbv, pp=2 schedule=dualpipev
"""
NAMES = [text.strip() for text in LAYOUTS.replace("\n", ",").split(",") if text.strip()]
SIZES = [
    "model.hidden_size=128", "model.num_heads=4", "model.num_kv_heads=2", "model.head_dim=64",
    "model.rotary_dim=32", "batch.row_tokens=512", "batch.global_tokens=8192", "train.steps=5",
]  # fmt: skip
"""Heads that the softmax kernels take; documents cross the chunks of context parallelism."""

pytestmark = [
    pytest.mark.skipif(
        DEVICE == "cuda" and torch.cuda.device_count() < 2, reason="needs two GPUs: gloo cannot show NCCL"
    ),
]


def train(folder: Path, dtype: str, *overrides: str, processes: int) -> dict[str, np.ndarray]:
    """Losses and gradient norms of a run."""
    run_dir = folder / "run"
    given = [f"run_dir={run_dir}", f"train.dtype={dtype}", f"train.device={DEVICE}", *SIZES, *overrides]
    found = subprocess.run(
        command("conf=debug", *given, processes=processes),
        cwd=folder, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert found.returncode == 0, found.stdout + found.stderr
    return {key: column(run_dir, key) for key in ("loss", "grad_norm")}


@pytest.fixture(scope="module")
def source(license_corpus: Path) -> str:
    return f"data.sources=[{{path: {license_corpus}}}]"


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def alone(
    request: pytest.FixtureRequest, source: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, dict[str, np.ndarray]]:
    """The same run on one GPU."""
    dtype = request.param
    return dtype, train(tmp_path_factory.mktemp("alone"), dtype, source, "batch.micro_rows=4", processes=1)


@pytest.mark.parametrize("name", NAMES)
def test_two_gpus_train_as_one(
    name: str, alone: tuple[str, dict[str, np.ndarray]], source: str, tmp_path: Path
) -> None:
    """fp32: to round-off. bf16, whose sums of gradients are rounded in another order: nearly."""
    dtype, truth = alone
    words = name.split()
    if name.endswith(tuple(V_SHAPED)) and torch.__version__ < "2.13":
        pytest.skip("refused: torch 2.11 computes wrong gradients")
    rows = 2 if words[0] == "dp2" else 4
    overrides = [f"parallel.{word}" for word in words if word != "dp2"]
    found = train(tmp_path, dtype, source, f"batch.micro_rows={rows}", *overrides, processes=2)
    near = {"fp32": (1e-5, 1e-4), "bf16": (2e-3, 5e-2)}[dtype]
    np.testing.assert_allclose(found["loss"], truth["loss"], rtol=near[0])
    np.testing.assert_allclose(found["grad_norm"], truth["grad_norm"], rtol=near[1])
