"""First half of the experts: the gate and up product of grouped rows with SwiGLU in the same pass.

Letters: T rows, H hidden, F ffn, E experts; BT, BF, BH = sizes of tiles. A tile of rows has one expert.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.grouped_gemm import check_groups, fits_grouped_mm, grouped_gemm, is_wanted
from kernels.swiglu import swiglu, swiglu_backward


class Config(NamedTuple):
    """Constants of the kernel."""

    rows: int
    """Of a tile: BT."""
    ffn: int
    """Of a tile: BF, of gate and of up each."""
    hidden: int
    """Of a step: BH."""
    group: int
    """Tiles of rows that are worked on together, so that their weights stay in L2."""
    num_warps: int
    num_stages: int


CONFIGS = [Config(128, 128, 64, 4, 8, 4)]


def gate_up_swiglu(x: Tensor, weight: Tensor, scale: Tensor, ends: Tensor) -> Tensor:
    """SiLU(x gate^T) * (x up^T) * scale with the weights of each row's expert.

    Args:
        x: [tokens, hidden], sorted by expert.
        weight: [experts, 2, ffn, hidden], gate first.
        scale: [tokens] fp32, the router's weight of each row.
        ends: [experts] int32, where each expert's rows end.

    Returns:
        [tokens, ffn].
    """
    check_groups(x, weight, ends)
    if x.is_cuda and x.dtype in (torch.bfloat16, torch.float16) and fits_grouped_mm(x, weight[:, 0]):
        return gate_up_swiglu_triton(x, weight, scale, ends)
    return swiglu(grouped_gemm(x, weight.flatten(1, 2), ends).unflatten(-1, (2, -1)), scale)


def gate_up_swiglu_triton(
    x: Tensor, weight: Tensor, scale: Tensor, ends: Tensor, config: Config = CONFIGS[0]
) -> Tensor:
    """`gate_up_swiglu` by the kernel, whatever the device; rows of x and weight are multiples of 16 bytes."""
    # Views, because the engine says of no leaf whether its gradient is wanted.
    return _GateUp.apply(x.view_as(x), weight.flatten(1, 2), scale, ends, config)


class _GateUp(torch.autograd.Function):
    """forward: one pass; backward: SwiGLU's, then a product for each gradient that this run asks for."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor, ends: Tensor, config: Config) -> Tensor:
        x, weight, scale = x.contiguous(), weight.contiguous(), scale.contiguous()
        gate_up, h = _forward(x, weight, scale, ends, config)
        ctx.save_for_backward(x, weight, scale, ends, gate_up)
        return h

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale, ends, gate_up = ctx.saved_tensors
        d_gate_up, d_scale = swiglu_backward(gate_up.unflatten(-1, (2, -1)), scale, grads[0].contiguous())
        d_gate_up = d_gate_up.flatten(1)
        d_x = F.grouped_mm(d_gate_up, weight, offs=ends) if is_wanted(ctx, 0) else None
        d_weight = F.grouped_mm(d_gate_up.T, x, offs=ends) if is_wanted(ctx, 1) else None
        return d_x, d_weight, d_scale, None, None


def _forward(x: Tensor, weight: Tensor, scale: Tensor, ends: Tensor, config: Config) -> tuple[Tensor, Tensor]:
    """gate_up [tokens, 2 * ffn] and the result."""
    (tokens, hidden), (experts, double, _) = x.shape, weight.shape
    gate_up, h = x.new_empty(tokens, double), x.new_empty(tokens, double // 2)
    if not h.numel():
        return gate_up, h
    tiles, table = _table(ends, tokens, config.rows)
    _kernel[tiles * triton.cdiv(double // 2, config.ffn),](
        TensorDescriptor.from_tensor(x, [config.rows, config.hidden]),
        TensorDescriptor.from_tensor(weight.view(experts * double, hidden), [config.ffn, config.hidden]),
        scale, table, gate_up, h, tiles, hidden, double // 2,
        BT=config.rows, BF=config.ffn, BH=config.hidden, GROUP=config.group,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return gate_up, h


def _table(ends: Tensor, tokens: int, rows: int) -> tuple[int, Tensor]:
    """At most how many tiles of rows there are; [tiles, 3] int32: expert, first row, end of its rows or 0."""
    experts = len(ends)
    tiles = triton.cdiv(tokens, rows) + experts - 1
    table = torch.empty((tiles, 3), dtype=torch.int32, device=ends.device)
    _table_kernel[triton.cdiv(tiles, 64),](
        ends, table, tiles, E=experts, BT=rows, BI=64, BE=triton.next_power_of_2(experts), num_warps=4
    )
    return tiles, table


@triton.jit(do_not_specialize=["I"])
def _table_kernel(p_ends, p_table, I, E: tl.constexpr, BT: tl.constexpr, BI: tl.constexpr, BE: tl.constexpr):  # noqa: E741
    """Grid: blocks of the I tiles. Experts come one after the other, each in tiles of BT rows."""
    o_e = tl.arange(0, BE)
    b_end = tl.load(p_ends + o_e, o_e < E, 0)
    b_start = tl.load(p_ends + o_e - 1, (o_e > 0) & (o_e < E), 0)
    b_tiles = tl.cdiv(b_end - b_start, BT)
    b_after = tl.cumsum(b_tiles, 0)
    o_i = tl.program_id(0) * BI + tl.arange(0, BI)
    b_expert = tl.sum((b_after[None, :] <= o_i[:, None]).to(tl.int32), 1)
    is_mine = (o_e[None, :] == b_expert[:, None]).to(tl.int32)
    b_first = tl.sum(is_mine * (b_start - (b_after - b_tiles) * BT)[None, :], 1) + o_i * BT
    tl.store(p_table + o_i * 3, b_expert, o_i < I)
    tl.store(p_table + o_i * 3 + 1, b_first, o_i < I)
    tl.store(p_table + o_i * 3 + 2, tl.sum(is_mine * b_end[None, :], 1), o_i < I)


@triton.jit(do_not_specialize=["I"])
def _kernel(
    d_x, d_weight, p_scale, p_table, p_gate_up, p_h, I, H, F,  # noqa: E741
    BT: tl.constexpr, BF: tl.constexpr, BH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Grid: GROUP tiles of rows by all tiles of ffn, then the next. d_: descriptors."""
    in_group = GROUP * tl.cdiv(F, BF)
    i_group = tl.program_id(0) // in_group * GROUP
    size = min(I - i_group, GROUP)
    i_t = i_group + tl.program_id(0) % in_group % size
    i_f = tl.program_id(0) % in_group // size * BF
    i_e = tl.load(p_table + 3 * i_t)
    i_row = tl.load(p_table + 3 * i_t + 1)
    rows = tl.load(p_table + 3 * i_t + 2) - i_row
    if rows > 0:
        b_gate, b_up = tl.zeros((BT, BF), tl.float32), tl.zeros((BT, BF), tl.float32)
        for i_h in range(0, H, BH):
            b_x = d_x.load([i_row, i_h])
            b_gate = tl.dot(b_x, d_weight.load([i_e * 2 * F + i_f, i_h]).T, b_gate, input_precision="ieee")
            b_up = tl.dot(b_x, d_weight.load([i_e * 2 * F + F + i_f, i_h]).T, b_up, input_precision="ieee")
        # Rows below the tile's belong to the next expert; offsets inside a tile are int32 to save registers.
        o_t, o_f = tl.arange(0, BT), tl.arange(0, BF)
        mask = (o_t < rows)[:, None] & (o_f < F - i_f)[None, :]
        b_gate, b_up = b_gate.to(p_h.dtype.element_ty), b_up.to(p_h.dtype.element_ty)
        p_gate = p_gate_up + (i_row.to(tl.int64) * 2 * F + i_f) + (o_t[:, None] * (2 * F) + o_f[None, :])
        tl.store(p_gate, b_gate, mask)
        tl.store(p_gate + F, b_up, mask)
        b_gate = b_gate.to(tl.float32)
        b_scale = tl.load(p_scale + i_row + o_t, o_t < rows, 0)[:, None]
        b_h = b_gate / (1 + tl.exp(-b_gate)) * b_up.to(tl.float32) * b_scale
        p_out = p_h + (i_row.to(tl.int64) * F + i_f) + (o_t[:, None] * F + o_f[None, :])
        tl.store(p_out, b_h.to(p_h.dtype.element_ty), mask)
