"""The global router's decision: which choices an expert admits, and which of its replicas computes them.

Integer arithmetic on counts that all ranks have gathered, so all decide alike. The pool, the tokens of one
global micro-batch, has one order that no layout changes: by row and position, from a place that rotates.
Source: MiniMax-01, arXiv 2501.08313 sec. 2.1 (global router); the rule itself is ours.
"""

from fractions import Fraction
from functools import cache
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from kernels.admission import (
    Sharing,
    admit_choices,
    assign_replicas,
    count_cells,
    line_up_triton,
)
from kernels.permute import sort_choices

PIECES = 2
"""Contiguous pieces of a row that a rank may hold."""


class Places(NamedTuple):
    """Where this rank's tokens lie in the pool."""

    rows: Tensor
    """[rows] int64: numbers in the pool."""
    positions: Tensor
    """[tokens/(cp tp)] int64 in the row, the same in each."""
    num_rows: int
    """Rows of the pool."""
    row_tokens: int
    """Tokens of a row."""
    numbers: Tensor
    """[rows, tokens/(cp tp)]: number of each token in the pool."""
    split: Tensor
    """Scalar int64: tokens of a row in its first contiguous piece on this rank."""


def locate(rows: Tensor, positions: Tensor, num_rows: int, row_tokens: int) -> Places:
    """Fill in what follows from rows and positions."""
    is_second = (positions.diff(prepend=positions[:1]) > 1).cumsum(0)
    split = len(positions) - is_second.sum()
    return Places(rows, positions, num_rows, row_tokens, rows[:, None] * row_tokens + positions, split)


class Pool(Protocol):
    """The seam: what a rank knows of the others that share its micro-batch; dp x cp x tp of them.

    They form edp EP groups of consecutive ranks, of which `num_groups` consecutive ones share a capacity.
    """

    size: int
    """Ranks."""
    num_groups: int
    """EP groups that share this rank's capacity."""
    group_size: int
    """Ranks of an EP group."""
    rank: int
    """Of this process, among the ranks that share its capacity."""
    peers: slice
    """Those among all ranks."""

    def places(self, x: Tensor) -> Places:
        """Of this rank's [rows, tokens/(cp tp), ...]."""

    def sum(self, counts: Tensor) -> Tensor:
        """Over all ranks."""

    def gather(self, table: Tensor) -> Tensor:
        """[...] of each rank -> [ranks, ...]."""


class LocalPool:
    """One process: the pool is what it holds."""

    size = num_groups = group_size = 1
    rank = 0
    peers = slice(None)

    def __init__(self) -> None:
        self.known: dict[tuple[int, int, torch.device], Places] = {}

    def places(self, x: Tensor) -> Places:
        """Of this rank's [rows, tokens/(cp tp), ...]; found once for all layers that share this pool."""
        key = x.shape[0], x.shape[1], x.device
        if key not in self.known:
            self.known[key] = self._locate(*key)
        return self.known[key]

    def _locate(self, rows: int, tokens: int, device: torch.device) -> Places:
        every_row, every_token = (torch.arange(n, device=device) for n in (rows, tokens))
        return locate(every_row, every_token, rows, tokens)

    def sum(self, counts: Tensor) -> Tensor:
        """The counts themselves."""
        return counts

    def gather(self, table: Tensor) -> Tensor:
        """The table itself, as the only one."""
        return table[None]


Count = TypeVar("Count", int, Tensor)


@cache
def exact_factor(factor: float) -> Fraction:
    """What was written, rounded to a fraction with six digits."""
    return Fraction(str(factor)).limit_denominator(10**6)


def capacity(factor: float, choices: Count, num_experts: int) -> Count:
    """Choices that an expert admits of `choices` to all: ceil(factor * choices / experts), in integers."""
    exact = exact_factor(factor)
    return -(-choices * exact.numerator // (exact.denominator * num_experts))


def line_up(places: Places, offsets: Tensor, start: int) -> tuple[Tensor, Tensor]:
    """Put this rank's tokens into the pool's order.

    It begins at the first document that starts at or after place `start` (modulo the pool), and goes round:
    no place in a row is always last, and no document is cut, so that no token depends on later ones of it.
    A cell is a run of this rank's tokens that lie together in that order: what a rank holds of a piece of a
    row, without what of the row comes last of all, and this tail's pieces.

    Args:
        offsets: [rows, max_documents + 1], of the full rows.
        start: not negative.

    Returns:
        cells [cells, 2], each one's first token on this rank and the one behind its last, 0 and 0 where it is
        empty, and keys [cells], which sort the cells of all ranks.
    """
    length, rows, positions = places.row_tokens, places.rows, places.positions
    pool_tokens, tokens = places.num_rows * length, len(positions)
    start = start % pool_tokens
    if rows.is_cuda:
        return line_up_triton(
            rows, positions, places.split, offsets, num_rows=places.num_rows, row_tokens=length, start=start
        )
    later = torch.where(offsets >= start % length, offsets, length).amin(1)
    last = torch.stack([places.split, torch.full_like(places.split, tokens)])
    first = torch.stack([torch.zeros_like(places.split), places.split])  # both [PIECES], in a row
    heads = positions[first.clamp(max=tokens - 1)]
    tails = torch.where((rows == start // length)[:, None], (later[:, None] - heads).clamp(min=0), 0)
    cut = first + tails.minimum(last - first)  # [rows, PIECES]: the first token behind the tail
    ahead = (rows[:, None] * length + positions[cut.clamp(max=tokens - 1)] - start).remainder(pool_tokens)
    row = torch.arange(len(rows), device=rows.device)[:, None] * tokens
    cells = torch.stack([row + cut, (row + last).expand_as(cut)], -1).flatten(0, 1)
    tail = torch.where(cut > first, torch.stack([row + first, row + cut]), 0).sum(1)  # of one row at most
    cells, keys = torch.cat([cells, tail.T]), torch.cat([ahead.flatten(), pool_tokens + heads])
    is_empty = cells[:, 0] >= cells[:, 1]
    return torch.where(is_empty[:, None], 0, cells), torch.where(is_empty, 2 * pool_tokens, keys)


def admit(counts: Tensor, keys: Tensor, limit: Tensor | int) -> Tensor:
    """How many choices of each cell an expert admits: the first `limit` in the order of the keys.

    Args:
        counts: [ranks, cells, experts] choices. keys: [ranks, cells].
    """
    order = keys.flatten().argsort(stable=True)
    waiting = counts.flatten(0, 1)[order]
    before = waiting.cumsum(0) - waiting
    admitted = torch.empty_like(waiting)
    admitted[order] = (limit - before).clamp(min=0).minimum(waiting)
    return admitted.view_as(counts)


def spread(admitted: Tensor, room: Tensor | int) -> Tensor:
    """Level the replicas: what a group has above `room` goes to the nearest groups that have less.

    Args:
        admitted: [groups, experts].

    Returns:
        [groups, groups, experts]: choices that group g gives to group (g + distance) modulo groups.
    """
    kept = admitted.clamp(max=room)
    surplus, free = admitted - kept, room - kept
    flows = [kept]
    for distance in range(1, len(admitted)):
        flow = surplus.minimum(free.roll(-distance, 0))
        surplus = surplus - flow
        free = free - flow.roll(distance, 0)
        flows.append(flow)
    return torch.stack(flows, 1)


class Admission(NamedTuple):
    """Who computes this rank's choices."""

    replicas: Tensor
    """[tokens, top_k] number of the EP group among those that share the capacity, -1 where dropped."""
    choices: Tensor
    """[experts] choices of this rank."""
    dropped: Tensor
    """[experts] of them."""
    pooled: Tensor
    """[experts] choices of the whole pool."""


def decide_replicas(
    experts: Tensor, cells: Tensor, keys: Tensor, pool: Pool, *, num_experts: int, factor: float
) -> Admission:
    """Which EP group computes each choice, or none; one collective: all ranks' counts a cell and expert.

    Args:
        experts: [tokens, top_k], num_experts for what is padding: not counted, not admitted.
        cells, keys: as from `line_up`.
        factor: capacity of an expert relative to an equal share of the choices that share it.
    """
    if experts.is_cuda:
        return decide_replicas_triton(experts, cells, keys, pool, num_experts=num_experts, factor=factor)
    beyond = len(keys) * num_experts
    order = cells[:, 1].argsort(stable=True)  # empty cells end at 0, before all others
    ends, every_token = cells[order, 1].contiguous(), torch.arange(len(experts), device=experts.device)
    cell = order[torch.searchsorted(ends, every_token, right=True)]
    slots = torch.where(experts < num_experts, cell[:, None] * num_experts + experts, beyond).flatten()
    by_slot = sort_choices(slots, beyond)
    flat, real = by_slot.counts, slots.clamp(max=beyond - 1)
    in_slot = by_slot.inverse - (flat.cumsum(0) - flat)[real]
    counts = flat.view(len(keys), -1)
    table = pool.gather(torch.cat([keys[:, None], counts], 1))
    wanted = table[pool.peers, :, 1:]
    limit = capacity(factor, wanted.sum(), num_experts)
    admitted = admit(wanted, table[pool.peers, :, 0], limit)
    mine = admitted[pool.rank]
    replicas = torch.full_like(slots, pool.rank // pool.group_size)
    if pool.num_groups > 1:
        number = (mine.cumsum(0) - mine).flatten()[real] + in_slot  # of the rank's admitted choices
        replicas = _replica(admitted.sum(1), number, real % num_experts, pool, limit)
    is_in = (slots < beyond) & (in_slot < mine.flatten()[real])
    replicas = torch.where(is_in, replicas, -1).view_as(experts)
    choices = counts.sum(0)
    return Admission(replicas, choices, choices - mine.sum(0), table[..., 1:].sum((0, 1)))


def decide_replicas_triton(
    experts: Tensor, cells: Tensor, keys: Tensor, pool: Pool, *, num_experts: int, factor: float
) -> Admission:
    """`decide_replicas` in four launches, five in a large pool, and the collective."""
    counted = count_cells(experts, cells, keys, num_experts)
    exact = exact_factor(factor)
    sharing = Sharing(
        first=pool.peers.start or 0, rank=pool.rank, num_groups=pool.num_groups, group_size=pool.group_size,
        numerator=exact.numerator, denominator=exact.denominator,
    )  # fmt: skip
    admitted = admit_choices(pool.gather(counted.table), counted.starts, sharing)
    replicas = assign_replicas(experts, cells, counted.base, admitted, sharing)
    return Admission(replicas, admitted.choices, admitted.dropped, admitted.pooled)


def _replica(admitted: Tensor, number: Tensor, experts: Tensor, pool: Pool, limit: Tensor) -> Tensor:
    """Group of this rank's n-th admitted choice of an expert: a group gives away its last ones.

    Args:
        admitted: [ranks, experts]. number, experts: [choices].
    """
    by_group = admitted.unflatten(0, (pool.num_groups, pool.group_size))
    group, member = divmod(pool.rank, pool.group_size)
    number = number + by_group[group, :member].sum(0)[experts]
    flow = spread(by_group.sum(1), -(-limit // pool.num_groups))[group]
    distance = torch.zeros_like(number)
    for end in flow.cumsum(0)[:-1]:
        distance += number >= end[experts]
    return (group + distance) % pool.num_groups
