"""Tokens sorted by expert and back: forward and backward of both are pure gathers, hence deterministic."""

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Sorting(NamedTuple):
    """A stable order of choices by a key, such as their expert; the last ones may be left out."""

    order: Tensor
    """[kept]: choice number (token * top_k + slot) at each place."""
    inverse: Tensor
    """[choices]: place of each choice; kept or more: it has none."""
    ends: Tensor
    """[keys] int32, where each key's choices end."""

    @property
    def counts(self) -> Tensor:
        """[keys] int64: choices of each key."""
        return self.ends.long().diff(prepend=self.ends.new_zeros(1).long())

    def keep(self, count: int) -> "Sorting":
        """The same without the choices from place `count` on."""
        return self._replace(order=self.order[:count])


def sort_choices(keys: Tensor, num_keys: int) -> Sorting:
    """Sort choices by integer keys, with no host synchronisation; keys from num_keys on come last, uncounted.

    Args:
        keys: [choices] int64.
    """
    ordered, order = keys.sort(stable=True)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
    every_key = torch.arange(num_keys, device=keys.device)
    return Sorting(order, inverse, torch.searchsorted(ordered, every_key, right=True, out_int32=True))


def permute(x: Tensor, sorting: Sorting) -> Tensor:
    """Copy each token once for every one of its kept choices, in the order of the choices.

    Args:
        x: [tokens, hidden], or [tokens * top_k, hidden]: a row for each choice.

    Returns:
        [kept, hidden].
    """
    return _Permute.apply(x, sorting.order, sorting.inverse)


def unpermute(y: Tensor, sorting: Sorting, tokens: int) -> Tensor:
    """Sum the rows of each token's kept choices: the transpose of `permute`.

    Args:
        y: [kept, hidden].

    Returns:
        [tokens, hidden].
    """
    return _Unpermute.apply(y, sorting.order, sorting.inverse, tokens)


def _gather(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    return x[order // (inverse.numel() // max(1, x.shape[0]))]


def _sum(y: Tensor, inverse: Tensor, tokens: int) -> Tensor:
    if len(y) < len(inverse):  # what was left out adds a row of zeros
        y = torch.cat([y, y.new_zeros(1, *y.shape[1:])])
        inverse = inverse.clamp(max=len(y) - 1)
    return y[inverse].unflatten(0, (tokens, inverse.numel() // max(1, tokens))).sum(1)


class _Permute(torch.autograd.Function):
    """forward: gather; backward: sum of each token's rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.tokens = x.shape[0]
        return _gather(x, order, inverse)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _sum(grads[0], ctx.saved_tensors[0], ctx.tokens), None, None


class _Unpermute(torch.autograd.Function):
    """forward: sum of each token's rows; backward: gather."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, order: Tensor, inverse: Tensor, tokens: int) -> Tensor:
        ctx.save_for_backward(order, inverse)
        return _sum(y, inverse, tokens)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return _gather(grads[0], *ctx.saved_tensors), None, None, None
