"""Gradient norm over all ranks and clipping; each element counts once."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.adamw import square_sum as square_sum_of_tensors
from parallel.placement import Shard


def _gradients(shards: Sequence[Shard]) -> list[Tensor]:
    missing = [shard.name for shard in shards if shard.master.grad is None]
    assert not missing, f"no gradient reached {missing}"
    return [shard.master.grad for shard in shards if shard.master.grad is not None]


def square_sum(shards: Sequence[Shard]) -> Tensor:
    """This rank's part of the gradient's square sum, an fp64 scalar; the caller sums it over all ranks.

    In fp32 the CPU's serial sum is off by 1e-4 on half a million elements, differently for every sharding.
    """
    return square_sum_of_tensors(_gradients(shards), [shard.share for shard in shards])


def clip_factor(square: Tensor, max_norm: float) -> Tensor:
    """What brings gradients of this square sum down to max_norm, at most 1; a scalar like `square`."""
    norm = square.sqrt()
    return torch.where(norm > max_norm, max_norm / norm, 1)


def scale_gradients(shards: Sequence[Shard], factor: float) -> None:
    """Multiply all gradients, in place."""
    torch._foreach_mul_(_gradients(shards), factor)
