"""How a kernel is compared with its twin: errors against wide arithmetic, unwritten memory, repetition.

On a machine with a GPU the kernels run as they are; elsewhere Triton interprets them (tests/conftest.py), in
fp32 and fp16 only, because its bf16 products are wrong.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE.type == "cuda" else [])]

Op = Callable[..., Any]


class Draw:
    """What random data depends on besides each tensor's own seed."""

    seed = 0
    """Of the option --data-seed: other data in every run that wants them."""


def random_tensor(*shape: int, seed: int, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> Tensor:
    """Normal numbers on DEVICE, the same on every machine for the same --data-seed."""
    draw = torch.Generator().manual_seed(seed + 1000 * Draw.seed)
    numbers = torch.randn(*shape, dtype=torch.float64, generator=draw)
    return (numbers * scale).to(DEVICE, dtype)


def outputs_and_gradients(op: Op, inputs: Sequence[Tensor], seed: int) -> list[Tensor]:
    """All results of op(*inputs), then the gradients of all floating inputs for random upstream gradients."""
    leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
    found = op(*leaves)
    found = list(found) if isinstance(found, tuple | list) else [found]
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    upstream = [random_tensor(*y.shape, seed=seed + i, dtype=y.dtype) for i, y in enumerate(found)]
    grads = torch.autograd.grad(found, wanted, upstream)
    return [*(y.detach() for y in found), *grads]


def errors(actual: Tensor, truth: Tensor) -> tuple[float, float]:
    """Relative to the truth: in the Euclidean norm, and of the largest entry."""
    difference, truth = actual.double() - truth.double(), truth.double()
    tiny = torch.finfo(torch.float64).tiny
    if not truth.numel():
        return 0.0, 0.0
    return (
        float(difference.norm() / truth.norm().clamp(min=tiny)),
        float(difference.abs().max() / truth.abs().max().clamp(min=tiny)),
    )


def check_against_twin(
    kernel: Op, twin: Op, inputs: Sequence[Tensor], *, dtype: torch.dtype, seed: int = 1
) -> None:
    """Results and gradients err at most twice as much as the twin's in the same dtype, and repeat bitwise.

    Args:
        kernel, twin: functions of the inputs; the twin is the truth when it computes in fp64.
        inputs: fp64 tensors become `dtype`, all others are passed as they are.
    """
    narrow = [x.to(dtype) if x.dtype == torch.float64 else x for x in inputs]
    # The truth is that of the rounded inputs.
    wide = [x.double() if x.is_floating_point() else x for x in narrow]
    truth = outputs_and_gradients(twin, wide, seed)
    plain = outputs_and_gradients(twin, narrow, seed)
    found = outputs_and_gradients(kernel, narrow, seed)
    again = outputs_and_gradients(kernel, narrow, seed)
    assert len(found) == len(truth)
    for number, (actual, expected, right, repeated) in enumerate(
        zip(found, plain, truth, again, strict=True)
    ):
        assert actual.shape == right.shape, f"value {number}"
        assert actual.dtype == expected.dtype, f"value {number}"
        assert actual.isfinite().all(), f"value {number} has entries that were not written, or overflowed"
        assert torch.equal(actual, repeated), f"value {number} differs between two runs"
        theirs = errors(expected, right)
        bounds = allowed_errors(theirs, actual.dtype)
        for mine, twins, bound in zip(errors(actual, right), theirs, bounds, strict=True):
            told = f"value {number}, --data-seed {Draw.seed}"
            assert mine <= bound, f"{told}: error {mine:.3g}, twin's {twins:.3g}"


def allowed_errors(theirs: tuple[float, float], dtype: torch.dtype) -> tuple[float, float]:
    """What a kernel may err by: twice the twin's errors, and what rounding the result once more may add.

    That is half of the last bit for the largest entry, and a whole one where the twin is exact by luck: below
    half of it, on average a narrow result below a quarter.
    """
    eps = torch.finfo(dtype).eps
    of_norm, of_largest = theirs
    luck = eps / 2 if dtype in (torch.float32, torch.float64) else eps / 4
    return (
        2 * of_norm + (eps if of_norm < luck else 0.0),
        2 * of_largest + (eps if of_largest < eps / 2 else eps / 2),
    )


@contextmanager
def kernels_for_every_tensor() -> Iterator[None]:
    """What tells kernels from twins is Tensor.is_cuda; softmax attention needs flash attention besides."""
    with pytest.MonkeyPatch.context() as patch:
        if DEVICE.type == "cpu":
            patch.setattr(Tensor, "is_cuda", property(lambda _: True), raising=False)
            patch.setattr("torch.cuda.get_device_capability", lambda _: (9, 0))
            patch.setattr("kernels.lightning_attention.is_supported", lambda _: True)  # in fp32, too
        yield
