"""Cross-entropy of a linear head in row chunks: the full [tokens, vocab] logits never exist.

The backward recomputes each chunk's logits: one more GEMM instead of tokens x vocab of memory.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from kernels.reference import widen

CHUNK_ELEMENTS = 2**26
"""Logits held at once: 256 MiB in fp32."""


Merge = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, first: int = 0, merge: Merge | None = None
) -> Tensor:
    """-log softmax(hidden @ weight^T)[target] of each token, 0 where the target is negative.

    Args:
        hidden: [..., hidden]. weight: [vocab, hidden]. targets: [...] int64.
        first: vocabulary entry of weight's first row, if `weight` is a part of the vocabulary.
        merge: makes (log-sum-exp, target logit or 0) of the part, [tokens] each, those of the whole.

    Returns:
        [...] losses, fp32; not a view, so that FSDP2 can hook it. With a part of the vocabulary, the
        gradients are those that this part contributes.
    """
    if hidden.shape[:-1] != targets.shape or hidden.shape[-1:] != weight.shape[1:]:
        shapes = f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}, targets {tuple(targets.shape)}"
        raise ValueError(f"{shapes}: expected [..., hidden], [vocab, hidden], [...]")
    return _LinearCrossEntropy.apply(hidden, weight, targets, first, merge)


class _LinearCrossEntropy(torch.autograd.Function):
    """forward: losses and log-sum-exp by chunks; backward: logits again, (softmax - one-hot) * grad."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, first: int, merge: Merge | None
    ) -> Tensor:
        local, is_here = _local_targets(targets, first, weight.shape[0])
        logsumexp = torch.empty(local.shape, dtype=widen(hidden[:0]).dtype, device=hidden.device)
        picked = torch.empty_like(logsumexp)
        for h, t, lse, pick in _chunks(weight, hidden.flatten(0, -2), local, logsumexp, picked):
            logits = widen(h @ weight.T)
            torch.logsumexp(logits, -1, out=lse)
            torch.gather(logits, 1, t[:, None], out=pick[:, None])
        picked *= is_here
        if merge is not None:
            logsumexp, picked = merge(logsumexp, picked)
        ctx.save_for_backward(hidden, weight, targets, logsumexp)
        ctx.first = first
        return torch.where(targets >= 0, (logsumexp - picked).view(targets.shape), 0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        hidden, weight, targets, logsumexp = ctx.saved_tensors
        local, is_here = _local_targets(targets, ctx.first, weight.shape[0])
        scale = torch.where(targets >= 0, grads[0], 0).flatten()
        grad_hidden = torch.empty_like(hidden.flatten(0, -2))
        grad_weight = torch.zeros_like(weight, dtype=logsumexp.dtype)
        one_hot = -is_here.to(logsumexp.dtype)
        flat = (hidden.flatten(0, -2), local, one_hot, logsumexp, scale, grad_hidden)
        for h, t, minus_one, lse, s, out in _chunks(weight, *flat):
            p = (widen(h @ weight.T) - lse[:, None]).exp_()
            p.scatter_add_(1, t[:, None], minus_one[:, None])
            p = (p * s[:, None]).to(h.dtype)
            torch.mm(p, weight, out=out)
            grad_weight += p.T @ h
        return grad_hidden.view_as(hidden), grad_weight.to(weight.dtype), None, None, None


def _local_targets(targets: Tensor, first: int, size: int) -> tuple[Tensor, Tensor]:
    """[tokens] targets counted from `first`, 0 where they lie elsewhere, and whether they lie here."""
    local = targets.flatten() - first
    is_here = (local >= 0) & (local < size) & (targets.flatten() >= 0)
    return torch.where(is_here, local, 0), is_here


def _chunks(weight: Tensor, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Matching pieces of tensors of [tokens, ...], as many tokens as CHUNK_ELEMENTS logits allow."""
    return zip(*(x.split(max(1, CHUNK_ELEMENTS // weight.shape[0])) for x in tensors), strict=True)
