"""Expert parallelism: experts split over ep, each expert's ffn over etp, tokens brought there and back.

Every rank runs the same collectives in the same order, however few rows it has: no rows is a normal case.
Several groups of tokens are on their way at once: one's rows travel while another's experts compute.
"""

from collections.abc import Generator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kernels.permute import Sorting, permute, sort_choices, unpermute
from model.config import require_divisor
from model.moe import Compute, Experts, MoE
from model.router import Memo, Routing
from model.transformer import Transformer
from parallel.collectives import Axis, all_gather
from parallel.mesh import Mesh
from parallel.overlap import RowExchange, interleave, post, wait
from parallel.placement import Placement


def apply_expert(model: Transformer, mesh: Mesh, *, overlap_groups: int = 1) -> dict[str, Placement]:
    """Give every layer the all-to-all dispatcher and keep this rank's box of its experts, in place.

    Args:
        overlap_groups: groups of a rank's tokens that travel one after the other.

    Returns:
        Where the boxes of the experts' weights lie, by parameter name; {} where nothing is split.

    Raises:
        ValueError: ep does not divide the experts, or etp their ffn.
    """
    ep, etp = mesh.ep, mesh.etp
    placements: dict[str, Placement] = {}
    if mesh.exchange.size == etp.size == 1:
        return placements
    for axis, key in ((ep, "num_experts"), (etp, "expert_ffn_size")):
        size = getattr(model.cfg, key)
        require_divisor(f"parallel.{axis.name}", axis.size, f"model.{key}", size, most=size)
    for layer, block in model.blocks.items():
        assert isinstance(block.moe, MoE)
        block.moe.dispatcher = AllToAllDispatcher(model.cfg.num_experts, mesh, overlap_groups)
        for name, placement in _cut_experts(block.moe.experts, ep, etp).items():
            placements[f"blocks.{layer}.moe.experts.{name}"] = placement
    return placements


def _cut_experts(experts: Experts, ep: Axis, etp: Axis) -> dict[str, Placement]:
    """[experts, ...] -> [experts/ep, ...], with ffn/etp where ffn stands."""
    placements = {}
    for name, ffn_dim in (("gate_up", 2), ("down", 2)):
        whole = getattr(experts, name)
        box, offset = whole.detach(), [0] * whole.dim()
        for dim, axis in ((0, ep), (ffn_dim, etp)):
            size = whole.shape[dim] // axis.size
            offset[dim] = axis.rank * size
            box = box.narrow(dim, offset[dim], size)
        # A copy, or the whole tensor would stay alive under its box.
        setattr(experts, name, nn.Parameter(box.clone(memory_format=torch.contiguous_format)))
        placements[name] = Placement(tuple(whole.shape), tuple(offset))
    return placements


class _Trip(NamedTuple):
    """How one group of tokens travels."""

    by_place: Sorting
    """This rank's choices by destination."""
    sent: list[int]
    """Rows to each rank of the exchange."""
    received: list[int]
    """Rows from each rank of the exchange."""
    gathered: list[int]
    """Rows that each etp rank received, all of which each of them computes with."""
    arriving: Tensor
    """[etp * exchange, experts/ep]: the gathered rows by source and expert."""


class AllToAllDispatcher:
    """Sends each choice to the ranks that hold its expert; the local form's twin across ranks.

    Reads split sizes on the host: one synchronisation a layer, for all groups, and none in backward, where a
    recomputed block takes the first pass's plan over.
    Without surplus over a replica's share no row leaves its EP group.
    """

    def __init__(self, num_experts: int, mesh: Mesh, overlap_groups: int) -> None:
        self.num_experts, self.ep, self.groups = num_experts, mesh.ep, overlap_groups
        self.there, self.back = (mesh.exchange, mesh.etp), (mesh.exchange_back, mesh.etp_back)
        self.num_local_experts = num_experts // mesh.ep.size
        self.memo: Memo | None = None
        """As in Router."""

    def __call__(self, x: Tensor, routing: Routing, compute: Compute) -> Tensor:
        """[tokens, hidden] of this rank -> the same."""
        memo = self.memo or Memo()
        trips = memo.once("trips", lambda: self._plan(self._places(routing).tensor_split(self.groups)))
        parts = zip(x.tensor_split(self.groups), routing.weights.tensor_split(self.groups), strict=True)
        walks = [self._walk(*part, trip, compute) for part, trip in zip(parts, trips, strict=True)]
        return torch.cat(interleave(walks))

    def _places(self, routing: Routing) -> Tensor:
        """Where each choice goes: (rank of the exchange) * experts/ep + (expert on that rank).

        [tokens, top_k]; the only place that decides it. Dropped choices go beyond the last rank.
        """
        experts, replicas = routing.experts, routing.replicas
        if replicas is None:
            return experts + self.there[0].rank // self.ep.size * self.num_experts
        beyond = self.there[0].size * self.num_local_experts
        return torch.where(replicas >= 0, replicas * self.num_experts + experts, beyond)

    def _plan(self, places: tuple[Tensor, ...]) -> list[_Trip]:
        """Tell all ranks how many rows come from whom, in all groups; the synchronisation."""
        exchange, etp = self.there
        sortings = [sort_choices(p.flatten(), exchange.size * self.num_local_experts) for p in places]
        leaving = torch.stack([s.counts.view(exchange.size, -1) for s in sortings], 1)
        arriving = all_gather(_exchange_counts(leaving, exchange), etp)  # both [ranks, groups, experts/ep]
        sizes = torch.cat([leaving.sum(-1), arriving.sum(-1)]).T.tolist()
        trips = []
        for group, sorting in enumerate(sortings):
            sent, blocks = sizes[group][: exchange.size], sizes[group][exchange.size :]
            received = [blocks[q * exchange.size : (q + 1) * exchange.size] for q in range(etp.size)]
            gathered = [sum(rows) for rows in received]
            kept = sorting.keep(sum(sent))
            trips.append(_Trip(kept, sent, received[etp.rank], gathered, arriving[:, group]))
        return trips

    def _walk(
        self, x: Tensor, weights: Tensor, trip: _Trip, compute: Compute
    ) -> Generator[None, None, Tensor]:
        """One group's way: exchange, gather over etp, experts, and back; yields while it waits."""
        parts = x, weights.reshape(-1, 1)
        rows = tuple(permute(part, trip.by_place) for part in parts)
        exchange, etp = self.there
        rows = yield from _exchange(rows, exchange, trip.sent, trip.received)
        mine, copies = [trip.gathered[etp.rank]] * etp.size, etp.size
        if copies > 1:  # an all-to-all of copies moves no more than an all-gather, and needs no padding
            rows = tuple(part.repeat(copies, 1) for part in rows)
        rows = yield from _exchange(rows, etp, mine, trip.gathered)

        # Sources come one after the other, each sorted by expert: sort again, expert before source.
        experts = torch.arange(self.num_local_experts, device=x.device).repeat(len(trip.arriving))
        experts = experts.repeat_interleave(trip.arriving.flatten(), output_size=sum(trip.gathered))
        by_expert = sort_choices(experts, self.num_local_experts)
        rows = tuple(permute(part, by_expert) for part in rows)
        y = unpermute(compute(rows[0], rows[1].flatten(), by_expert.ends), by_expert, sum(trip.gathered))

        exchange, etp = self.back
        (y,) = yield from _exchange((y,), etp, trip.gathered, mine)
        if copies > 1:
            y = y.unflatten(0, (copies, mine[0])).sum(0)
        (y,) = yield from _exchange((y,), exchange, trip.received, trip.sent)
        return unpermute(y, trip.by_place, len(x))


def _exchange(
    rows: tuple[Tensor, ...], axis: Axis, sent: list[int], received: list[int]
) -> Generator[None, None, tuple[Tensor, ...]]:
    """Give each rank of the axis its piece of every tensor; yields between posting and waiting."""
    if axis.group is None:
        return rows
    transfer = RowExchange(axis, sent, received)
    posted = post(transfer, *rows)
    yield
    return wait(transfer, posted)


def _exchange_counts(counts: Tensor, axis: Axis) -> Tensor:
    """[axis, ...] by destination -> [axis, ...] by source."""
    if axis.group is None:
        return counts
    out = torch.empty_like(counts)
    dist.all_to_all_single(out, counts.contiguous(), group=axis.group)
    return out
