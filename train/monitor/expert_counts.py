"""What the routers counted since the last record, summed over the job: one host read an interval."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from model.router import Router
from parallel.collectives import Axis
from parallel.pipeline import gather_layers


class ExpertCounts(NamedTuple):
    """Of all layers; choices since the last record, losses of the last step."""

    load: Tensor
    """[layers, experts] choices, before any was dropped."""
    dropped: Tensor
    """[layers, experts] choices."""
    moved: Tensor
    """[layers] choices that another EP group computed."""
    losses: Tensor
    """[layers, 3]: aux loss, z-loss, entropy in nats; means over the pool and the micro-batches."""

    @property
    def max_violation(self) -> Tensor:
        """[layers]: max / mean - 1 of the load."""
        return self.load.amax(1) / self.load.double().mean(1) - 1

    def summary(self) -> dict[str, float]:
        """What metrics.jsonl holds of them."""
        choices = self.load.sum().item()
        aux, z, entropy = self.losses.mean(0).tolist()
        return {
            "aux_loss": aux,
            "z_loss": z,
            "router_entropy": entropy,
            "drop_rate": self.dropped.sum().item() / choices,
            "moved_rate": self.moved.sum().item() / choices,
            "max_violation": self.max_violation.max().item(),
        }

    def record(self) -> dict[str, Any]:
        """What experts.jsonl holds of them."""
        return {
            "load": self.load.tolist(),
            "dropped": self.dropped.tolist(),
            "moved": self.moved.tolist(),
            "max_violation": self.max_violation.tolist(),
            "entropy": self.losses[:, 2].tolist(),
            "aux_loss": self.losses[:, 0].tolist(),
        }


def read_counts(
    routers: Sequence[Router], layers: Sequence[int], num_layers: int, num_micro: int, world: Axis
) -> ExpertCounts:
    """Sum the routers' statistics over all ranks and start the next interval.

    Args:
        routers: those of this rank's layers.
        layers: numbers of these layers in the model.
        num_layers: layers of the whole model.
        num_micro: micro-batches of a step.
        world: all ranks of the job.
    """
    counts = torch.stack([torch.cat([r.load, r.dropped, r.moved[None]]) for r in routers])
    losses = torch.stack([r.losses for r in routers]) / num_micro
    for router in routers:
        for buffer in (router.load, router.dropped, router.moved):
            buffer.zero_()
    counts, losses = (gather_layers(part, layers, num_layers, world).cpu() for part in (counts, losses))
    load, dropped = counts[:, :-1].chunk(2, dim=1)
    return ExpertCounts(load, dropped, counts[:, -1], losses)
