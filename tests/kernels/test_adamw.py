"""The optimizer's passes over many tensors against plain torch, whatever their sizes and addresses."""

import operator

import pytest
import torch
from torch import Tensor

from kernels.adamw import (
    STEP_CONFIGS,
    SUM_CONFIGS,
    Config,
    Hyperparameters,
    Moving,
    adamw_triton,
    square_sum_triton,
)
from kernels.reference import adamw as adamw_by_tensor
from tests.support.kernel_checks import DEVICE, allowed_errors, errors, random_tensor

SIZES = [[1, 100], [0, 4, 1028], [63, 64, 0, 5000, 4096, 2], [7] * 9]
HYPER = Hyperparameters(lr=1e-2, beta1=0.8, beta2=0.9, eps=1e-3, weight_decay=0.5, step=3)


def flat(sizes: list[int], seed: int, *, shift: int = 0, scale: float = 1.0) -> list[Tensor]:
    """fp32 tensors of these sizes, all of them `shift` elements behind an aligned address."""
    return [
        random_tensor(size + shift, seed=seed + i, dtype=torch.float32, scale=scale)[shift:]
        for i, size in enumerate(sizes)
    ]


def parameters(sizes: list[int], *, shift: int = 0) -> list[Moving]:
    """Parameters in the middle of training; every second one has a bf16 copy."""
    masters, grads = flat(sizes, 10, shift=shift), flat(sizes, 30, shift=shift, scale=0.1)
    first = flat(sizes, 50, shift=shift, scale=0.05)
    second = [x.square() for x in flat(sizes, 70, scale=0.1)]
    copies = [
        torch.full_like(x, torch.nan, dtype=torch.bfloat16) if i % 2 else None for i, x in enumerate(masters)
    ]
    return [Moving(*each) for each in zip(masters, grads, first, second, copies, strict=True)]


@pytest.mark.parametrize("config", STEP_CONFIGS)
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("sizes", SIZES)
def test_step(sizes: list[int], shift: int, config: Config) -> None:
    """m, v and p err at most twice as much as plain torch's; the copy is the new p, rounded; it repeats."""
    clip = torch.tensor(0.3, device=DEVICE)
    found, again, plain = (parameters(sizes, shift=shift) for _ in range(3))
    adamw_triton(found, clip, HYPER, config)
    adamw_triton(again, clip, HYPER, config)
    truth = [Moving(*(x.double() for x in each[:4])) for each in plain]
    for each in truth:
        adamw_by_tensor(*each[:4], clip.double(), *HYPER)
    for each in plain:
        adamw_by_tensor(*each[:4], clip, *HYPER)
    for kind in range(4):
        mine, repeated, theirs, right = (
            torch.cat([each[kind] for each in many]) for many in (found, again, plain, truth)
        )
        assert torch.equal(mine, repeated)
        bounds = allowed_errors(errors(theirs, right), torch.float32)
        assert all(map(operator.le, errors(mine, right), bounds))
    tolerance = 0 if DEVICE.type == "cuda" else torch.finfo(torch.bfloat16).eps  # interpreted: towards zero
    for each in found:
        if each.copy is not None:
            torch.testing.assert_close(each.copy, each.master.bfloat16(), rtol=tolerance, atol=0)


@pytest.mark.parametrize("config", SUM_CONFIGS)
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("sizes", SIZES)
def test_square_sum(sizes: list[int], shift: int, config: Config) -> None:
    """As exact as it must be for every sharding to have the same norm, and the same in every run."""
    grads = flat(sizes, 5, shift=shift)
    shares = [1 + i % 3 for i in range(len(sizes))]
    found = square_sum_triton(grads, shares, config)
    assert torch.equal(found, square_sum_triton(grads, shares, config))
    expected = sum(x.double().square().sum() / share for x, share in zip(grads, shares, strict=True))
    assert found.dtype == torch.float64
    assert found.dim() == 0
    assert abs(found - expected) <= 1e-7 * expected


def test_a_number_that_is_not_finite_shows_in_the_sum() -> None:
    grads = flat([100, 5000], 5)
    grads[1][4999] = torch.nan
    assert square_sum_triton(grads, [1, 1]).isnan()
