"""Communication that is under way while something else computes: what is posted when, forward and backward.

A transfer has two halves in the graph. forward: `post` starts it, `wait` hands over what came. backward runs
the graph's nodes in the opposite order, so the half that waited starts the gradients' transfer, and the half
that posted waits for it: what lies between the halves runs during the transfer both times.
"""

from collections.abc import Generator, Sequence
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.collectives import Axis

Result = TypeVar("Result")


class Transfer(Protocol):
    """What travels, there in the forward pass and back in the backward pass."""

    def send(self, tensors: Sequence[Tensor], *, backward: bool) -> None:
        """Start."""

    def receive(self, *, backward: bool) -> tuple[Tensor, ...]:
        """Wait for what the last `send` of that direction brings."""


def post(transfer: Transfer, *tensors: Tensor) -> Tensor:
    """Start sending; the result carries no value, it ties the two halves together in the graph."""
    return _Post.apply(transfer, *tensors)


def wait(transfer: Transfer, posted: Tensor) -> tuple[Tensor, ...]:
    """What came. `posted` is post's result, or depends on it."""
    return _Wait.apply(transfer, posted)


class _Post(torch.autograd.Function):
    """forward: starts a transfer; backward: waits for the gradients' one."""

    @staticmethod
    def forward(ctx: Any, transfer: Transfer, *tensors: Tensor) -> Tensor:
        ctx.transfer = transfer
        transfer.send(tensors, backward=False)
        return tensors[0].new_empty(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.transfer.receive(backward=True)


class _Wait(torch.autograd.Function):
    """forward: waits for a transfer; backward: starts the gradients' one."""

    @staticmethod
    def forward(ctx: Any, transfer: Transfer, posted: Tensor) -> tuple[Tensor, ...]:
        ctx.transfer = transfer
        return transfer.receive(backward=False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        ctx.transfer.send(grads, backward=True)
        return None, grads[0].new_empty(0)


class RowExchange:
    """An all-to-all of rows; backward: the all-to-all the other way. No rows is a normal case."""

    def __init__(self, axis: Axis, sent: list[int], received: list[int]) -> None:
        """Rows for each rank of the axis, and from each."""
        self.axis, self.sent, self.received = axis, sent, received
        self.works: list[dist.Work | None] = []
        self.leaving: list[Tensor] = []
        self.arriving: list[Tensor] = []

    def send(self, tensors: Sequence[Tensor], *, backward: bool) -> None:
        """Start with tensors of [sum(sent), ...] in the order of their destinations."""
        sent, received = (self.received, self.sent) if backward else (self.sent, self.received)
        for tensor in tensors:
            leaving = tensor.contiguous()
            arriving = leaving.new_empty((sum(received), *leaving.shape[1:]))
            work = dist.all_to_all_single(
                arriving, leaving, received, sent, group=self.axis.group, async_op=True
            )
            self.works.append(work)
            self.leaving.append(leaving)  # buffers live as long as the transfer
            self.arriving.append(arriving)

    def receive(self, *, backward: bool) -> tuple[Tensor, ...]:
        """Tensors of [sum(received), ...] in the order of their sources."""
        for work in self.works:
            if work is not None:
                work.wait()
        found = tuple(self.arriving)
        self.works, self.leaving, self.arriving = [], [], []
        return found


def interleave(walks: Sequence[Generator[None, None, Result]]) -> list[Result]:
    """Run generators that yield while they wait, each a step behind the one before; their results.

    In every round the latest goes first: it posts before the ones that are further on compute.
    """
    results: dict[int, Result] = {}
    started = 0
    while len(results) < len(walks):
        started = min(started + 1, len(walks))
        for number in reversed(range(started)):
            if number not in results:
                try:
                    next(walks[number])
                except StopIteration as end:
                    results[number] = end.value
    return [results[number] for number in range(len(walks))]
