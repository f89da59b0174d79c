"""Tokens sorted by expert and back: forward and backward of both are pure gathers, hence deterministic."""

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Sorting(NamedTuple):
    """A stable order of choices by a key, such as their expert."""

    order: Tensor
    """[choices]: choice number at each place."""
    inverse: Tensor
    """[choices]: place of each choice."""
    ends: Tensor
    """[keys] int32, where each key's choices end."""


def sort_choices(keys: Tensor, num_keys: int) -> Sorting:
    """Sort choices by integer keys below num_keys, with no host synchronisation.

    Args:
        keys: [choices] int64.
    """
    ordered, order = keys.sort(stable=True)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
    every_key = torch.arange(num_keys, device=keys.device)
    return Sorting(order, inverse, torch.searchsorted(ordered, every_key, right=True, out_int32=True))


def permute(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """Copy each token once for every one of its choices, in the order of the choices.

    Args:
        x: [tokens, hidden].
        order: [tokens * top_k], choice number (token * top_k + slot) at each place.
        inverse: [tokens * top_k], place of each choice.

    Returns:
        [tokens * top_k, hidden].
    """
    return _Permute.apply(x, order, inverse)


def unpermute(y: Tensor, order: Tensor, inverse: Tensor, tokens: int) -> Tensor:
    """Sum the rows of each token's choices: the transpose of `permute`.

    Args:
        y: [tokens * top_k, hidden].

    Returns:
        [tokens, hidden].
    """
    return _Unpermute.apply(y, order, inverse, tokens)


def _gather(x: Tensor, order: Tensor) -> Tensor:
    return x[order // (order.numel() // max(1, x.shape[0]))]


def _sum(y: Tensor, inverse: Tensor, tokens: int) -> Tensor:
    return y[inverse].unflatten(0, (tokens, inverse.numel() // max(1, tokens))).sum(1)


class _Permute(torch.autograd.Function):
    """forward: gather; backward: sum of each token's rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.tokens = x.shape[0]
        return _gather(x, order)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _sum(grads[0], ctx.saved_tensors[0], ctx.tokens), None, None


class _Unpermute(torch.autograd.Function):
    """forward: sum of each token's rows; backward: gather."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, order: Tensor, inverse: Tensor, tokens: int) -> Tensor:
        ctx.save_for_backward(order)
        return _sum(y, inverse, tokens)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return _gather(grads[0], ctx.saved_tensors[0]), None, None, None
