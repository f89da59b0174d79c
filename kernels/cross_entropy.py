"""Cross-entropy of a linear head in row chunks: the full [tokens, vocab] logits never exist.

Where gradients are wanted the forward computes them, while it has a chunk's logits: three GEMMs a chunk and
none again. The weight's gradient is a sum over tokens, so the upstream gradient must be one number.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.reference import widen

LOGITS_BYTES = {"cpu": 2**28, "cuda": 25 * 2**26}
"""Logits held at once, by device: on a GPU, 8,192 tokens of 200,064 entries in bf16 are two chunks."""

TILE = 128
"""Rows of a chunk are a multiple of this, where that many fit."""

FEW_CHUNKS = 4
"""Up to so many products are added up in the weight's dtype: at most 1.6 x the error of one rounding."""

Merge = Callable[[Tensor], Tensor]


class Config(NamedTuple):
    """Constants of both kernels."""

    columns: int
    """Vocabulary entries at a time."""
    num_warps: int


CONFIGS = [Config(1024, 4), Config(4096, 8), Config(8192, 8), Config(16384, 16)]


def choose_config(vocab: int) -> Config:
    """The smallest that holds the row, or 8192 columns at a time."""
    return next((config for config in CONFIGS[:2] if vocab <= config.columns), CONFIGS[2])


SCALED = 4096
"""Elements of weight's gradient that a program scales."""


class Passes(NamedTuple):
    """What torch and the kernels do each in their way; logits [rows, vocab], targets [rows], first entry."""

    summarize: Callable[[Tensor, Tensor, int], Tensor]
    """[3, rows]: maximum, sum of exp(logit - maximum), target logit (0 where it lies elsewhere)."""
    differentiate: Callable[[Tensor, Tensor, Tensor, int], Tensor]
    """Softmax - one-hot in the logits' dtype, 0 where there is no target; the logits may be overwritten."""
    scale: Callable[[Tensor, Tensor, torch.dtype], Tensor]
    """Weight's gradient times an fp32 factor [1], in this dtype; the gradient may be overwritten."""


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, first: int = 0, merge: Merge | None = None
) -> Tensor:
    """-log softmax(hidden @ weight^T)[target] of each token, 0 where the target is negative.

    Differentiate their sum or mean, once: tokens with targets must share one upstream gradient (asserted).

    Args:
        hidden: [..., hidden]. weight: [vocab, hidden]. targets: [...] int64.
        first: vocabulary entry of weight's first row, if `weight` is a part of the vocabulary.
        merge: makes [3, rows] of the part that of the whole: maximum, sum of exp(logit - maximum), target
            logit or 0; called once a chunk.

    Returns:
        [...] losses, fp32; not a view, so that FSDP2 can hook it. With a part of the vocabulary, the
        gradients are those that this part contributes.
    """
    if hidden.is_cuda:
        return linear_cross_entropy_triton(hidden, weight, targets, first=first, merge=merge)
    return _attach(hidden, weight, targets, first, merge, Passes(_summarize, _differentiate, _scale))


def linear_cross_entropy_triton(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, first: int = 0, merge: Merge | None = None,
    config: Config | None = None,
) -> Tensor:  # fmt: skip
    """`linear_cross_entropy` by the Triton kernels."""
    columns, num_warps = choose_config(weight.shape[0]) if config is None else config

    def summarize(logits: Tensor, targets: Tensor, first: int) -> Tensor:
        summary = torch.empty(3, len(logits), dtype=torch.float32, device=logits.device)
        _summarize_kernel[(len(logits),)](
            logits, targets, summary, first, *logits.shape, columns, num_warps=num_warps
        )
        return summary

    def differentiate(logits: Tensor, summary: Tensor, targets: Tensor, first: int) -> Tensor:
        _differentiate_kernel[(len(logits),)](
            logits, summary, targets, first, *logits.shape, columns, num_warps=num_warps
        )
        return logits

    def scale(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
        scaled = gradient if gradient.dtype == dtype else torch.empty_like(gradient, dtype=dtype)
        grid = (triton.cdiv(gradient.numel(), SCALED),)
        _scale_kernel[grid](gradient, factor, scaled, gradient.numel(), SCALED, num_warps=8)
        return scaled

    return _attach(hidden, weight, targets, first, merge, Passes(summarize, differentiate, scale))


def _attach(
    hidden: Tensor, weight: Tensor, targets: Tensor, first: int, merge: Merge | None, passes: Passes
) -> Tensor:
    """The losses, with a graph of two nodes: a pipeline may want hidden's gradient before weight's."""
    if hidden.shape[:-1] != targets.shape or hidden.shape[-1:] != weight.shape[1:]:
        shapes = f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}, targets {tuple(targets.shape)}"
        raise ValueError(f"{shapes}: expected [..., hidden], [vocab, hidden], [...]")
    is_training = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    losses, grad_hidden, grad_weight = _compute(hidden, weight, targets, first, merge, passes, is_training)
    if not is_training:
        return losses
    return _HiddenGradient.apply(hidden, losses, targets, grad_hidden) + _WeightGradient.apply(
        weight, losses, targets, grad_weight, passes.scale
    )


@torch.no_grad()
def _compute(
    hidden: Tensor, weight: Tensor, targets: Tensor, first: int, merge: Merge | None, passes: Passes,
    is_training: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Losses like targets and, in training, the gradients of their sum, like hidden and weight."""
    shape, hidden, targets = hidden.shape, hidden.flatten(0, -2), targets.flatten()
    tokens, vocab = len(targets), len(weight)
    rows = _chunk_rows(tokens, vocab * hidden.element_size(), LOGITS_BYTES[hidden.device.type])
    wide = widen(hidden[:0]).dtype
    logits = hidden.new_empty(min(rows, tokens), vocab)
    losses = torch.empty(tokens, dtype=wide, device=hidden.device)
    grad_hidden = grad_weight = None
    if is_training:
        total_dtype = weight.dtype if tokens <= FEW_CHUNKS * rows else wide
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.empty_like(weight, dtype=total_dtype)
        if not tokens:
            grad_weight.zero_()
    for start in range(0, tokens, rows):
        part = slice(start, start + rows)
        h, t = hidden[part], targets[part]
        x = torch.mm(h, weight.T, out=logits[: len(h)])
        summary = passes.summarize(x, t, first)
        if merge is not None:
            summary = merge(summary)
        peak, total, picked = summary
        losses[part] = torch.where(t >= 0, total.log() + (peak - picked), 0)
        if grad_hidden is not None and grad_weight is not None:
            p = passes.differentiate(x, summary, t, first)
            torch.mm(p, weight, out=grad_hidden[part])
            _add_product(grad_weight, p.T, h, is_first=not start)
    losses = losses.view(shape[:-1])
    return losses, None if grad_hidden is None else grad_hidden.view(shape), grad_weight


def _chunk_rows(tokens: int, row_bytes: int, limit: int) -> int:
    """Rows of equal chunks whose logits need at most `limit` bytes."""
    most = max(1, limit // row_bytes)
    most -= most % TILE if most > TILE else 0
    count = max(1, triton.cdiv(tokens, most))
    return min(most, max(1, triton.cdiv(tokens, count * TILE)) * TILE)


def _add_product(total: Tensor, a: Tensor, b: Tensor, *, is_first: bool) -> None:
    """total = a @ b, or += where it is not the first; `total` may be wider than a and b."""
    beta = 0 if is_first else 1
    if total.dtype == a.dtype:
        torch.addmm(total, a, b, beta=beta, out=total)
    elif total.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, beta=beta, out=total)
    elif is_first:
        total.copy_(a @ b)
    else:
        total += a @ b


class _HiddenGradient(torch.autograd.Function):
    """forward: the losses; backward: hidden's precomputed gradient times each token's upstream gradient."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, losses: Tensor, targets: Tensor, gradient: Tensor) -> Tensor:
        ctx.targets, ctx.gradient = targets, gradient
        return losses.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        gradient = _take(ctx)
        return gradient.mul_(torch.where(ctx.targets >= 0, grads[0], 0)[..., None]), None, None, None


class _WeightGradient(torch.autograd.Function):
    """forward: zeros like the losses; backward: weight's precomputed gradient times the upstream one."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, losses: Tensor, targets: Tensor, gradient: Tensor, scale: Any
    ) -> Tensor:
        ctx.targets, ctx.gradient, ctx.dtype, ctx.scale = targets, gradient, weight.dtype, scale
        return torch.zeros_like(losses)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        gradient = _take(ctx)
        if not grads[0].numel():
            return gradient.to(ctx.dtype), None, None, None, None
        has_target = ctx.targets.flatten() >= 0
        upstream = torch.where(has_target, grads[0].flatten(), 0)
        factor = upstream.take(has_target.byte().argmax(keepdim=True))  # [1]: torch rounds scalars to bf16
        is_uniform = ((upstream == factor) | ~has_target).all()
        torch._assert_async(is_uniform, "tokens with targets have different upstream gradients")
        return ctx.scale(gradient, factor, ctx.dtype), None, None, None, None


def _take(ctx: Any) -> Tensor:
    """The gradient, which the caller may overwrite: a second copy of weight's would not fit."""
    if ctx.gradient is None:
        raise RuntimeError("the losses of linear_cross_entropy can be differentiated only once")
    gradient, ctx.gradient = ctx.gradient, None
    return gradient


def _local_targets(targets: Tensor, first: int, size: int) -> tuple[Tensor, Tensor]:
    """[rows] targets counted from `first`, 0 where they lie elsewhere, and whether they lie here."""
    local = targets - first
    is_here = (local >= 0) & (local < size) & (targets >= 0)
    return torch.where(is_here, local, 0), is_here


def _summarize(logits: Tensor, targets: Tensor, first: int) -> Tensor:
    local, is_here = _local_targets(targets, first, logits.shape[1])
    wide = widen(logits)
    peak = wide.amax(-1)
    total = (wide - peak[:, None]).exp_().sum(-1)
    return torch.stack([peak, total, wide.gather(1, local[:, None])[:, 0] * is_here])


def _differentiate(logits: Tensor, summary: Tensor, targets: Tensor, first: int) -> Tensor:
    local, is_here = _local_targets(targets, first, logits.shape[1])
    peak, total, _ = summary[..., None]
    p = (widen(logits) - peak).exp_().div_(total)
    p.scatter_add_(1, local[:, None], -is_here.to(p.dtype)[:, None])
    return p.mul_((targets >= 0)[:, None]).to(logits.dtype)


def _scale(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    return gradient.mul_(factor).to(dtype)


@triton.jit
def _summarize_kernel(logits, targets, summary, first, rows, vocab, BLOCK: tl.constexpr):
    """One row: running maximum and sum of exponentials; logits [rows, vocab], summary [3, rows]."""
    row = tl.program_id(0)
    x_row = logits + row.to(tl.int64) * vocab
    columns = tl.arange(0, BLOCK)
    peak = -float("inf")
    total = 0.0
    for start in range(0, vocab, BLOCK):
        x = tl.load(x_row + start + columns, mask=start + columns < vocab, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(peak, tl.max(x, 0))
        total = total * tl.exp(peak - higher) + tl.sum(tl.exp(x - higher), 0)
        peak = higher
    local = tl.load(targets + row) - first
    is_here = (local >= 0) & (local < vocab)
    tl.store(summary + row, peak)
    tl.store(summary + rows + row, total)
    tl.store(summary + 2 * rows + row, tl.load(x_row + local, mask=is_here, other=0.0).to(tl.float32))


@triton.jit
def _differentiate_kernel(logits, summary, targets, first, rows, vocab, BLOCK: tl.constexpr):
    """One row of logits becomes softmax - one-hot in place, or zeros where there is no target."""
    row = tl.program_id(0)
    x_row = logits + row.to(tl.int64) * vocab
    columns = tl.arange(0, BLOCK)
    target = tl.load(targets + row)
    peak = tl.load(summary + row)
    scale = 1 / tl.load(summary + rows + row)
    for start in range(0, vocab, BLOCK):
        inside = start + columns < vocab
        x = tl.load(x_row + start + columns, mask=inside, other=0.0).to(tl.float32)
        p = tl.exp(x - peak) * scale - tl.where(start + columns == target - first, 1.0, 0.0)
        tl.store(x_row + start + columns, tl.where(target >= 0, p, 0.0), mask=inside)


@triton.jit
def _scale_kernel(gradient, factor, scaled, size, BLOCK: tl.constexpr):
    """scaled = gradient * factor; they may be the same memory."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < size
    wide = tl.load(gradient + index, mask=inside, other=0.0).to(tl.float32)
    tl.store(scaled + index, wide * tl.load(factor), mask=inside)
