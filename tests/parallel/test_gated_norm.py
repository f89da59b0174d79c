"""The gated norm over heads on several ranks against whole rows: values and gradients of every part."""

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from kernels.gated_norm import gated_rms_norm_triton
from kernels.reference import gated_rms_norm
from parallel.collectives import all_reduce_both
from parallel.mesh import Axis
from tests.dist import run_distributed
from tests.kernels.harness import DEVICE

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
