"""Collectives named by what they do; each is the identity at size 1."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.mesh import Mesh


def all_reduce_sum(x: Tensor, mesh: Mesh) -> Tensor:
    """Sum of x over the data-parallel ranks; no gradient. x: any shape, the same on all ranks."""
    if mesh.dp is not None:
        x = x.clone()
        dist.all_reduce(x, group=mesh.dp.get_group())
    return x


def barrier(mesh: Mesh) -> None:
    """Wait for every rank of the job."""
    if mesh.world_size > 1:
        dist.barrier()


class PoolOverRanks(nn.Module):
    """Sums router statistics over the data-parallel ranks: the pool of one global micro-batch.

    forward: all-reduce; backward: identity, because each rank differentiates its own tokens' share and the
    shares are summed with the other gradients.
    """

    def __init__(self, mesh: Mesh) -> None:
        super().__init__()
        self.mesh = mesh

    def forward(self, statistics: Tensor) -> Tensor:
        """Any shape, equal on all ranks -> their sum."""
        return _SumForward.apply(statistics, self.mesh)


class _SumForward(torch.autograd.Function):
    """forward: all-reduce; backward: identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mesh: Mesh) -> Tensor:
        return all_reduce_sum(x, mesh)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None
