"""Packed q, k and v: views forward, no copy of gradients that lie side by side."""

import pytest
import torch
from torch import Tensor

from kernels.lightning_attention import lightning_attention_triton
from kernels.packed_heads import split_heads
from tests.support.kernel_checks import DEVICE


def grads_of(packed: Tensor, upstream: list[Tensor]) -> Tensor:
    leaf = packed.clone().requires_grad_()
    (found,) = torch.autograd.grad(split_heads(leaf, 4), leaf, upstream)
    return found


def test_parts_of_one_tensor_are_taken_as_they_are() -> None:
    packed, whole = torch.randn(2, 5, 3 * 12), torch.randn(2, 5, 3, 12)
    q, k, v = split_heads(packed, 4)
    assert q.data_ptr() == packed.data_ptr()
    assert k.shape == v.shape == (2, 5, 3, 4)
    assert torch.equal(torch.cat([q, k, v], -1).view_as(packed), packed)
    found = grads_of(packed, list(whole.chunk(3, -1)))
    assert torch.equal(found, whole.view_as(packed))
    assert found.data_ptr() == whole.data_ptr()


@pytest.mark.parametrize("kind", ["apart", "swapped", "of different tensors"])
def test_others_are_copied(kind: str) -> None:
    packed, whole = torch.randn(2, 5, 3 * 12), torch.randn(2, 5, 3, 12)
    q, k, v = whole.chunk(3, -1)
    upstream = {
        "apart": [q.contiguous(), k.contiguous(), v.contiguous()],
        "swapped": [q, v, k],
        "of different tensors": [q, whole.clone().chunk(3, -1)[1], v],
    }[kind]
    expected = torch.cat(upstream, -1).view_as(packed)
    assert torch.equal(grads_of(packed, upstream), expected)


def test_the_kernels_gradients_lie_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = torch.randn(1, 20, 2 * 48, device=DEVICE, requires_grad=True)
    slopes, positions = torch.tensor([0.5, 0.1], device=DEVICE), torch.arange(20, device=DEVICE)[None]
    o = lightning_attention_triton(*split_heads(packed, 16), slopes, positions)
    monkeypatch.setattr(torch, "cat", None)  # a copy would need it
    o.sum().backward()
    assert packed.grad is not None
    assert packed.grad.isfinite().all()
