"""Launches of the kernels over rows: what is chosen is measured and fits a multiprocessor."""

import pytest
import torch

from kernels.row_tiles import BACKWARD, FORWARD, as_rows, choose_backward, choose_forward, sum_partials
from tests.support.kernel_checks import random_tensor


@pytest.mark.parametrize("size", [1, 5, 96, 2048, 6144, 8192, 20000])
def test_chosen_launches_are_listed_and_fit(size: int) -> None:
    assert choose_forward(size) in FORWARD
    for dtype in (torch.bfloat16, torch.float32):
        for tensors in (2, 3, 4):
            launch = choose_backward(size, *[dtype] * tensors)
            assert launch in BACKWARD
            bt, bk = launch.tile(size)
            in_flight = launch.num_stages if launch.num_stages > 1 else 0
            assert bt * bk * dtype.itemsize * tensors * in_flight < 227 * 1024


def test_wide_rows_in_bf16_are_fetched_ahead() -> None:
    assert choose_backward(6144, *[torch.bfloat16] * 4).num_stages > 1
    assert choose_backward(8192, *[torch.bfloat16] * 4).num_stages > 1


def test_as_rows_copies_only_where_it_must() -> None:
    x = random_tensor(4, 3, 10, seed=0)
    assert as_rows(x).data_ptr() == x.data_ptr()
    assert as_rows(x[..., 2:7]).data_ptr() == x[..., 2:7].data_ptr()
    turned = x.transpose(1, 2)
    assert torch.equal(as_rows(turned), turned.reshape(-1, 3))
    assert as_rows(turned).stride(-1) == 1
    assert as_rows(x[:0]).shape == (0, 10)


@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (130, 100)])
def test_partial_sums(shape: tuple[int, int]) -> None:
    partials = random_tensor(*shape, seed=1, dtype=torch.float32)
    torch.testing.assert_close(sum_partials(partials, torch.float32), partials.sum(0))
