"""q, k and v as parts of the one tensor that a projection writes, also on the way back."""

from typing import Any

import torch
from torch import Tensor


def split_heads(packed: Tensor, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """[..., heads * 3 * head_dim] with [q | k | v] for each head -> three views [..., heads, head_dim].

    Gradients that lie side by side like their tensors, as `lightning_attention` leaves them, are not copied.
    """
    return _SplitHeads.apply(packed, head_dim)


class _SplitHeads(torch.autograd.Function):
    """forward: views; backward: the tensor that the three gradients are parts of, or a copy of them."""

    @staticmethod
    def forward(ctx: Any, packed: Tensor, head_dim: int) -> tuple[Tensor, ...]:
        ctx.shape = packed.shape
        return packed.unflatten(-1, (-1, 3 * head_dim)).chunk(3, dim=-1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        first, *others = grads
        size, start = first.shape[-1], first.storage_offset()
        are_parts = first.stride(-1) == 1 and first.stride(-2) == 3 * size
        for number, grad in enumerate(others, 1):
            are_parts &= grad.stride() == first.stride() and grad.storage_offset() == start + number * size
            are_parts &= grad.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not are_parts:
            return torch.cat(grads, -1).view(ctx.shape), None
        whole = first.as_strided((*first.shape[:-1], 3 * size), first.stride(), start)
        return whole.reshape(ctx.shape), None
