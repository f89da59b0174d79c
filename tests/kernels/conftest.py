"""Kernel tests see NaN in memory that nobody has written, and other data with --data-seed."""

from collections.abc import Iterator

import pytest
import torch

from tests.support.kernel_checks import Draw


def pytest_configure(config: pytest.Config) -> None:
    Draw.seed = config.getoption("--data-seed")


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """torch.empty is full of NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
