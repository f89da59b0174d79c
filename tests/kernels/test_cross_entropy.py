"""The chunked linear cross-entropy against the whole one: torch's passes, and the kernels in every config."""

from functools import partial

import pytest
import torch
from torch import Tensor

from kernels.cross_entropy import (
    CONFIGS,
    LOGITS_BYTES,
    Config,
    linear_cross_entropy,
    linear_cross_entropy_triton,
)
from kernels.reference import linear_cross_entropy as whole_linear_cross_entropy
from kernels.reference import widen
from tests.support.kernel_checks import DEVICE, DTYPES, check_against_twin, random_tensor

SIZES = [(1, 16, 33), (63, 24, 100), (20, 8, 1500)]
"""(tokens, hidden, vocab)."""


def inputs(tokens: int, hidden: int, vocab: int) -> list[Tensor]:
    """Hidden states, weights, targets of which some are missing; peaked enough that max and sum matter."""
    generator = torch.Generator().manual_seed(3)
    targets = torch.randint(-vocab // 4, vocab, (tokens,), generator=generator)
    targets[-1] = vocab - 1
    return [
        random_tensor(tokens, hidden, seed=1),
        random_tensor(vocab, hidden, seed=2, scale=0.7),
        targets.to(DEVICE),
    ]


def summed(op: object, hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Each loss, and their sum, which is what a caller may differentiate."""
    assert callable(op)
    losses = op(hidden, weight, targets)
    return losses.detach() + 0 * losses.sum(), losses.sum()[None]


def limit_chunks(monkeypatch: pytest.MonkeyPatch, rows: int, vocab: int, dtype: torch.dtype) -> None:
    monkeypatch.setitem(LOGITS_BYTES, DEVICE.type, rows * vocab * dtype.itemsize)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "hidden", "vocab"), SIZES)
@pytest.mark.parametrize("rows", [100, 17, 3])
def test_kernels(
    rows: int, tokens: int, hidden: int, vocab: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One chunk or few, whose products add up in the weight's dtype; many, which add up in fp32."""
    limit_chunks(monkeypatch, rows, vocab, dtype)
    ops = (partial(summed, op) for op in (linear_cross_entropy_triton, whole_linear_cross_entropy))
    check_against_twin(*ops, inputs(tokens, hidden, vocab), dtype=dtype)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_config(config: Config, dtype: torch.dtype) -> None:
    vocab = 2 * config.columns + 5
    kernel = partial(summed, partial(linear_cross_entropy_triton, config=config))
    check_against_twin(kernel, partial(summed, whole_linear_cross_entropy), inputs(3, 8, vocab), dtype=dtype)


def test_many_chunks_add_up_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hidden states that are alike: weight's gradient grows with every chunk, and so would roundings."""
    limit_chunks(monkeypatch, 1, 16, torch.float16)
    hidden, weight, targets = inputs(100, 4, 16)
    ops = (partial(summed, op) for op in (linear_cross_entropy_triton, whole_linear_cross_entropy))
    check_against_twin(*ops, [1 + hidden / 8, weight / 64, targets], dtype=torch.float16)


@pytest.mark.parametrize("op", [linear_cross_entropy, linear_cross_entropy_triton])
@pytest.mark.parametrize("rows", [1, 7, 1000])
def test_chunks_of_a_strided_hidden(rows: int, op: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any number of chunks gives the twin's losses and gradients, in [rows, tokens], too."""
    assert callable(op)
    limit_chunks(monkeypatch, rows, 33, torch.float32)
    hidden, weight, targets = inputs(40, 10, 33)
    hidden = hidden.float().view(20, 2, 10).transpose(0, 1).requires_grad_()
    weight = weight.float().requires_grad_()
    targets = targets.view(2, 20)
    losses = op(hidden, weight, targets)
    expected = whole_linear_cross_entropy(hidden.flatten(0, 1), weight, targets.flatten()).view(2, 20)
    torch.testing.assert_close(losses, expected)
    mine = torch.autograd.grad(losses.sum() / 7, (hidden, weight))
    theirs = torch.autograd.grad(expected.sum() / 7, (hidden, weight))
    torch.testing.assert_close(mine, theirs)
    assert not losses._is_view()


@pytest.mark.parametrize("op", [linear_cross_entropy, linear_cross_entropy_triton])
@pytest.mark.parametrize("parts", [2, 3])
def test_parts_of_the_vocabulary_make_the_whole(parts: int, op: object) -> None:
    """Every token's target lies in one part; losses are those of the whole, gradients add up to its."""
    assert callable(op)
    hidden, weight, targets = inputs(50, 8, 60)
    hidden, weight = hidden.float().requires_grad_(), weight.float().requires_grad_()
    size = 60 // parts
    targets[:4] = torch.tensor([size - 1, size, 2 * size - 1, 59])  # the edges of the parts
    expected = whole_linear_cross_entropy(hidden, weight, targets)
    logits = widen(hidden @ weight.T).detach().unflatten(1, (parts, size))
    peaks = logits.amax(-1)
    totals = (logits - peaks[..., None]).exp().sum(-1)
    peak = peaks.amax(-1)
    picked = logits.flatten(1).gather(1, targets.clamp(min=0)[:, None])[:, 0]
    seen = []

    def merge(summary: Tensor) -> Tensor:
        part = len(seen)
        here = (targets >= 0) & (targets // size == part)
        mine = torch.stack([peaks[:, part], totals[:, part], torch.where(here, picked, 0)])
        torch.testing.assert_close(summary, mine)
        seen.append(part)
        return torch.stack([peak, (totals * (peaks - peak[:, None]).exp()).sum(-1), picked])

    total = torch.zeros_like(hidden)
    weight_gradients = []
    for part, own in enumerate(weight.split(size)):
        leaf = own.detach().requires_grad_()
        losses = op(hidden, leaf, targets, first=part * size, merge=merge)
        torch.testing.assert_close(losses, expected)
        grad, grad_weight = torch.autograd.grad(losses.sum(), (hidden, leaf))
        total += grad
        weight_gradients.append(grad_weight)
    truth = torch.autograd.grad(expected.sum(), (hidden, weight))
    torch.testing.assert_close((total, torch.cat(weight_gradients)), truth)


def test_no_targets_and_no_tokens() -> None:
    for targets in (torch.full((3,), -1), torch.empty(0, dtype=torch.int64)):
        hidden = torch.randn(len(targets), 4, device=DEVICE, requires_grad=True)
        weight = torch.randn(5, 4, device=DEVICE, requires_grad=True)
        losses = linear_cross_entropy(hidden, weight, targets.to(DEVICE))
        assert not losses.any()
        gradients = torch.autograd.grad(losses.sum() / losses.new_zeros(()), (hidden, weight))
        assert not any(gradient.any() for gradient in gradients)


def test_gradients_may_be_asked_for_one_after_the_other_but_once() -> None:
    """Schedules that split the backward pass want hidden's first; a second time there is none left."""
    hidden, weight, targets = (x.float() if x.is_floating_point() else x for x in inputs(9, 4, 11))
    hidden.requires_grad_(), weight.requires_grad_()
    losses = linear_cross_entropy(hidden, weight, targets)
    (grad,) = torch.autograd.grad(losses.sum(), hidden, retain_graph=True)
    (grad_weight,) = torch.autograd.grad(losses.sum(), weight, retain_graph=True)
    expected = whole_linear_cross_entropy(hidden, weight, targets)
    torch.testing.assert_close((grad, grad_weight), torch.autograd.grad(expected.sum(), (hidden, weight)))
    with pytest.raises(RuntimeError, match="only once"):
        losses.sum().backward()


@pytest.mark.skipif(DEVICE.type == "cuda", reason="on a GPU the assertion ends the process")
def test_tokens_of_different_weight_are_refused() -> None:
    hidden, weight, targets = inputs(9, 4, 11)
    weight.requires_grad_()
    losses = linear_cross_entropy(hidden, weight, targets)
    with pytest.raises(RuntimeError, match="different upstream gradients"):
        (losses * torch.arange(9, device=DEVICE)).sum().backward()


def test_without_gradients_nothing_is_kept() -> None:
    hidden, weight, targets = inputs(9, 4, 11)
    weight.requires_grad_()
    with torch.no_grad():
        assert not linear_cross_entropy(hidden, weight, targets).requires_grad


def test_shapes_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match=r"hidden \(4, 3\), weight \(5, 2\)"):
        linear_cross_entropy(torch.zeros(4, 3), torch.zeros(5, 2), torch.zeros(4, dtype=torch.long))


def test_bf16_errs_no_more_than_torch() -> None:
    torch.manual_seed(2)
    hidden, weight = torch.randn(64, 32, device=DEVICE), torch.randn(100, 32, device=DEVICE) * 0.3
    targets = torch.randint(100, (64,), device=DEVICE)
    truth = whole_linear_cross_entropy(hidden, weight, targets)
    mine = linear_cross_entropy(hidden.bfloat16(), weight.bfloat16(), targets)
    plain = torch.nn.functional.cross_entropy(
        hidden.bfloat16() @ weight.bfloat16().T, targets, reduction="none"
    )
    assert mine.dtype == torch.float32
    assert (mine - truth).abs().max() <= 2 * (plain.float() - truth).abs().max()
