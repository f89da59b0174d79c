"""Which box of each parameter this rank owns, and the fp32 tensor that is its truth.

Optimizer, norm, checkpoint and initialisation see these plain local tensors only, never a DTensor.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


@dataclass(frozen=True)
class Shard:
    """This rank's part of one parameter."""

    name: str
    """Global name."""
    shape: tuple[int, ...]
    """Global shape."""
    offset: tuple[int, ...]
    """Global index of the part's first element."""
    parameter: nn.Parameter
    """What the model computes with: a DTensor under FSDP2, perhaps bf16 in one process."""
    master: Tensor
    """[local shape] fp32 values; shares its memory with `parameter` unless that is bf16."""

    @property
    def is_copied(self) -> bool:
        """Whether the model computes with a rounded copy of the master."""
        return not isinstance(self.parameter, DTensor) and self.parameter.dtype != self.master.dtype


def local_shards(model: nn.Module) -> list[Shard]:
    """The parts of all parameters that this rank owns, before any rounded copy is made."""
    return [_shard(name, parameter) for name, parameter in model.named_parameters()]


def _shard(name: str, parameter: nn.Parameter) -> Shard:
    shape = tuple(parameter.shape)
    if not isinstance(parameter, DTensor):
        return Shard(name, shape, (0,) * len(shape), parameter, parameter.detach())
    _, offset = compute_local_shape_and_global_offset(shape, parameter.device_mesh, parameter.placements)
    local = parameter.to_local().detach()
    return Shard(name, shape, tuple(offset), parameter, local)


def collect_gradients(shards: Sequence[Shard]) -> None:
    """Hand each master the gradient that backward left on its parameter (copied ones have theirs)."""
    for shard in shards:
        if shard.is_copied:
            continue
        grad = shard.parameter.grad
        shard.master.grad = grad.to_local() if isinstance(grad, DTensor) else grad


def drop_gradients(shards: Sequence[Shard]) -> None:
    """Free all gradients."""
    for shard in shards:
        shard.parameter.grad = shard.master.grad = None


def publish(shards: Sequence[Shard]) -> None:
    """Round the masters into the copies that the model computes with, where there are any."""
    copied = [shard for shard in shards if shard.is_copied]
    if copied:
        torch._foreach_copy_([s.parameter.detach() for s in copied], [s.master for s in copied])
