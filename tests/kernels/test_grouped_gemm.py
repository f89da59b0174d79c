"""Grouped GEMM against its twin: values and gradients."""

import logging

import pytest
import torch

from kernels.grouped_gemm import _say_slow, grouped_gemm
from kernels.reference import grouped_gemm as grouped_gemm_by_expert


@pytest.mark.parametrize("sizes", [(8, 12), (6, 12), (8, 10)])
def test_grouped_gemm(sizes: tuple[int, int], caplog: pytest.LogCaptureFixture) -> None:
    """Aligned sizes take torch's op, others the twin and say so once; empty experts have zero gradients."""
    torch.manual_seed(4)
    _say_slow.cache_clear()
    x = torch.randn(10, sizes[0], requires_grad=True)
    weight = torch.randn(5, sizes[1], sizes[0], requires_grad=True)
    ends = torch.tensor([0, 4, 4, 10, 10], dtype=torch.int32)
    with caplog.at_level(logging.WARNING):
        mine = [grouped_gemm(x, weight, ends) for _ in range(2)][1]
    assert len(caplog.records) == (0 if sizes == (8, 12) else 1)
    expected = grouped_gemm_by_expert(x, weight, ends)
    torch.testing.assert_close(mine, expected)
    upstream = torch.randn_like(expected)
    actual_gradients = torch.autograd.grad(mine, (x, weight), upstream)
    expected_gradients = torch.autograd.grad(expected, (x, weight), upstream)
    torch.testing.assert_close(actual_gradients, expected_gradients)


def test_grouped_gemm_names_shapes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="3 groups"):
        grouped_gemm(torch.zeros(2, 4), torch.zeros(5, 4, 4), torch.tensor([0, 1, 2], dtype=torch.int32))
