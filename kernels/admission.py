"""The global router's decision on GPUs: model/capacity.py states its rules and is the twin of all of this.

Letters: N choices, K of each token, in blocks of BN; X experts in blocks of BX; C cells of each rank in
blocks of BC; R ranks, of which G groups of M, from rank `first` on, share a capacity.
A cell is a run of this rank's tokens, so a choice's number among the rank's choices of its expert says all.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.counting import (
    CONFIGS,
    SCAN_BLOCKS,
    ceil_div,
    count_blocks,
    count_earlier,
    load_counts,
    load_keys,
    scan_blocks,
)

CELL_BLOCK = 64
"""Cells compared with as many others at a time."""
COMPARED_CELLS = 2 * CELL_BLOCK
"""Of all that share a capacity; with more, a launch of its own puts them in order first."""


class Sharing(NamedTuple):
    """Who shares a capacity, and how much of it there is."""

    first: int
    """Number of the first rank that shares it."""
    rank: int
    """This one's, among those that share it."""
    num_groups: int
    group_size: int
    """Ranks of a group."""
    numerator: int
    denominator: int
    """An expert admits choices * numerator / (denominator * experts), rounded up."""


class Counted(NamedTuple):
    """Choices of this rank by cell, and what numbers them."""

    table: Tensor
    """[cells, 1 + experts] int64: each cell's key, then its choices of each expert."""
    base: Tensor
    """[blocks, experts + 1] int32: choices of each expert before each block."""
    starts: Tensor
    """[cells, experts] int64: choices of each expert before each cell."""


class Admitted(NamedTuple):
    """What of this rank's choices the experts admit, by their numbers."""

    limits: Tensor
    """[cells, experts] int64: the first number of a cell that is not admitted."""
    shifts: Tensor
    """[cells, experts] int64: number + shift = how many the group's ranks admit before."""
    ends: Tensor
    """[groups - 1, experts] int64: of those, where the next replica takes over."""
    choices: Tensor
    """[experts] int64: of this rank."""
    dropped: Tensor
    """[experts] int64: of them, not admitted."""
    pooled: Tensor
    """[experts] int64: choices of all ranks."""


def line_up_triton(
    rows: Tensor, positions: Tensor, split: Tensor, offsets: Tensor, *, num_rows: int, row_tokens: int,
    start: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`model.capacity.line_up` in one launch.

    Args:
        rows, positions, split, num_rows, row_tokens: of `model.capacity.Places`.
        offsets: [rows, max_documents + 1].
        start: place of the pool, below its number of tokens.
    """
    cells = positions.new_empty((2 * rows.shape[0] + 2, 2))
    keys = positions.new_empty(cells.shape[0])
    _line_up_kernel[(1,)](
        rows, positions, split, offsets.contiguous(), cells, keys, rows.shape[0], positions.shape[0],
        offsets.shape[1], row_tokens, num_rows * row_tokens, start, BR=128, BD=512, num_warps=4,
    )  # fmt: skip
    return cells, keys


def count_cells(experts: Tensor, cells: Tensor, keys: Tensor, num_experts: int) -> Counted:
    """Count choices by cell and expert: two launches.

    Args:
        experts: [tokens, top_k] int64, num_experts where not counted.
        cells, keys: from `line_up`.
    """
    config, num_cells = CONFIGS[0], cells.shape[0]
    blocks = count_blocks(experts.flatten(), num_experts, config)
    table = keys.new_empty((num_cells, 1 + num_experts))
    base, starts = torch.empty_like(blocks), keys.new_empty((num_cells, num_experts))
    grid = (num_cells + 1, ceil_div(num_experts, 16))
    _cells_kernel[grid](
        experts.contiguous(), cells, keys, blocks, table, base, starts,
        experts.numel(), len(blocks), num_cells, num_experts,
        K=experts.shape[1], BN=config.choices, BB=SCAN_BLOCKS, BX=16, num_warps=4,
    )  # fmt: skip
    return Counted(table, base, starts)


def admit_choices(tables: Tensor, starts: Tensor, sharing: Sharing) -> Admitted:
    """Decide how many choices of each cell each expert admits, and where they go.

    One launch, two if several groups share more than COMPARED_CELLS (docs/design/decisions.md).

    Args:
        tables: [ranks, cells, 1 + experts], each rank's from `count_cells`. starts: this rank's.
    """
    num_cells, num_experts = starts.shape
    limits, shifts = torch.empty_like(starts), torch.empty_like(starts)
    ends = starts.new_empty((sharing.num_groups - 1, num_experts))
    totals, order = starts.new_empty((3, num_experts)), None
    if sharing.num_groups > 1 and sharing.num_groups * sharing.group_size * num_cells > COMPARED_CELLS:
        order = order_cells(tables, sharing)
    _admit_kernel[(num_experts,)](
        tables, order, starts, limits, shifts, ends, totals, len(tables), num_cells, num_experts,
        sharing.first, sharing.rank, sharing.num_groups, sharing.group_size,
        sharing.numerator, sharing.denominator * num_experts,
        BC=CELL_BLOCK, BX=16, BG=1 << (sharing.num_groups - 1).bit_length(), num_warps=4,
    )  # fmt: skip
    return Admitted(limits, shifts, ends, *totals)


def order_cells(tables: Tensor, sharing: Sharing) -> Tensor:
    """[cells of the ranks that share] int32: their numbers by key, equal ones by number; one launch.

    Args:
        tables: [ranks, cells, 1 + experts].
    """
    num_cells = sharing.num_groups * sharing.group_size * tables.shape[1]
    order = torch.empty(num_cells, dtype=torch.int32, device=tables.device)
    _order_kernel[(ceil_div(num_cells, 16),)](
        tables, order, sharing.first * tables.shape[1], num_cells, tables.shape[2], BC=16, BO=256, num_warps=4
    )
    return order


def assign_replicas(
    experts: Tensor, cells: Tensor, base: Tensor, admitted: Admitted, sharing: Sharing
) -> Tensor:
    """[tokens, top_k] int64: group that computes each choice, -1 where none does; one launch."""
    config, (num_cells, num_experts) = CONFIGS[0], admitted.limits.shape
    replicas = torch.empty_like(experts, memory_format=torch.contiguous_format)
    _assign_kernel[(len(base),)](
        experts.contiguous(), cells, base, admitted.limits, admitted.shifts, admitted.ends, replicas,
        experts.numel(), num_cells, num_experts, sharing.rank // sharing.group_size, sharing.num_groups,
        K=experts.shape[1], BN=config.choices, num_warps=config.num_warps,
    )  # fmt: skip
    return replicas


@triton.jit(do_not_specialize=["start"])
def _line_up_kernel(
    p_rows, p_positions, p_split, p_offsets, p_cells, p_keys, rows, tokens, bounds, row_tokens,
    pool_tokens: tl.int64, start: tl.int64, BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Grid: one program. Cells: both pieces of each row without its tail, then both pieces of the tail."""
    split = tl.load(p_split)
    i_cut = -1  # number on this rank of the row that `start` lies in
    for i_r in range(0, rows, BR):
        o_r = i_r + tl.arange(0, BR)
        is_cut = tl.load(p_rows + o_r, mask=o_r < rows, other=-1) == start // row_tokens
        i_cut = tl.maximum(i_cut, tl.max(tl.where(is_cut, o_r, -1), 0))
    b_later = tl.full([BD], 0, tl.int64) + row_tokens  # where the row's next document begins
    for i_d in range(0, bounds, BD):
        o_d = i_d + tl.arange(0, BD)
        mask = (o_d < bounds) & (i_cut >= 0)
        b_offset = tl.load(p_offsets + tl.maximum(i_cut, 0) * bounds + o_d, mask=mask, other=-1).to(tl.int64)
        b_later = tl.where(b_offset >= start % row_tokens, tl.minimum(b_later, b_offset), b_later)
    later = tl.min(b_later, 0)
    for piece in tl.static_range(2):
        begin = split * piece
        size = split if piece == 0 else tokens - split
        head = tl.load(p_positions + begin, mask=size > 0, other=0)
        tail = tl.where(i_cut >= 0, tl.minimum(tl.maximum(later - head, 0), size), 0)
        for i_r in range(0, rows, BR):
            o_r = i_r + tl.arange(0, BR)
            b_begin = begin + tl.where(o_r == i_cut, tail, 0)
            has_any = (o_r < rows) & (b_begin < begin + size)
            b_row = tl.load(p_rows + o_r, mask=has_any, other=0)
            b_key = b_row * row_tokens + tl.load(p_positions + b_begin, mask=has_any, other=0) - start
            b_key = tl.where(b_key < 0, b_key + pool_tokens, b_key)
            p_cell = p_cells + (o_r * 2 + piece) * 2
            b_first = tl.where(has_any, o_r * tokens + b_begin, 0)
            tl.store(p_cell, b_first, mask=o_r < rows)
            b_last = tl.where(has_any, o_r * tokens + begin + size, 0)
            tl.store(p_cell + 1, b_last, mask=o_r < rows)
            tl.store(p_keys + o_r * 2 + piece, tl.where(has_any, b_key, 2 * pool_tokens), mask=o_r < rows)
        first = tl.where(tail > 0, i_cut * tokens + begin, 0)
        tl.store(p_cells + (rows * 2 + piece) * 2, first)
        tl.store(p_cells + (rows * 2 + piece) * 2 + 1, first + tail)
        tl.store(p_keys + rows * 2 + piece, tl.where(tail > 0, pool_tokens + head, 2 * pool_tokens))


@triton.jit
def _cells_kernel(
    p_experts, p_cells, p_keys, p_blocks, p_table, p_base, p_starts, N, B, C, X,
    K: tl.constexpr, BN: tl.constexpr, BB: tl.constexpr, BX: tl.constexpr,
):  # fmt: skip
    """Grid: cells and one more, blocks of experts; the last number the blocks, the others count the cells."""
    i_c, o_x = tl.program_id(0), tl.program_id(1) * BX + tl.arange(0, BX)
    if i_c == C:
        scan_blocks(p_blocks, p_base, tl.zeros([BX], tl.int32), o_x, B, X, BB)
    else:
        b_first = _count_before(p_experts, p_blocks, tl.load(p_cells + i_c * 2) * K, o_x, N, X, BN, BB, BX)
        b_last = _count_before(p_experts, p_blocks, tl.load(p_cells + i_c * 2 + 1) * K, o_x, N, X, BN, BB, BX)
        p_table += i_c.to(tl.int64) * (X + 1)
        tl.store(p_starts + i_c.to(tl.int64) * X + o_x, b_first.to(tl.int64), mask=o_x < X)
        tl.store(p_table + 1 + o_x, (b_last - b_first).to(tl.int64), mask=o_x < X)
        if tl.program_id(1) == 0:
            tl.store(p_table, tl.load(p_keys + i_c))


@triton.jit
def _count_before(p_experts, p_blocks, n, o_x, N, X, BN: tl.constexpr, BB: tl.constexpr, BX: tl.constexpr):
    """[BX] choices of each expert before choice n: whole blocks, and a part of n's."""
    b_count = tl.zeros([BB, BX], tl.int32)
    for i_b in range(0, n // BN, BB):
        b_count += load_counts(p_blocks, i_b + tl.arange(0, BB), o_x, n // BN, X)
    o_n = n // BN * BN + tl.arange(0, BN)
    b_key = tl.where(o_n < n, load_keys(p_experts, o_n, N, X), -1)
    return tl.sum(b_count, 0) + tl.sum((b_key[:, None] == o_x[None, :]).to(tl.int32), 0)


@triton.jit
def _load_cells(p_table, o_c, C, X, column):
    """[BC] keys and counts of consecutive ranks' cells."""
    b_key = tl.load(p_table + o_c.to(tl.int64) * (X + 1), mask=o_c < C, other=0)
    return b_key, tl.load(p_table + o_c.to(tl.int64) * (X + 1) + 1 + column, mask=o_c < C, other=0)


@triton.jit
def _is_before(b_other, o_other, b_key, o_c):
    """[cells, others]: whether the other comes first, by key, equal ones by number."""
    is_tie = (b_other[None, :] == b_key[:, None]) & (o_other[None, :] < o_c[:, None])
    return (b_other[None, :] < b_key[:, None]) | is_tie


@triton.jit
def _order_kernel(p_tables, p_order, first, C, columns, BC: tl.constexpr, BO: tl.constexpr):
    """Grid: blocks of the C cells from `first` on. No two have the same place, so none is written twice."""
    o_c = tl.program_id(0) * BC + tl.arange(0, BC)
    b_key = tl.load(p_tables + (first + o_c).to(tl.int64) * columns, mask=o_c < C, other=0)
    b_place = tl.zeros([BC], tl.int32)
    for i_o in range(0, C, BO):
        o_other = i_o + tl.arange(0, BO)
        p_other = p_tables + (first + o_other).to(tl.int64) * columns
        b_other = tl.load(p_other, mask=o_other < C, other=0)
        is_before = _is_before(b_other, o_other, b_key, o_c) & (o_other[None, :] < C)
        b_place += tl.sum(is_before.to(tl.int32), 1)
    tl.store(p_order + b_place, o_c, mask=o_c < C)


@triton.jit
def _admit(p_table, o_c, C, X, x, limit, BC: tl.constexpr):
    """[BC] choices of expert x in the cells o_c of C, and how many of them are among its first `limit`."""
    b_key, b_count = _load_cells(p_table, o_c, C, X, x)
    b_before = tl.zeros([BC], tl.int64)
    for i_c in range(0, C, BC):
        o_other = i_c + tl.arange(0, BC)
        b_other, b_waiting = _load_cells(p_table, o_other, C, X, x)
        is_before = _is_before(b_other, o_other, b_key, o_c)
        b_before += tl.sum(tl.where(is_before, b_waiting[None, :], 0), 1)
    return b_count, _take(limit - b_before, b_count)


@triton.jit
def _take(b_left, b_count):
    """How many of each cell's choices are admitted where b_left may still be."""
    return tl.minimum(tl.maximum(b_left, 0), b_count)


@triton.jit
def _admit_kernel(
    p_tables, p_order, p_starts, p_limits, p_shifts, p_ends, p_totals, R, C, X, first, rank, G, M,
    numerator, denominator, BC: tl.constexpr, BX: tl.constexpr, BG: tl.constexpr,
):  # fmt: skip
    """Grid: experts."""
    x = tl.program_id(0)
    b_pooled = tl.zeros([BC], tl.int64)
    for i_c in range(0, R * C, BC):
        _, b_count = _load_cells(p_tables, i_c + tl.arange(0, BC), R * C, X, x)
        b_pooled += b_count
    tl.store(p_totals + 2 * X + x, tl.sum(b_pooled, 0))

    p_peers, peer_cells = p_tables + first * C * (X + 1), G * M * C
    b_wanted = tl.zeros([BC, BX], tl.int64)
    for i_c in range(0, peer_cells, BC):
        o_c = i_c + tl.arange(0, BC)
        for i_x in range(0, X, BX):
            o_x = i_x + tl.arange(0, BX)
            mask = (o_c[:, None] < peer_cells) & (o_x[None, :] < X)
            p_count = p_peers + o_c[:, None].to(tl.int64) * (X + 1) + 1 + o_x[None, :]
            b_wanted += tl.load(p_count, mask=mask, other=0)
    limit = (tl.sum(tl.sum(b_wanted, 0), 0) * numerator + denominator - 1) // denominator

    group, member = rank // M, rank % M
    b_earlier = tl.zeros([BC], tl.int64)  # admitted of ranks before this one in its group
    if BG > 1:
        o_g = tl.arange(0, BG)
        b_group = tl.zeros([BG], tl.int64)
        left = limit  # what the cells in order may still have, negative once they have had all
        for i_c in range(0, peer_cells, BC):
            o_c = i_c + tl.arange(0, BC)
            if p_order is None:
                _, b_admitted = _admit(p_peers, o_c, peer_cells, X, x, limit, BC)
            else:
                o_c = tl.load(p_order + o_c, mask=o_c < peer_cells, other=peer_cells)
                _, b_count = _load_cells(p_peers, o_c, peer_cells, X, x)
                b_admitted = _take(left - tl.cumsum(b_count, 0) + b_count, b_count)
                left -= tl.sum(b_count, 0)
            o_rank = o_c // C
            is_earlier = (o_rank // M == group) & (o_rank % M < member)
            b_earlier += tl.where(is_earlier, b_admitted, 0)
            b_mine = tl.where((o_rank // M)[:, None] == o_g[None, :], b_admitted[:, None], 0)
            b_group += tl.sum(b_mine, 0)
        _store_ends(p_ends + x, b_group, (limit + G - 1) // G, group, G, X, BG)

    shift = tl.sum(b_earlier, 0)
    b_choices, b_dropped = tl.zeros([BC], tl.int64), tl.zeros([BC], tl.int64)
    for i_c in range(0, C, BC):
        o_own = i_c + tl.arange(0, BC)
        is_own = o_own < C
        o_c = tl.where(is_own, rank * C + o_own, peer_cells)
        b_count, b_admitted = _admit(p_peers, o_c, peer_cells, X, x, limit, BC)
        p_own = o_own.to(tl.int64) * X + x
        b_start = tl.load(p_starts + p_own, mask=is_own, other=0)
        tl.store(p_limits + p_own, b_start + b_admitted, mask=is_own)
        b_shift = shift + tl.cumsum(b_admitted, 0) - b_admitted - b_start
        tl.store(p_shifts + p_own, b_shift, mask=is_own)
        shift += tl.sum(b_admitted, 0)
        b_choices += b_count
        b_dropped += b_count - b_admitted
    tl.store(p_totals + x, tl.sum(b_choices, 0))
    tl.store(p_totals + X + x, tl.sum(b_dropped, 0))


@triton.jit
def _store_ends(p_ends, b_group, room, group, G, X, BG: tl.constexpr):
    """Level the replicas of an expert, as `model.capacity.spread` does, and keep what `group` gives away."""
    o_g = tl.arange(0, BG)
    b_surplus, b_kept = tl.maximum(b_group - room, 0), tl.minimum(b_group, room)
    b_free = tl.where(o_g < G, room - b_kept, 0)
    end = tl.sum(tl.where(o_g == group, b_kept, 0), 0)
    for distance in range(1, G):
        tl.store(p_ends + (distance - 1) * X, end)
        is_pair = o_g[None, :] == ((o_g + distance) % G)[:, None]  # [from, to]
        is_pair = is_pair & (o_g < G)[:, None]
        b_flow = tl.minimum(b_surplus, tl.sum(tl.where(is_pair, b_free[None, :], 0), 1))
        b_surplus -= b_flow
        b_free -= tl.sum(tl.where(is_pair, b_flow[:, None], 0), 0)
        end += tl.sum(tl.where(o_g == group, b_flow, 0), 0)


@triton.jit
def _assign_kernel(
    p_experts, p_cells, p_base, p_limits, p_shifts, p_ends, p_replicas, N, C, X, group, G,
    K: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Grid: blocks of choices."""
    i_b = tl.program_id(0).to(tl.int64)
    o_n = i_b * BN + tl.arange(0, BN)
    b_key = load_keys(p_experts, o_n, N, X)
    b_cell = tl.zeros([BN], tl.int64)
    for i_c in range(C):
        b_is_in = (o_n >= tl.load(p_cells + i_c * 2) * K) & (o_n < tl.load(p_cells + i_c * 2 + 1) * K)
        b_cell = tl.where(b_is_in, i_c, b_cell)
    mask = (o_n < N) & (b_key < X)
    b_number = tl.load(p_base + i_b * (X + 1) + b_key, mask=mask, other=0) + count_earlier(b_key, BN)
    b_is_in = b_number < tl.load(p_limits + b_cell * X + b_key, mask=mask, other=0)
    b_shifted = b_number + tl.load(p_shifts + b_cell * X + b_key, mask=mask, other=0)
    b_distance = tl.zeros([BN], tl.int64)
    for distance in range(G - 1):
        b_end = tl.load(p_ends + distance * X + b_key, mask=mask, other=0)
        b_distance += (b_shifted >= b_end).to(tl.int64)
    tl.store(p_replicas + o_n, tl.where(mask & b_is_in, (group + b_distance) % G, -1), mask=o_n < N)
