"""The optimizer's passes over all tensors at once: the gradients' square sum, and the AdamW step.

One launch covers many tensors: its grid is their blocks, a table tells sizes and addresses. The table is new
in every call, because gradients move. Everything is fp32, but for sums of blocks, which are fp64.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.reference import adamw as adamw_by_tensor


class Config(NamedTuple):
    """Constants of a kernel."""

    block: int
    """Elements a program."""
    num_warps: int


STEP_CONFIGS = [Config(4096, 8), Config(2048, 4), Config(1024, 4)]
SUM_CONFIGS = [Config(8192, 8), Config(4096, 4)]
"""The first of each is used: on an H100 all of them copy at the memory's speed, within 1 %."""


class Hyperparameters(NamedTuple):
    """Of one step of AdamW."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    step: int
    """This one included, so at least 1."""


class Moving(NamedTuple):
    """One parameter in the optimizer's eyes; all tensors are contiguous and have as many elements."""

    master: Tensor
    """fp32."""
    grad: Tensor
    """fp32."""
    exp_avg: Tensor
    """fp32."""
    exp_avg_sq: Tensor
    """fp32."""
    copy: Tensor | None = None
    """bf16, receives the new master."""


def adamw(parameters: Sequence[Moving], clip: Tensor, hyper: Hyperparameters) -> None:
    """One AdamW step in place, on the gradients times `clip`, an fp32 scalar on their device."""
    if clip.is_cuda:
        adamw_triton(parameters, clip, hyper)
        return
    for each in parameters:
        adamw_by_tensor(each.master, each.grad, each.exp_avg, each.exp_avg_sq, clip, *hyper)
        if each.copy is not None:
            each.copy.copy_(each.master)


def square_sum(grads: Sequence[Tensor], shares: Sequence[int]) -> Tensor:
    """Sum over all tensors of their square sum divided by their share, an fp64 scalar.

    Args:
        grads: fp32.
        shares: how many ranks count the same tensor.
    """
    if grads[0].is_cuda:
        return square_sum_triton(grads, shares)
    norms = torch.stack(torch._foreach_norm(list(grads), 2, torch.float64))
    return (norms.square() / norms.new_tensor(shares)).sum()


def adamw_triton(
    parameters: Sequence[Moving], clip: Tensor, hyper: Hyperparameters, config: Config = STEP_CONFIGS[0]
) -> None:
    """`adamw` by the kernel."""
    for launch in _launches(list(zip(*parameters, strict=True)), config.block):
        _adamw_kernel[(launch.blocks,)](
            launch.table, launch.table.shape[1], clip, hyper.lr, hyper.beta1, 1 - hyper.beta1, hyper.beta2,
            1 - hyper.beta2, hyper.eps, hyper.lr * hyper.weight_decay,
            hyper.lr / (1 - hyper.beta1**hyper.step), (1 - hyper.beta2**hyper.step) ** -0.5,
            SEARCH=launch.search, IS_ALIGNED=launch.is_aligned, BLOCK=config.block,
            num_warps=config.num_warps,
        )  # fmt: skip


def square_sum_triton(
    grads: Sequence[Tensor], shares: Sequence[int], config: Config = SUM_CONFIGS[0]
) -> Tensor:
    """`square_sum` by the kernel: fp32 sums of blocks, added in fp64 in the order of the tensors."""
    sums = [torch.zeros(1, dtype=torch.float64, device=grads[0].device)]
    for launch in _launches([grads], config.block, shares):
        sums.append(torch.empty(launch.blocks, dtype=torch.float64, device=grads[0].device))
        _square_kernel[(launch.blocks,)](
            launch.table, launch.table.shape[1], sums[-1],
            SEARCH=launch.search, IS_ALIGNED=launch.is_aligned, BLOCK=config.block,
            num_warps=config.num_warps,
        )  # fmt: skip
    return torch.stack([each.sum() for each in sums]).sum()


class _Launch(NamedTuple):
    table: Tensor
    """[2 + kinds + extra, tensors] int64: first block, size, an address of each kind (0 = none), extra."""
    blocks: int
    search: int
    """Halvings that find a block's tensor."""
    is_aligned: bool
    """Sizes are multiples of 4, addresses of 16."""


def _launches(kinds: Sequence[Sequence[Tensor | None]], block: int, *extra: Sequence[int]) -> list[_Launch]:
    """One for the tensors whose elements can be moved by fours, and one for the others.

    Args:
        kinds: of each kind all tensors; those of one parameter have the same size.
        extra: integers for each parameter.
    """
    present = [x for kind in kinds for x in kind if x is not None]
    assert all(map(Tensor.is_contiguous, present))
    sizes = [0 if x is None else x.numel() for x in kinds[0]]
    addresses = [[0 if x is None else x.data_ptr() for x in kind] for kind in kinds]
    table = torch.tensor([sizes, *addresses, *extra], dtype=torch.int64)
    divisors = torch.tensor([4] + [16] * len(kinds))
    is_aligned = (table[: len(divisors)] % divisors[:, None] == 0).all(0)
    launches = []
    for aligned, chosen in ((True, is_aligned), (False, ~is_aligned)):
        columns = table[:, chosen & (table[0] > 0)]
        if columns.shape[1]:
            ends = ((columns[0] + block - 1) // block).cumsum(0)
            first = ends.roll(1).index_fill_(0, torch.tensor(0), 0)
            rows = torch.cat([first[None], columns]).to(present[0].device, non_blocking=True)
            launches.append(_Launch(rows, int(ends[-1]), (rows.shape[1] - 1).bit_length(), aligned))
    return launches


@triton.jit
def _find(first, count, block, SEARCH: tl.constexpr):
    """The last of `count` tensors whose first block is not behind `block`."""
    found = 0
    for halving in tl.static_range(SEARCH):
        probe = found + (1 << (SEARCH - 1 - halving))
        start = tl.load(first + probe, mask=probe < count, other=0)
        found = tl.where((probe < count) & (start <= block), probe, found)
    return found


@triton.jit
def _pointer(address, offset, IS_ALIGNED: tl.constexpr):
    """fp32 pointer `offset` elements behind a number in memory."""
    pointer = tl.load(address).to(tl.pointer_type(tl.float32))
    if IS_ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer + offset


@triton.jit
def _adamw_kernel(
    table, count, clip, lr, beta1, rest1, beta2, rest2, eps, decay, rate, root,
    SEARCH: tl.constexpr, IS_ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """m, v and p of one block; `rate` and `root` hold the learning rate and the corrections of m and v."""
    block = tl.program_id(0)
    column = table + _find(table, count, block, SEARCH)
    start = (block - tl.load(column)) * BLOCK
    left = tl.load(column + count) - start
    if IS_ALIGNED:
        left = tl.multiple_of(left, 4)
    index = tl.arange(0, BLOCK)
    inside = index < left
    p_at = _pointer(column + 2 * count, start, IS_ALIGNED) + index
    g_at = _pointer(column + 3 * count, start, IS_ALIGNED) + index
    m_at = _pointer(column + 4 * count, start, IS_ALIGNED) + index
    v_at = _pointer(column + 5 * count, start, IS_ALIGNED) + index
    g = tl.load(g_at, mask=inside, other=0.0) * tl.load(clip)
    m = beta1 * tl.load(m_at, mask=inside, other=0.0) + rest1 * g
    v = beta2 * tl.load(v_at, mask=inside, other=0.0) + rest2 * g * g
    p = tl.load(p_at, mask=inside, other=0.0)
    p -= decay * p + rate * m / (tl.sqrt(v) * root + eps)  # 1 - decay would not be fp32
    tl.store(m_at, m, mask=inside)
    tl.store(v_at, v, mask=inside)
    tl.store(p_at, p, mask=inside)
    address = tl.load(column + 6 * count)
    if address != 0:
        copy = address.to(tl.pointer_type(tl.bfloat16))
        if IS_ALIGNED:
            copy = tl.multiple_of(copy, 16)
        tl.store(copy + start + index, p.to(tl.bfloat16), mask=inside)


@triton.jit
def _square_kernel(table, count, sums, SEARCH: tl.constexpr, IS_ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """Square sum of one block, divided by its tensor's share."""
    block = tl.program_id(0)
    column = table + _find(table, count, block, SEARCH)
    start = (block - tl.load(column)) * BLOCK
    left = tl.load(column + count) - start
    if IS_ALIGNED:
        left = tl.multiple_of(left, 4)
    index = tl.arange(0, BLOCK)
    g = tl.load(_pointer(column + 2 * count, start, IS_ALIGNED) + index, mask=index < left, other=0.0)
    tl.store(sums + block, tl.sum(g * g, 0).to(tl.float64) / tl.load(column + 3 * count))
