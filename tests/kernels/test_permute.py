"""Rows sorted by expert and back: kernels against their twins, and the two as each other's transposes."""

import pytest
import torch

from kernels.permute import (
    CONFIGS,
    Sorting,
    _collect,
    _spread,
    permute,
    permute_triton,
    sort_choices,
    unpermute,
    unpermute_triton,
)
from kernels.reference import permute as permute_by_index
from kernels.reference import unpermute as unpermute_by_index
from tests.support.kernel_checks import DEVICE, DTYPES, check_against_twin, random_tensor

SIZES = [
    # tokens, top_k, hidden, choices left out
    (1, 1, 1, 0),
    (63, 2, 100, 0),
    (5, 3, 2056, 4),
    (100, 8, 1, 13),
    (3, 2, 8, 6),
]
if DEVICE.type == "cuda":
    SIZES += [(4097, 2, 2048, 0), (500, 2, 6144, 77), (400_000, 1, 6144, 5)]  # the last passes 2^31 elements


def random_sorting(tokens: int, top_k: int, left_out: int) -> Sorting:
    """Choices of 7 experts in a random order of keys, the last ones left out."""
    keys = torch.randint(7, (tokens * top_k,), generator=torch.Generator().manual_seed(tokens))
    return sort_choices(keys.to(DEVICE), 7).keep(tokens * top_k - left_out)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "top_k", "hidden", "left_out"), SIZES)
def test_kernels_move_what_their_twins_move(
    tokens: int, top_k: int, hidden: int, left_out: int, dtype: torch.dtype
) -> None:
    sorting = random_sorting(tokens, top_k, left_out)
    if (
        tokens * top_k * hidden > 2**31
    ):  # too many for arithmetic in fp64: every row holds its choice's number
        rows = torch.arange(tokens, device=DEVICE).to(dtype)[:, None].expand(-1, hidden)
        sent = permute_triton(rows, sorting)
        assert torch.equal(sent[:, 0], rows[sorting.order, 0])
        assert torch.equal(sent[:, 0], sent[:, -1])
        back = unpermute_triton(sent, sorting, tokens)
        kept = sorting.inverse < len(sent)
        assert torch.equal(back[:, -1], torch.where(kept, rows[:, 0], 0))
        return
    check_against_twin(
        lambda x: permute_triton(x, sorting),
        lambda x: permute_by_index(x, sorting.order, sorting.inverse),
        [random_tensor(tokens, hidden, seed=1)],
        dtype=dtype,
    )
    check_against_twin(
        lambda y: unpermute_triton(y, sorting, tokens),
        lambda y: unpermute_by_index(y, sorting.inverse, tokens),
        [random_tensor(tokens * top_k - left_out, hidden, seed=2)],
        dtype=dtype,
    )


@pytest.mark.parametrize("config", CONFIGS)
def test_every_config_of_rows_and_columns(config: tuple[int, int, int]) -> None:
    x, sorting = random_tensor(7, 3, seed=1, dtype=torch.float32), random_sorting(7, 2, 3)
    sent = _spread(x, sorting.order, sorting.inverse, config)
    assert torch.equal(sent, permute_by_index(x, sorting.order, sorting.inverse))
    assert torch.equal(
        _collect(sent, sorting.inverse, 7, config), unpermute_by_index(sent, sorting.inverse, 7)
    )


def test_kernels_accept_gradients_with_any_strides() -> None:
    """The gradient of a plain sum is one number expanded to all rows."""
    sorting = random_sorting(6, 2, 1)
    y = random_tensor(11, 4, seed=1).requires_grad_()
    (gradient,) = torch.autograd.grad(unpermute_triton(y, sorting, 6).sum(), y)
    assert torch.equal(gradient, torch.ones_like(y))
    x = random_tensor(4, 6, seed=2).T.requires_grad_()
    assert torch.equal(permute_triton(x, sorting), permute_by_index(x, sorting.order, sorting.inverse))


@pytest.mark.parametrize("kernel", [False, True])
def test_no_rows(kernel: bool) -> None:
    none = sort_choices(torch.full((6,), 3, device=DEVICE), 3).keep(0)
    there, back = (permute_triton, unpermute_triton) if kernel else (permute, unpermute)
    x = random_tensor(3, 4, seed=1).requires_grad_()
    y = back(there(x, none), none, 3)
    assert not y.any()
    assert not torch.autograd.grad(y.sum(), x)[0].any()
    nobody = sort_choices(torch.zeros(0, dtype=torch.long, device=DEVICE), 3)
    assert back(there(x[:0], nobody), nobody, 0).shape == (0, 4)


@pytest.mark.parametrize(("tokens", "top_k"), [(0, 2), (1, 1), (13, 3)])
def test_permute_and_unpermute_are_transposes(tokens: int, top_k: int) -> None:
    torch.manual_seed(3)
    x = torch.randn(tokens, 4, dtype=torch.float64, requires_grad=True)
    order = torch.randperm(tokens * top_k)
    inverse = order.argsort()
    sorting = Sorting(order, inverse, torch.tensor([len(order)]))
    sent = permute(x, sorting)
    torch.testing.assert_close(sent, x.repeat_interleave(top_k, 0)[order])
    back = unpermute(sent, sorting, tokens)
    torch.testing.assert_close(back, top_k * x)
    upstream = torch.randn_like(sent)
    (gradient,) = torch.autograd.grad(sent, x, upstream, retain_graph=True)
    torch.testing.assert_close(gradient, upstream[inverse].view(tokens, top_k, 4).sum(1))
    (gradient,) = torch.autograd.grad(back, x, torch.ones_like(back))
    torch.testing.assert_close(gradient, top_k * torch.ones_like(x))


def test_choices_left_out_have_no_rows_and_no_gradient() -> None:
    """Keys from num_keys on come last; without them the two are still transposes of each other."""
    torch.manual_seed(4)
    keys = torch.tensor([1, 3, 0, 1, 3, 2])  # two choices for each of three tokens; 3 is beyond the last key
    sorting = sort_choices(keys, 3).keep(4)
    assert sorting.counts.tolist() == [1, 2, 1]
    assert sorting.order.tolist() == [2, 0, 3, 5]
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    sent = permute(x, sorting)
    assert torch.equal(sent, x[torch.tensor([1, 0, 1, 2])])
    torch.testing.assert_close(unpermute(sent, sorting, 3), x * torch.tensor([[1.0], [2.0], [1.0]]))
    upstream = torch.randn(4, 4, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(sent, x, upstream)
    torch.testing.assert_close(gradient, torch.stack([upstream[1], upstream[0] + upstream[2], upstream[3]]))
    y = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda y: unpermute(y, sorting, 3), y)
    none = sort_choices(torch.full((6,), 3), 3).keep(0)
    assert not unpermute(permute(x, none), none, 3).any()
