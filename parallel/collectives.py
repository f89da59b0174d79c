"""An axis of the process grid, and collectives over it, named by what they do forward and backward.

Each is the identity on an axis of size 1. Tensors have the same shape on all ranks of the axis.
"""

import json
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class Axis:
    """One dimension of the process grid, as seen from this rank."""

    name: str
    rank: int
    """Place of this process on the axis."""
    ranks: tuple[int, ...]
    """Ranks of the job along the axis, in order."""
    group: dist.ProcessGroup | None = None
    """Process group of these ranks; None at size 1, where every collective is the identity."""

    @property
    def size(self) -> int:
        """Count the ranks on the axis."""
        return len(self.ranks)


def all_reduce_sum(x: Tensor, axis: Axis) -> Tensor:
    """Sum x over the axis; no gradient."""
    if axis.group is not None:
        x = x.clone()
        dist.all_reduce(x, group=axis.group)
    return x


def all_gather(x: Tensor, axis: Axis, *, dim: int = 0) -> Tensor:
    """Join the ranks' parts along dim to [..., size * axis, ...]; no gradient."""
    if axis.group is None:
        return x
    x = x.movedim(dim, 0).contiguous()
    out = x.new_empty((x.shape[0] * axis.size, *x.shape[1:]))
    dist.all_gather_into_tensor(out, x, group=axis.group)
    return out.movedim(0, dim).contiguous()


def reduce_scatter(x: Tensor, axis: Axis, *, dim: int = 0) -> Tensor:
    """Sum x over the ranks, keep this rank's part along dim, [..., size / axis, ...]; no gradient."""
    if axis.group is None:
        return x
    x = x.movedim(dim, 0).contiguous()
    out = x.new_empty((x.shape[0] // axis.size, *x.shape[1:]))
    dist.reduce_scatter_tensor(out, x, group=axis.group)
    return out.movedim(0, dim).contiguous()


def gather_from_sequence(x: Tensor, axis: Axis, *, dim: int = 1) -> Tensor:
    """Join the ranks' parts of the sequence. forward: all-gather; backward: reduce-scatter."""
    return x if axis.group is None else _Gather.apply(x, axis, dim)


def scatter_to_sequence(x: Tensor, axis: Axis, *, dim: int = 1) -> Tensor:
    """Add up partial sums, keep a part of the sequence. forward: reduce-scatter; backward: all-gather."""
    return x if axis.group is None else _Scatter.apply(x, axis, dim)


def all_reduce_both(x: Tensor, axis: Axis) -> Tensor:
    """Add up x where every rank goes on with the sum in its own way. forward and backward: all-reduce."""
    return x if axis.group is None else _SumBoth.apply(x, axis)


class _SumBoth(torch.autograd.Function):
    """forward: all-reduce; backward: all-reduce."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return all_reduce_sum(x, axis)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return all_reduce_sum(grads[0], ctx.axis), None


class _Gather(torch.autograd.Function):
    """forward: all-gather on dim; backward: reduce-scatter on dim."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, dim: int) -> Tensor:
        ctx.axis, ctx.dim = axis, dim
        return all_gather(x, axis, dim=dim)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return reduce_scatter(grads[0], ctx.axis, dim=ctx.dim), None, None


class _Scatter(torch.autograd.Function):
    """forward: reduce-scatter on dim; backward: all-gather on dim."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, dim: int) -> Tensor:
        ctx.axis, ctx.dim = axis, dim
        return reduce_scatter(x, axis, dim=dim)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return all_gather(grads[0], ctx.axis, dim=ctx.dim), None, None


def from_leader(value: T, axis: Axis) -> T:
    """Broadcast the JSON value of the axis's rank 0 to all its ranks; the other ranks' values are ignored.

    It is a sum rather than `dist.broadcast`, so that rank 0 waits, too, and notices a rank that is gone.
    """
    content = json.dumps(value).encode() if axis.rank == 0 else b""
    size = int(all_reduce_sum(torch.tensor(len(content)), axis))
    sent = torch.zeros(size, dtype=torch.uint8)
    sent[: len(content)] = torch.tensor(list(content), dtype=torch.uint8)
    return json.loads(bytes(all_reduce_sum(sent, axis).tolist()))


def gather_values(value: T, axis: Axis) -> list[T]:
    """Gather every rank's JSON value, in the order of ranks, on the axis's rank 0; [] on the others."""
    if axis.group is None:
        return [value]
    padded, sizes = _pad(value, axis)
    if axis.rank:
        dist.gather(padded, dst=axis.ranks[0], group=axis.group)
        return []
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.gather(padded, parts, dst=axis.ranks[0], group=axis.group)
    return [json.loads(bytes(part[:size].numpy())) for part, size in zip(parts, sizes, strict=True)]


def all_gather_values(value: T, axis: Axis) -> list[T]:
    """Gather every rank's JSON value, in the order of ranks, on all ranks."""
    padded, sizes = _pad(value, axis)
    parts = all_gather(padded[None], axis)
    return [json.loads(bytes(part[:size].numpy())) for part, size in zip(parts, sizes, strict=True)]


def _pad(value: object, axis: Axis) -> tuple[Tensor, list[int]]:
    """The value as bytes of JSON, padded to the longest of all ranks, and every rank's size."""
    content = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)
    sizes = all_gather(torch.tensor([len(content)]), axis).tolist()
    padded = content.new_zeros(max(sizes))
    padded[: len(content)] = content
    return padded, sizes
