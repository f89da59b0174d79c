"""Grouped GEMM against its twin: values and gradients."""

import logging

import pytest
import torch
from torch import Tensor

from kernels.grouped_gemm import _say_slow, grouped_gemm
from kernels.reference import grouped_gemm as grouped_gemm_by_expert
from tests.support.kernel_checks import DEVICE, DTYPES, check_against_twin, random_tensor

ENDS = {
    "some without rows": [0, 4, 4, 10, 10],
    "all rows on the first": [10] * 5,
    "all rows on the last": [0, 0, 0, 0, 10],
    "one row each": [1, 2, 3, 4, 5],
}


def ends_of(ends: list[int]) -> Tensor:
    return torch.tensor(ends, dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ends", ENDS.values(), ids=ENDS)
@pytest.mark.parametrize("sizes", [(16, 24), (6, 12), (8, 10)])
def test_grouped_gemm(sizes: tuple[int, int], ends: list[int], dtype: torch.dtype) -> None:
    """Sizes of 16 bytes take torch's op, others the twin; experts without rows have zero gradients."""
    x = random_tensor(ends[-1], sizes[0], seed=1)
    weight = random_tensor(5, sizes[1], sizes[0], seed=2)
    inputs = [x, weight, ends_of(ends)]
    check_against_twin(grouped_gemm, grouped_gemm_by_expert, inputs, dtype=dtype)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="large")
def test_many_rows() -> None:
    """More than a tile of each expert, and of one hardly any."""
    inputs = [random_tensor(5000, 512, seed=3), random_tensor(5, 768, 512, seed=4)]
    inputs.append(ends_of([1, 1900, 1900, 4999, 5000]))
    check_against_twin(grouped_gemm, grouped_gemm_by_expert, inputs, dtype=torch.bfloat16)


@pytest.mark.parametrize("sizes", [(8, 12), (6, 12), (8, 10)])
def test_the_twin_is_a_warning(sizes: tuple[int, int], caplog: pytest.LogCaptureFixture) -> None:
    _say_slow.cache_clear()
    weight = torch.ones(5, sizes[1], sizes[0], device=DEVICE)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            grouped_gemm(torch.ones(10, sizes[0], device=DEVICE), weight, ends_of([0, 4, 4, 10, 10]))
    assert len(caplog.records) == (0 if sizes == (8, 12) else 1)


def test_grouped_gemm_names_shapes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="3 groups"):
        grouped_gemm(torch.zeros(2, 4), torch.zeros(5, 4, 4), torch.tensor([0, 1, 2], dtype=torch.int32))
