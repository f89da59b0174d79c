"""What kernels that work on whole rows share: how they are launched, and the sum of their partial results.

A program holds a tile of BT whole rows, padded to BK columns. Where weights get a gradient, a fixed number
of programs walks over all tiles, each with one row of partial sums, which a second kernel adds up in fixed
order: two runs give the same bits.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Launch(NamedTuple):
    """Constants of one kernel over rows."""

    elements: int
    """Of a tile, at most, unless a row has more: narrow rows share a program."""
    num_warps: int
    num_stages: int = 1
    """Tiles on their way into a persistent program; 1 = only the one that it works on."""

    def tile(self, size: int) -> tuple[int, int]:
        """(BT, BK) of rows of `size` entries."""
        columns = triton.next_power_of_2(size)
        return max(1, self.elements // columns), columns


class Config(NamedTuple):
    """Launches of an op's two kernels."""

    forward: Launch
    backward: Launch


FORWARD = [Launch(8192, 8), Launch(8192, 16)]
BACKWARD = [Launch(8192, 8, num_stages=3), Launch(8192, 16)]
SHARED_BYTES = 200_000
"""What the tiles on their way may take of a multiprocessor's shared memory."""


def choose_forward(size: int) -> Launch:
    """For rows of `size` entries."""
    return FORWARD[0] if size <= FORWARD[0].elements else FORWARD[1]


def choose_backward(size: int, *dtypes: torch.dtype) -> Launch:
    """For rows of `size` entries; dtypes: of the tensors that are read by tiles."""
    bt, bk = BACKWARD[0].tile(size)
    held = bt * bk * sum(dtype.itemsize for dtype in dtypes) * BACKWARD[0].num_stages
    return BACKWARD[0] if held <= SHARED_BYTES else BACKWARD[1]


def as_rows(x: Tensor) -> Tensor:
    """[..., size] -> [rows, size] of adjacent entries; a copy only if there is no such view."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(-1) == 1 else flat.contiguous()


def persistent_programs(tiles: int, device: torch.device) -> int:
    """How many programs share the tiles: one a multiprocessor, always the same, so that sums repeat."""
    is_gpu = device.type == "cuda"
    return min(tiles, torch.cuda.get_device_properties(device).multi_processor_count if is_gpu else 3)


def sum_partials(partials: Tensor, dtype: torch.dtype) -> Tensor:
    """[programs, size] fp32 -> [size], in fixed order."""
    programs, size = partials.shape
    out = torch.empty(size, dtype=dtype, device=partials.device)
    _sum_partials[(triton.cdiv(size, 64),)](partials, out, programs, size, BP=64, BK=64, num_warps=4)
    return out


@triton.jit
def load_tile(p_tensor, stride, rows, cols, mask):
    """[BT, BK] fp32 entries of rows and columns."""
    return tl.load(p_tensor + rows[:, None] * stride + cols[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _sum_partials(p_partials, p_out, P, K, BP: tl.constexpr, BK: tl.constexpr):
    cols = tl.program_id(0) * BK + tl.arange(0, BK)
    total = tl.zeros([BP, BK], tl.float32)
    for start in range(0, P, BP):
        rows = start + tl.arange(0, BP)
        mask = (rows[:, None] < P) & (cols[None, :] < K)
        total += tl.load(p_partials + rows[:, None] * K + cols[None, :], mask=mask, other=0.0)
    tl.store(p_out + cols, tl.sum(total, 0).to(p_out.dtype.element_ty), mask=cols < K)
