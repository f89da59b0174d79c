"""RMSNorm's kernels against plain torch: alone, and as DeepNorm's chain of norms, sums and two uses of h."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from kernels.reference import rms_norm as plain_rms_norm
from kernels.rms_norm import (
    Carried,
    add_carried,
    add_carried_triton,
    carry_rms_norm,
    carry_rms_norm_triton,
    rms_norm,
    rms_norm_triton,
)
from kernels.row_tiles import BACKWARD, FORWARD, Config
from tests.support.kernel_checks import DEVICE, DTYPES, check_against_twin, random_tensor

ON_GPU = DEVICE.type == "cuda"
SHAPES = [(0, 96), (1, 5), (2, 3, 96), (7, 2048), (3, 6144)]
if ON_GPU:
    SHAPES += [(1000, 6144), (1000, 8192), (4097, 2048), (1, 20000)]
CONFIGS = [Config(forward, backward) for forward in FORWARD for backward in BACKWARD]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (63, 1)])
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight = random_tensor(*shape, seed=0), random_tensor(shape[-1], seed=1)
    check_against_twin(
        partial(rms_norm_triton, eps=1e-5), partial(plain_rms_norm, eps=1e-5), [x, weight], dtype=dtype
    )


def chain(norm: Callable, add: Callable) -> Callable[..., Tensor]:
    """Two blocks' worth of norm, branch, sum; the branches are products, so that h has two different uses."""

    def run(x: Tensor, first: Tensor, second: Tensor, a: Tensor, b: Tensor) -> Tensor:
        h, carried = norm(x, first, 1e-5, 3.5)
        h, carried = norm(h * a, second, 1e-6, 0.7, carried)
        return add(carried, h * b)

    return run


def plain_chain(x: Tensor, first: Tensor, second: Tensor, a: Tensor, b: Tensor) -> Tensor:
    h = plain_rms_norm(x, first, 1e-5)
    h = plain_rms_norm(3.5 * h + h * a, second, 1e-6)
    return 0.7 * h + h * b


def chain_inputs(*shape: int) -> list[Tensor]:
    x, a, b = (random_tensor(*shape, seed=seed) for seed in (2, 3, 4))
    return [x, *(random_tensor(shape[-1], seed=seed) for seed in (5, 6)), a, b]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_deepnorm_chain(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    mine = chain(carry_rms_norm_triton, add_carried_triton)
    check_against_twin(mine, plain_chain, chain_inputs(*shape), dtype=dtype)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("size", [24, 2500])
def test_every_config(config: Config, size: int) -> None:
    def norm(*args: object) -> tuple[Tensor, Carried]:
        return carry_rms_norm_triton(*args, config=config)

    dtype = torch.bfloat16 if ON_GPU else torch.float16
    inputs = chain_inputs(1000 if ON_GPU else 13, size)
    check_against_twin(chain(norm, add_carried_triton), plain_chain, inputs, dtype=dtype)


def test_one_use_only() -> None:
    """A gradient that reaches only h, or only what is carried."""
    x, weight = random_tensor(5, 33, seed=7), random_tensor(33, seed=8)
    check_against_twin(
        lambda x, w: add_carried_triton(carry_rms_norm_triton(x, w, 1e-5, 2.5)[1], torch.zeros_like(x)),
        lambda x, w: 2.5 * plain_rms_norm(x, w, 1e-5),
        [x, weight],
        dtype=torch.float32,
    )


@pytest.mark.parametrize("dtypes", [(torch.float16, torch.float32), (torch.float32, torch.float16)])
def test_x_and_weight_of_two_dtypes(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    x, weight = random_tensor(4, 10, seed=9, dtype=dtypes[0]), random_tensor(10, seed=10, dtype=dtypes[1])
    expected = plain_rms_norm(x, weight, 1e-5)
    assert expected.dtype == torch.float32
    torch.testing.assert_close(rms_norm_triton(x, weight, 1e-5), expected, rtol=1e-3, atol=1e-3)


def test_strided_rows() -> None:
    """Parts of wider rows, columns of a transposed tensor, one row several times; gradients in wider rows."""
    wide = random_tensor(6, 4, 50, seed=11, dtype=torch.float32)
    weight = random_tensor(20, seed=12, dtype=torch.float32).requires_grad_()
    for x in (
        wide[..., 7:27],
        wide.transpose(0, 2)[7:27].transpose(0, 2),
        wide[:, :1, 7:27].expand(6, 4, 20),
    ):
        leaf = x.detach().requires_grad_()
        for upstream in (wide[..., 3:23], wide[:1, :1, :1].expand(6, 4, 20)):
            mine = torch.autograd.grad(rms_norm_triton(leaf, weight, 1e-5), (leaf, weight), upstream)
            theirs = torch.autograd.grad(plain_rms_norm(leaf, weight, 1e-5), (leaf, weight), upstream)
            torch.testing.assert_close(mine, theirs)


def test_strided_residual() -> None:
    """The residual and the gradients of both uses of h are parts of wider rows."""
    wide = random_tensor(6, 4, 50, seed=11, dtype=torch.float32)
    x = random_tensor(6, 4, 20, seed=12, dtype=torch.float32).requires_grad_()
    weight = random_tensor(20, seed=13, dtype=torch.float32).requires_grad_()
    residual = wide[..., 7:27].detach().requires_grad_()
    leaves, upstream = (x, residual, weight), (wide[..., 1:21], wide[..., 9:29])
    h, carried = carry_rms_norm_triton(x, weight, 1e-5, 2.5, Carried(residual, 1.0))
    mine = torch.autograd.grad((h, carried.tensor), leaves, upstream)
    plain = plain_rms_norm(residual + x, weight, 1e-5)
    theirs = torch.autograd.grad((plain, 2.5 * plain), leaves, upstream)
    torch.testing.assert_close((h, *mine), (plain, *theirs))


def test_normed_values_are_rounded_before_the_weight() -> None:
    """Equal entries are 1 - 5e-5 after the norm, which is 1 in fp16; the fp32 weight comes out as it is."""
    x = torch.full((2, 64), 3.0, device=DEVICE).half()
    weight = random_tensor(64, seed=13, dtype=torch.float32)
    assert torch.equal(rms_norm_triton(x, weight, 1e-3), weight.expand(2, 64))


def test_shapes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3\), \(4,\)"):
        rms_norm_triton(torch.zeros(2, 3), torch.zeros(4), 1e-5)


def test_public_functions_choose_by_device() -> None:
    dtype = torch.float16
    x, weight, _, a, b = (x.to(dtype) for x in chain_inputs(9, 40))
    expected = (rms_norm_triton if ON_GPU else plain_rms_norm)(x, weight, 1e-5)
    assert torch.equal(rms_norm(x, weight, 1e-5), expected)
    run = chain(carry_rms_norm_triton, add_carried_triton) if ON_GPU else plain_chain
    assert torch.equal(
        chain(carry_rms_norm, add_carried)(x, weight, weight, a, b), run(x, weight, weight, a, b)
    )
    assert rms_norm(x.double(), weight.double(), 1e-5).dtype == torch.float64


@pytest.mark.skipif(not ON_GPU, reason="27 GB of memory")
def test_past_2_to_the_31_entries() -> None:
    rows, size = 2**31 // 2048 + 100, 2048
    x = torch.zeros(rows, size, dtype=torch.bfloat16, device=DEVICE)
    x[-50:] = random_tensor(50, size, seed=14, dtype=torch.bfloat16)
    weight = random_tensor(size, seed=15, dtype=torch.bfloat16).requires_grad_()
    x.requires_grad_()
    y = rms_norm_triton(x, weight, 1e-5)
    (mine,) = torch.autograd.grad(y, x, x.detach() + 1)
    leaf = x[-50:].detach().requires_grad_()
    plain = plain_rms_norm(leaf, weight, 1e-5)
    (theirs,) = torch.autograd.grad(plain, leaf, leaf.detach() + 1)
    torch.testing.assert_close(y[-50:], plain, rtol=0.02, atol=0.02)
    torch.testing.assert_close(mine[-50:], theirs, rtol=0.05, atol=0.05)
