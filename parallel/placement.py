"""Which box of each parameter this rank owns, and the fp32 tensor that is its truth.

The optimizer, the norm, the checkpoint and the initialisation see these plain local tensors only, never a
DTensor. A box is cut by a model-parallel axis first (`Placement`), then by FSDP2.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from parallel.collectives import Axis


@dataclass(frozen=True)
class Placement:
    """The box of a parameter that tensor or expert parallelism left on this rank."""

    shape: tuple[int, ...]
    """Global shape."""
    offset: tuple[int, ...]
    """Global index of the box's first element."""
    share: int = 1
    """Consecutive tp ranks that hold this same box; each has a part of its gradient."""


@dataclass(frozen=True)
class Shard:
    """This rank's part of one parameter."""

    name: str
    """Global name."""
    shape: tuple[int, ...]
    """Global shape."""
    offset: tuple[int, ...]
    """Global index of the part's first element."""
    share: int
    """tp ranks that hold the same part."""
    is_first: bool
    """Whether this is the first of them, the one that writes it into a checkpoint."""
    parameter: nn.Parameter
    """What the model computes with: a DTensor under FSDP2, perhaps bf16 without."""
    master: Tensor
    """[local shape] fp32 values; shares its memory with `parameter` unless that is a copy."""

    @property
    def is_copied(self) -> bool:
        """Whether the model computes with a copy of the master, rounded or on another device."""
        if isinstance(self.parameter, DTensor):
            return False
        mine, master = self.parameter, self.master
        return mine.dtype != master.dtype or mine.device != master.device


def local_shards(model: nn.Module, placements: Mapping[str, Placement], tp: Axis) -> list[Shard]:
    """The parts of all parameters that this rank owns; `placements` names what tp, ep or etp cut."""
    shards = []
    for name, parameter in model.named_parameters():
        local_shape = tuple(parameter.shape)
        origin = (0,) * len(local_shape)
        share = 1 if ".experts." in name else tp.size  # experts live on the expert grid
        placement = placements.get(name) or Placement(local_shape, origin, share)
        inner, master = origin, parameter.detach()
        if isinstance(parameter, DTensor):
            where = compute_local_shape_and_global_offset(
                local_shape, parameter.device_mesh, parameter.placements
            )
            inner, master = tuple(where[1]), parameter.to_local().detach()
        offset = tuple(a + b for a, b in zip(placement.offset, inner, strict=True))
        is_first = tp.rank % placement.share == 0
        shards.append(Shard(name, placement.shape, offset, placement.share, is_first, parameter, master))
    return shards


def publish(shards: Sequence[Shard]) -> None:
    """Write the masters into the copies that the model computes with, where there are any."""
    copied = [shard for shard in shards if shard.is_copied]
    if copied:
        torch._foreach_copy_([s.parameter.detach() for s in copied], [s.master for s in copied])
