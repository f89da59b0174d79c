"""Public ops against their twins: values and gradients."""

import logging

import pytest
import torch

from kernels.cross_entropy import linear_cross_entropy
from kernels.grouped_gemm import _say_slow, grouped_gemm
from kernels.permute import Sorting, permute, sort_choices, unpermute
from kernels.reference import grouped_gemm as grouped_gemm_by_expert
from kernels.reference import linear_cross_entropy as whole_linear_cross_entropy


@pytest.mark.parametrize("rows", [1, 7, 1000])
def test_chunked_cross_entropy(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any number of chunks gives the twin's losses and gradients; a strided hidden, too."""
    monkeypatch.setattr("kernels.cross_entropy.CHUNK_ELEMENTS", rows * 33)
    torch.manual_seed(1)
    hidden = torch.randn(20, 2, 10, dtype=torch.float64).transpose(0, 1).requires_grad_()
    weight = torch.randn(33, 10, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(-5, 33, (2, 20))
    losses = linear_cross_entropy(hidden, weight, targets)
    expected = whole_linear_cross_entropy(hidden.flatten(0, 1), weight, targets.flatten()).view(2, 20)
    torch.testing.assert_close(losses, expected)
    upstream = torch.randn(2, 20, dtype=torch.float64)
    mine = torch.autograd.grad(losses, (hidden, weight), upstream)
    theirs = torch.autograd.grad(expected, (hidden, weight), upstream)
    torch.testing.assert_close(mine, theirs)
    assert not losses._is_view()


def test_cross_entropy_names_shapes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"hidden \(4, 3\), weight \(5, 2\)"):
        linear_cross_entropy(torch.zeros(4, 3), torch.zeros(5, 2), torch.zeros(4, dtype=torch.long))


def test_cross_entropy_in_bf16_errs_no_more_than_torch() -> None:
    torch.manual_seed(2)
    hidden, weight = torch.randn(64, 32), torch.randn(100, 32) * 0.3
    targets = torch.randint(100, (64,))
    truth = whole_linear_cross_entropy(hidden, weight, targets)
    mine = linear_cross_entropy(hidden.bfloat16(), weight.bfloat16(), targets)
    plain = torch.nn.functional.cross_entropy(
        hidden.bfloat16() @ weight.bfloat16().T, targets, reduction="none"
    )
    assert mine.dtype == torch.float32
    assert (mine - truth).abs().max() <= 2 * (plain.float() - truth).abs().max()


@pytest.mark.parametrize(("tokens", "top_k"), [(0, 2), (1, 1), (13, 3)])
def test_permute_and_unpermute_are_transposes(tokens: int, top_k: int) -> None:
    torch.manual_seed(3)
    x = torch.randn(tokens, 4, dtype=torch.float64, requires_grad=True)
    order = torch.randperm(tokens * top_k)
    inverse = order.argsort()
    sorting = Sorting(order, inverse, torch.tensor([len(order)]))
    sent = permute(x, sorting)
    torch.testing.assert_close(sent, x.repeat_interleave(top_k, 0)[order])
    back = unpermute(sent, sorting, tokens)
    torch.testing.assert_close(back, top_k * x)
    upstream = torch.randn_like(sent)
    (gradient,) = torch.autograd.grad(sent, x, upstream, retain_graph=True)
    torch.testing.assert_close(gradient, upstream[inverse].view(tokens, top_k, 4).sum(1))
    (gradient,) = torch.autograd.grad(back, x, torch.ones_like(back))
    torch.testing.assert_close(gradient, top_k * torch.ones_like(x))


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


def test_choices_left_out_have_no_rows_and_no_gradient() -> None:
    """Keys from num_keys on come last; without them the two are still transposes of each other."""
    torch.manual_seed(4)
    keys = torch.tensor([1, 3, 0, 1, 3, 2])  # two choices for each of three tokens; 3 is beyond the last key
    sorting = sort_choices(keys, 3).keep(4)
    assert sorting.counts.tolist() == [1, 2, 1]
    assert sorting.order.tolist() == [2, 0, 3, 5]
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    sent = permute(x, sorting)
    assert torch.equal(sent, x[torch.tensor([1, 0, 1, 2])])
    torch.testing.assert_close(unpermute(sent, sorting, 3), x * torch.tensor([[1.0], [2.0], [1.0]]))
    upstream = torch.randn(4, 4, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(sent, x, upstream)
    torch.testing.assert_close(gradient, torch.stack([upstream[1], upstream[0] + upstream[2], upstream[3]]))
    y = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda y: unpermute(y, sorting, 3), y)
    none = sort_choices(torch.full((6,), 3), 3).keep(0)
    assert not unpermute(permute(x, none), none, 3).any()
