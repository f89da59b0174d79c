"""The gated norm over heads on several ranks against whole rows: values and gradients of every part."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight

from kernels.gated_norm import gated_rms_norm_triton
from kernels.reference import gated_rms_norm
from parallel.collectives import Axis, all_reduce_both
from tests.support.dist import run_distributed
from tests.support.kernel_checks import DEVICE

PARTS, SIZE = 3, 10
INTERPRETED = pytest.mark.skipif(DEVICE.type == "cuda", reason="the kernel takes CPU tensors if interpreted")


def tensors() -> list[Tensor]:
    """o, gate, weight and the upstream gradient of whole rows."""
    generator = torch.Generator().manual_seed(0)
    rows = (2, 5, PARTS * SIZE)
    return [torch.randn(shape, generator=generator) for shape in (rows, rows, rows[-1:], rows)]


def results(op: Callable, inputs: list[Tensor]) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in inputs[:3]]
    y = op(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, inputs[3])]


def compare(rank: int, op: Callable) -> None:
    tp = Axis("tp", rank, tuple(range(PARTS)), dist.group.WORLD)
    here = slice(rank * SIZE, (rank + 1) * SIZE)

    def part(*leaves: Tensor) -> Tensor:
        return op(*leaves, 1e-6, parts=PARTS, merge=lambda total: all_reduce_both(total, tp))

    whole = results(lambda *leaves: gated_rms_norm(*leaves, 1e-6), tensors())
    mine = results(part, [x[..., here].contiguous() for x in tensors()])
    torch.testing.assert_close(mine, [x[..., here] for x in whole], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("op", [gated_rms_norm, pytest.param(gated_rms_norm_triton, marks=INTERPRETED)])
def test_parts_on_ranks_are_the_whole(op: Callable) -> None:
    run_distributed(compare, PARTS, op)


class Norm(nn.Module):
    """Half of a row, the other half being the same; `merged` counts."""

    def __init__(self, op: Callable) -> None:
        super().__init__()
        self.op, self.merged = op, 0
        self.weight = nn.Parameter(torch.linspace(-1, 1, SIZE, device=DEVICE))

    def forward(self, o: Tensor, gate: Tensor) -> Tensor:
        return self.op(o, gate, self.weight, 1e-6, parts=2, merge=self.merge)

    def merge(self, total: Tensor) -> Tensor:
        self.merged += 1
        return _Twice.apply(total)


class _Twice(torch.autograd.Function):
    """As an all-reduce over two ranks: its gradient is its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return 2 * grads[0]


def test_a_pipeline_that_splits_the_backward_pass_merges_once_each_way() -> None:
    """Zero-bubble schedules run whatever leads to a weight a second time: no rank may merge there."""
    o, gate, grad = (torch.randn(7, SIZE, device=DEVICE) for _ in range(3))
    norm, twin = Norm(gated_rms_norm_triton), Norm(gated_rms_norm)
    leaves = [x.clone().requires_grad_() for x in (o, gate)]
    y = norm(*leaves).clone()  # a stage's output is no view
    found, groups = stage_backward_input([y], [grad], leaves, norm.parameters())
    assert norm.merged == 2
    stage_backward_weight(norm.parameters(), groups)
    assert norm.merged == 2
    wide = [x.clone().requires_grad_() for x in (o, gate)]
    expected = torch.autograd.grad(twin(*wide), [*wide, twin.weight], grad)
    torch.testing.assert_close([*found, norm.weight.grad], list(expected), rtol=1e-5, atol=1e-5)
