"""Public ops against their twins: values and gradients."""

import pytest
import torch

from kernels.cross_entropy import linear_cross_entropy
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
