"""Expert parallelism: experts split over ep, each expert's ffn over etp, tokens brought there and back.

Every rank runs the same collectives in the same order, however few rows it has: no rows is a normal case.
The state of one pass lives in `_Way`, so that several groups of tokens can be on their way at once.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kernels.permute import Sorting, permute, sort_choices, unpermute
from model.config import ModelConfig
from model.moe import Dispatched, Experts, MoE, Routing
from model.transformer import Transformer
from parallel.collectives import all_gather
from parallel.mesh import Axis, Mesh
from parallel.placement import Placement


def apply_expert(model: Transformer, mesh: Mesh) -> dict[str, Placement]:
    """Give every layer the all-to-all dispatcher and keep this rank's box of its experts, in place.

    Returns:
        Where the boxes of the experts' weights lie, by parameter name; {} where nothing is split.

    Raises:
        ValueError: ep does not divide the experts, or etp their ffn.
    """
    ep, etp = mesh.ep, mesh.etp
    placements: dict[str, Placement] = {}
    if ep.size == etp.size == 1:
        return placements
    _check_divisible(model.cfg, ep, etp)
    for layer, block in model.blocks.items():
        assert isinstance(block.moe, MoE)
        block.moe.dispatcher = AllToAllDispatcher(model.cfg.num_experts, ep, etp)
        for name, placement in _cut_experts(block.moe.experts, ep, etp).items():
            placements[f"blocks.{layer}.moe.experts.{name}"] = placement
    return placements


def _check_divisible(cfg: ModelConfig, ep: Axis, etp: Axis) -> None:
    for axis, key, size in (
        (ep, "num_experts", cfg.num_experts),
        (etp, "expert_ffn_size", cfg.expert_ffn_size),
    ):
        if size % axis.size:
            legal = [n for n in range(1, size + 1) if size % n == 0]
            raise ValueError(
                f"parallel.{axis.name}={axis.size} must divide model.{key}={size}; use one of {legal}"
            )


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


class _Way(NamedTuple):
    """How the rows of one dispatch travelled: combine goes the same way back."""

    tokens: int
    """Tokens of this rank."""
    by_place: Sorting
    """This rank's choices by destination."""
    sent: list[int]
    """Rows to each ep rank."""
    received: list[int]
    """Rows from each ep rank."""
    gathered: list[int]
    """Rows that each etp rank received, all of which each of them computes with."""
    by_expert: Sorting
    """The gathered rows by local expert."""


class AllToAllDispatcher(nn.Module):
    """Sends each choice to the ranks that hold its expert; the local form's twin across ranks.

    Reads split sizes on the host: one synchronisation a dispatch, none in combine or in backward.
    """

    def __init__(self, num_experts: int, ep: Axis, etp: Axis) -> None:
        super().__init__()
        self.ep, self.etp = ep, etp
        self.num_local_experts = num_experts // ep.size

    def _places(self, experts: Tensor) -> Tensor:
        """Where each choice goes: (rank of the exchange) * experts/ep + (expert on that rank).

        The only place that decides it. With consecutive experts on each rank this is the expert's number.
        """
        return experts

    def dispatch(self, x: Tensor, routing: Routing) -> Dispatched:
        """[tokens, hidden] of this rank -> rows of its ep and etp ranks' tokens, by local expert."""
        by_place = sort_choices(
            self._places(routing.experts.flatten()), self.ep.size * self.num_local_experts
        )
        counts = by_place.ends.diff(prepend=by_place.ends.new_zeros(1)).view(self.ep.size, -1)
        arriving = all_gather(_exchange_counts(counts, self.ep), self.etp)  # [etp * ep, experts/ep]
        sent, received, gathered = self._split_sizes(counts, arriving)

        order, inverse, _ = by_place
        own = permute(x, order, inverse), permute(routing.weights.reshape(-1, 1), order, inverse)
        rows = exchange_rows(own, sent, received, self.ep)
        rows = gather_rows(rows, gathered, self.etp)

        # Sources come one after the other, each sorted by expert: sort again, expert before source.
        experts = torch.arange(self.num_local_experts, device=x.device).repeat(len(arriving))
        experts = experts.repeat_interleave(arriving.flatten(), output_size=sum(gathered))
        by_expert = sort_choices(experts, self.num_local_experts)
        y, weights = (permute(part, by_expert.order, by_expert.inverse) for part in rows)
        way = _Way(x.shape[0], by_place, sent, received, gathered, by_expert)
        return Dispatched(y, weights[:, 0], by_expert.ends, way)

    def combine(self, y: Tensor, sent: Dispatched) -> Tensor:
        """Rows by local expert, partial sums over etp -> [tokens, hidden]: each token's sum."""
        way: _Way = sent.way
        y = unpermute(y, way.by_expert.order, way.by_expert.inverse, sum(way.gathered))
        y = scatter_rows(y, way.gathered, self.etp)
        (y,) = exchange_rows((y,), way.received, way.sent, self.ep)
        return unpermute(y, way.by_place.order, way.by_place.inverse, way.tokens)

    def _split_sizes(self, counts: Tensor, arriving: Tensor) -> tuple[list[int], list[int], list[int]]:
        """Rows sent to and received from each ep rank, and received by each etp rank; the synchronisation."""
        ep, etp = self.ep, self.etp
        sizes = torch.cat([counts.sum(1), arriving.sum(1)]).tolist()
        sent, blocks = sizes[: ep.size], sizes[ep.size :]
        received = [blocks[q * ep.size : (q + 1) * ep.size] for q in range(etp.size)]
        return sent, received[etp.rank], [sum(rows) for rows in received]


def exchange_rows(
    rows: tuple[Tensor, ...], sent: list[int], received: list[int], axis: Axis
) -> tuple[Tensor, ...]:
    """Give each rank its piece of every tensor. forward: all-to-all; backward: all-to-all the other way.

    Args:
        rows: tensors of [sum(sent), ...], in the order of their destinations.
        sent: rows for each rank of the axis.
        received: rows from each rank.

    Returns:
        Tensors of [sum(received), ...], in the order of their sources.
    """
    return rows if axis.group is None else _Exchange.apply(sent, received, axis, *rows)


def gather_rows(rows: tuple[Tensor, ...], sizes: list[int], axis: Axis) -> tuple[Tensor, ...]:
    """Join the ranks' rows. forward: all-gather of uneven parts; backward: reduce-scatter.

    An all-to-all of copies: it moves no more bytes, needs no padding, and sums in the order of the ranks.

    Args:
        rows: tensors of [sizes[this rank], ...].

    Returns:
        Tensors of [sum(sizes), ...].
    """
    if axis.group is None:
        return rows
    copies = tuple(part.repeat(axis.size, *(1 for _ in part.shape[1:])) for part in rows)
    return exchange_rows(copies, [sizes[axis.rank]] * axis.size, sizes, axis)


def scatter_rows(y: Tensor, sizes: list[int], axis: Axis) -> Tensor:
    """Add up the ranks' partial sums, keep own rows. forward: reduce-scatter; backward: all-gather.

    Args:
        y: [sum(sizes), ...].

    Returns:
        [sizes[this rank], ...].
    """
    if axis.group is None:
        return y
    mine = sizes[axis.rank]
    (parts,) = exchange_rows((y,), sizes, [mine] * axis.size, axis)
    return parts.unflatten(0, (axis.size, mine)).sum(0)


def _exchange_counts(counts: Tensor, axis: Axis) -> Tensor:
    """[axis, n] by destination -> [axis, n] by source."""
    return counts if axis.group is None else _all_to_all(counts, [1] * axis.size, [1] * axis.size, axis)


def _all_to_all(x: Tensor, sent: list[int], received: list[int], axis: Axis) -> Tensor:
    out = x.new_empty((sum(received), *x.shape[1:]))
    dist.all_to_all_single(out, x.contiguous(), received, sent, group=axis.group)
    return out


class _Exchange(torch.autograd.Function):
    """forward: all-to-all of each tensor; backward: all-to-all with the splits swapped.

    All tensors in one Function: their gradients then travel in one order on all ranks.
    """

    @staticmethod
    def forward(
        ctx: Any, sent: list[int], received: list[int], axis: Axis, *rows: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.sent, ctx.received, ctx.axis = sent, received, axis
        return tuple(_all_to_all(part, sent, received, axis) for part in rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        back = (_all_to_all(grad, ctx.received, ctx.sent, ctx.axis) for grad in grads)
        return None, None, None, *back
