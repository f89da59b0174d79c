"""Choices numbered by their key without a sort: counts of blocks, running sums over the blocks, places.

Letters: N choices in blocks of BN; X keys in blocks of BX, key X and all above are not counted and come last.
A choice's number is how many earlier ones share its key, so the order of equal keys never changes.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.device import by_device
from kernels.reference import count_keys as count_keys_by_bins


class Config(NamedTuple):
    """Constants of the kernels over choices."""

    choices: int
    """Of a block: BN."""
    keys: int
    """Compared at a time: BX."""
    num_warps: int


SCAN_BLOCKS = 256
"""Blocks of choices that a running sum takes at a time."""
CONFIGS = [Config(128, 32, 4), Config(256, 32, 4), Config(256, 32, 8)]


def ceil_div(n: int, size: int) -> int:
    """n / size, rounded up; triton.cdiv does the same in microseconds."""
    return -(-n // size)


def count_sort(keys: Tensor, num_keys: int, config: Config = CONFIGS[0]) -> tuple[Tensor, Tensor, Tensor]:
    """Sort choices by key: three launches, on GPUs only.

    Args:
        keys: [choices] int64 >= 0, num_keys or more where not counted: those keep their order and come last.

    Returns:
        order [choices] int64, the choice at each place; inverse [choices] int64, the place of each choice;
        ends [num_keys] int32, where each key's choices end.
    """
    keys = keys.contiguous()
    blocks = count_blocks(keys, num_keys, config)
    base, ends = torch.empty_like(blocks), blocks.new_empty(num_keys)
    scan = {"BB": SCAN_BLOCKS, "BX": 16, "num_warps": 4}
    _start_kernel[(ceil_div(num_keys + 1, 16),)](blocks, base, ends, len(blocks), num_keys, **scan)
    order, inverse = torch.empty_like(keys), torch.empty_like(keys)
    _place_kernel[(len(blocks),)](
        keys, base, order, inverse, keys.numel(), num_keys, BN=config.choices, num_warps=config.num_warps
    )
    return order, inverse, ends


def count_blocks(keys: Tensor, num_keys: int, config: Config = CONFIGS[0]) -> Tensor:
    """[blocks, num_keys + 1] int32: each block's choices of each key, last those that are not counted."""
    num_blocks = max(1, ceil_div(keys.numel(), config.choices))
    blocks = torch.empty((num_blocks, num_keys + 1), dtype=torch.int32, device=keys.device)
    grid = (num_blocks, ceil_div(num_keys + 1, config.keys))
    _count_kernel[grid](
        keys.contiguous(), blocks, keys.numel(), num_keys,
        BN=config.choices, BX=config.keys, num_warps=config.num_warps,
    )  # fmt: skip
    return blocks


def count_keys_triton(keys: Tensor, num_keys: int) -> Tensor:
    """`count_keys` by the kernel."""
    return count_blocks(keys, num_keys).sum(0)[:num_keys]


count_keys = by_device(count_keys_triton, count_keys_by_bins)


@triton.jit
def load_keys(p_keys, o_n, N, X):
    """Keys of choices as int32, all that are not counted as X; -1 beyond the last choice."""
    b_key = tl.minimum(tl.load(p_keys + o_n, mask=o_n < N, other=0), X).to(tl.int32)
    return tl.where(o_n < N, b_key, -1)


@triton.jit
def count_earlier(b_key, BN: tl.constexpr):
    """How many earlier choices of the block share each one's key."""
    o_n = tl.arange(0, BN)
    is_same = (b_key[None, :] == b_key[:, None]) & (o_n[None, :] < o_n[:, None])
    return tl.sum(is_same.to(tl.int32), 1)


@triton.jit
def _count_kernel(p_keys, p_blocks, N, X, BN: tl.constexpr, BX: tl.constexpr):
    """Grid: blocks of choices, blocks of keys."""
    i_b = tl.program_id(0).to(tl.int64)
    b_key = load_keys(p_keys, i_b * BN + tl.arange(0, BN), N, X)
    o_x = tl.program_id(1) * BX + tl.arange(0, BX)
    b_count = tl.sum((b_key[:, None] == o_x[None, :]).to(tl.int32), 0)
    tl.store(p_blocks + i_b * (X + 1) + o_x, b_count, mask=o_x <= X)


@triton.jit
def load_counts(p_blocks, o_b, o_x, B, X):
    """[BB, BX] counts of blocks, 0 beyond the last block or column."""
    mask = (o_b[:, None] < B) & (o_x[None, :] <= X)
    return tl.load(p_blocks + o_b[:, None].to(tl.int64) * (X + 1) + o_x[None, :], mask=mask, other=0)


@triton.jit
def scan_blocks(p_blocks, p_base, b_start, o_x, B, X, BB: tl.constexpr):
    """base[b, x] = b_start[x] + the choices of key x in blocks before b."""
    for i_b in range(0, B, BB):
        o_b = i_b + tl.arange(0, BB)
        b_count = load_counts(p_blocks, o_b, o_x, B, X)
        b_base = b_start[None, :] + tl.cumsum(b_count, 0) - b_count
        mask = (o_b[:, None] < B) & (o_x[None, :] <= X)
        tl.store(p_base + o_b[:, None].to(tl.int64) * (X + 1) + o_x[None, :], b_base, mask=mask)
        b_start += tl.sum(b_count, 0)


@triton.jit
def _start_kernel(p_blocks, p_base, p_ends, B, X, BB: tl.constexpr, BX: tl.constexpr):
    """Grid: blocks of keys. Each reads all counts of smaller keys: none has to wait for another."""
    i_x = tl.program_id(0) * BX
    b_before, b_mine = tl.zeros([BB, BX], tl.int32), tl.zeros([BB, BX], tl.int32)
    o_x = i_x + tl.arange(0, BX)
    for i_b in range(0, B, BB):
        o_b = i_b + tl.arange(0, BB)
        for x in range(0, i_x, BX):
            b_before += load_counts(p_blocks, o_b, x + tl.arange(0, BX), B, X)
        b_mine += load_counts(p_blocks, o_b, o_x, B, X)
    b_total = tl.sum(b_mine, 0)
    b_end = tl.sum(tl.sum(b_before, 0), 0) + tl.cumsum(b_total, 0)
    tl.store(p_ends + o_x, b_end, mask=o_x < X)
    scan_blocks(p_blocks, p_base, b_end - b_total, o_x, B, X, BB)


@triton.jit
def _place_kernel(p_keys, p_base, p_order, p_inverse, N, X, BN: tl.constexpr):
    """Grid: blocks of choices."""
    i_b = tl.program_id(0).to(tl.int64)
    o_n = i_b * BN + tl.arange(0, BN)
    b_key = load_keys(p_keys, o_n, N, X)
    mask = o_n < N
    b_place = tl.load(p_base + i_b * (X + 1) + b_key, mask=mask, other=0) + count_earlier(b_key, BN)
    tl.store(p_inverse + o_n, b_place.to(tl.int64), mask=mask)
    tl.store(p_order + b_place, o_n, mask=mask)
