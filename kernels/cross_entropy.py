"""Cross-entropy of a linear head in row chunks: the full [tokens, vocab] logits never exist.

The backward recomputes each chunk's logits: one more GEMM instead of tokens x vocab of memory.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from kernels.reference import widen

CHUNK_ELEMENTS = 2**26
"""Logits held at once: 256 MiB in fp32."""


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """-log softmax(hidden @ weight^T)[target] of each token, 0 where the target is negative.

    Args:
        hidden: [..., hidden]. weight: [vocab, hidden]. targets: [...] int64.

    Returns:
        [...] losses, fp32; not a view, so that FSDP2 can hook it.
    """
    if hidden.shape[:-1] != targets.shape or hidden.shape[-1:] != weight.shape[1:]:
        shapes = f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}, targets {tuple(targets.shape)}"
        raise ValueError(f"{shapes}: expected [..., hidden], [vocab, hidden], [...]")
    return _LinearCrossEntropy.apply(hidden, weight, targets)


class _LinearCrossEntropy(torch.autograd.Function):
    """forward: losses and log-sum-exp by chunks; backward: logits again, (softmax - one-hot) * grad."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        losses = torch.empty(targets.shape, dtype=widen(hidden[:0]).dtype, device=hidden.device)
        logsumexp = torch.empty_like(losses).flatten()
        for h, t, loss, lse in _chunks(
            weight, hidden.flatten(0, -2), targets.flatten(), losses.view(-1), logsumexp
        ):
            logits = widen(h @ weight.T)
            torch.logsumexp(logits, -1, out=lse)
            picked = logits.gather(1, t.clamp(min=0)[:, None])[:, 0]
            loss.copy_(torch.where(t >= 0, lse - picked, 0))
        ctx.save_for_backward(hidden, weight, targets, logsumexp)
        return losses

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        hidden, weight, targets, logsumexp = ctx.saved_tensors
        scale = torch.where(targets >= 0, grads[0], 0).flatten()
        grad_hidden = torch.empty_like(hidden.flatten(0, -2))
        grad_weight = torch.zeros_like(weight, dtype=logsumexp.dtype)
        chunks = _chunks(weight, hidden.flatten(0, -2), targets.flatten(), logsumexp, scale, grad_hidden)
        for h, t, lse, s, out in chunks:
            p = (widen(h @ weight.T) - lse[:, None]).exp_()
            p.scatter_add_(1, t.clamp(min=0)[:, None], torch.full_like(lse[:, None], -1.0))
            p = (p * s[:, None]).to(h.dtype)
            torch.mm(p, weight, out=out)
            grad_weight += p.T @ h
        return grad_hidden.view_as(hidden), grad_weight.to(weight.dtype), None


def _chunks(weight: Tensor, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Matching pieces of tensors of [tokens, ...], as many tokens as CHUNK_ELEMENTS logits allow."""
    return zip(*(x.split(max(1, CHUNK_ELEMENTS // weight.shape[0])) for x in tensors), strict=True)
