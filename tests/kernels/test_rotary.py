"""The rotary kernel against plain torch, forward and backward."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels.reference import apply_rotary, rotary_table
from kernels.rotary import rotate_, rotate_triton_
from tests.support.kernel_checks import DEVICE, DTYPES, check_against_twin, random_tensor

ON_GPU = DEVICE.type == "cuda"
SHAPES = [
    (1, 0, 4, 2),
    (1, 1, 1, 1),
    (2, 63, 4, 2),
    (3, 20, 6, 3),
    (1, 7, 64, 8),
]  # rows, tokens, heads, kv_heads
if ON_GPU:
    SHAPES += [(2, 4097, 64, 8), (1, 1000, 12, 4)]


def positions(rows: int, tokens: int) -> Tensor:
    """Far apart, up to a million."""
    return (torch.arange(rows * tokens, device=DEVICE).view(rows, tokens) * 7919) % 1_000_003


def pair(table: tuple[Tensor, Tensor], head_dim: int) -> list[Callable]:
    """Kernel and twin as functions of q and k that leave q and k as they are."""

    def kernel(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        q, k = rotate_triton_(q * 1, k * 1, table, head_dim=head_dim)
        return q * 1, k * 1  # so that the gradients belong to the kernel alone

    def twin(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        q, k = (x.unflatten(-1, (-1, head_dim)) for x in (q, k))
        return apply_rotary(q, table), apply_rotary(k, table)

    return [kernel, twin]


def inputs(rows: int, tokens: int, heads: int, kv_heads: int, head_dim: int) -> list[Tensor]:
    return [random_tensor(rows, tokens, n * head_dim, seed=n) for n in (heads, kv_heads)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(16, 8), (10, 6), (12, 12), (128, 64)])
@pytest.mark.parametrize("shape", SHAPES)
def test_against_the_twin(
    shape: tuple[int, int, int, int], head_dim: int, rotary_dim: int, dtype: torch.dtype
) -> None:
    table = rotary_table(positions(*shape[:2]), rotary_dim, 10_000.0)
    check_against_twin(*pair(table, head_dim), inputs(*shape, head_dim), dtype=dtype)


def test_works_in_place_and_leaves_the_rest() -> None:
    q, k = (x.half() for x in inputs(1, 5, 3, 1, 16))
    before = q.clone()
    turned, _ = rotate_triton_(q, k, rotary_table(positions(1, 5) + 1, 8, 100.0), head_dim=16)
    assert turned.data_ptr() == q.data_ptr()
    rest, rest_before = (x.view(1, 5, 3, 16)[..., 8:] for x in (q, before))
    assert torch.equal(rest, rest_before)
    assert not torch.equal(q, before)


def test_parts_of_one_projection() -> None:
    """q and k that are columns of one tensor are copied; one gradient for both is not turned twice."""
    both = random_tensor(2, 9, 64, seed=5, dtype=torch.float32)
    table = rotary_table(positions(2, 9), 8, 100.0)
    _, twin = pair(table, 16)
    found = []
    for op in (lambda q, k: rotate_triton_(q, k, table, head_dim=16), twin):
        leaf = both.clone().requires_grad_()
        q, k = op(*(leaf * 1).chunk(2, -1))
        found.append(torch.autograd.grad((q + k).square().sum(), leaf)[0])
    torch.testing.assert_close(*found)


def test_shapes_that_do_not_fit() -> None:
    table = rotary_table(positions(1, 4), 8, 100.0)
    with pytest.raises(ValueError, match=r"k \(1, 3, 16\)"):
        rotate_triton_(torch.zeros(1, 4, 16), torch.zeros(1, 3, 16), table, head_dim=16)
    with pytest.raises(ValueError, match="head_dim 6"):
        rotate_triton_(torch.zeros(1, 4, 12), torch.zeros(1, 4, 6), table, head_dim=6)


def test_public_function_chooses_by_device() -> None:
    q, k = (x.half() for x in inputs(1, 5, 3, 1, 16))
    table = rotary_table(positions(1, 5), 8, 100.0)
    expected = pair(table, 16)[0 if ON_GPU else 1](q, k)
    for mine, theirs in zip(rotate_(q, k, table, head_dim=16), expected, strict=True):
        assert torch.equal(mine, theirs)
