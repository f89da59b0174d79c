"""SwiGLU times the router's weight against its twin."""

import pytest
import torch
from torch import Tensor

from kernels.reference import swiglu as swiglu_by_halves
from kernels.swiglu import swiglu, swiglu_triton
from tests.support.kernel_checks import DEVICE, DTYPES, check_against_twin, random_tensor

SIZES = [(1, 100), (63, 100), (3, 2100)]
if DEVICE.type == "cuda":
    SIZES += [(500, 1408), (257, 9216), (4097, 1408)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "ffn"), SIZES)
def test_kernels_compute_what_their_twin_computes(tokens: int, ffn: int, dtype: torch.dtype) -> None:
    inputs = [random_tensor(tokens, 2, ffn, seed=1), random_tensor(tokens, seed=2).float()]
    check_against_twin(swiglu_triton, swiglu_by_halves, inputs, dtype=dtype)


def test_large_gates_stay_finite() -> None:
    """exp overflows where a gate is very negative."""
    gate_up = torch.tensor([[[-1e4, -100.0, 100.0, 1e4], [1.0, 2.0, 3.0, 4.0]]], device=DEVICE)
    scale = torch.ones(1, device=DEVICE)
    check_against_twin(swiglu_triton, swiglu_by_halves, [gate_up, scale], dtype=torch.float32)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="20 GB of memory")
def test_past_2_to_the_31_entries() -> None:
    """The last rows of a tensor that is too large for 32 bits, against these rows alone."""
    ffn = 9216
    tokens, last = 2**31 // (2 * ffn) + 100, 50
    gate_up = torch.zeros(tokens, 2, ffn, dtype=torch.bfloat16, device=DEVICE)
    gate_up[-last:] = random_tensor(last, 2, ffn, seed=5, dtype=torch.bfloat16)
    scale = random_tensor(tokens, seed=6, dtype=torch.float32)
    found = []
    for rows in (slice(None), slice(tokens - last, None)):
        leaves = [x[rows].detach().requires_grad_() for x in (gate_up, scale)]
        y = swiglu_triton(*leaves)
        grads = torch.autograd.grad(y, leaves, torch.ones_like(y))
        found.append([x[-last:].detach().clone() for x in (y, *grads)])
    for mine, right in zip(*found, strict=True):
        assert right.any()
        assert torch.equal(mine, right)


def test_gradients_with_any_strides_and_no_rows() -> None:
    gate_up, scale = random_tensor(5, 2, 8, seed=1).requires_grad_(), random_tensor(5, seed=2)
    found, expected = (
        torch.autograd.grad(op(gate_up, scale).sum(), gate_up)[0] for op in (swiglu_triton, swiglu_by_halves)
    )
    torch.testing.assert_close(found, expected)
    none: Tensor = swiglu_triton(gate_up[:0], scale[:0])
    assert none.shape == (0, 8)
    assert torch.autograd.grad(none.sum(), gate_up)[0].shape == gate_up.shape


def test_public_op_takes_the_twin_without_a_gpu() -> None:
    gate_up, scale = random_tensor(5, 2, 8, seed=1), random_tensor(5, seed=2)
    torch.testing.assert_close(swiglu(gate_up, scale), swiglu_by_halves(gate_up, scale))
