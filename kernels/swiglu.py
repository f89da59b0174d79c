"""SwiGLU of rows times the router's weight of each; backward computes it again from gate_up."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.reference import swiglu as swiglu_by_halves

FORWARD_CONFIGS = [(1, 2048, 4)]
"""(rows, columns, warps) of a program; a program walks over all columns."""
BACKWARD_CONFIGS = [(1, 2048, 8)]


def swiglu(gate_up: Tensor, scale: Tensor) -> Tensor:
    """SiLU(gate) * up * scale.

    Args:
        gate_up: [tokens, 2, ffn], gate first.
        scale: [tokens] fp32, the router's weight of each row.

    Returns:
        [tokens, ffn].
    """
    return (swiglu_triton if gate_up.is_cuda else swiglu_by_halves)(gate_up, scale)


def swiglu_triton(gate_up: Tensor, scale: Tensor) -> Tensor:
    """`swiglu` by the kernel, whatever the device."""
    return _SwiGLU.apply(gate_up, scale)


class _SwiGLU(torch.autograd.Function):
    """forward and backward: one pass over the rows each."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, scale: Tensor) -> Tensor:
        gate_up, scale = gate_up.contiguous(), scale.contiguous()
        ctx.save_for_backward(gate_up, scale)
        return _forward(gate_up, scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        gate_up, scale = ctx.saved_tensors
        return _backward(gate_up, scale, grads[0].contiguous())


def _forward(gate_up: Tensor, scale: Tensor, config: tuple[int, int, int] | None = None) -> Tensor:
    tokens, _, ffn = gate_up.shape
    out = gate_up.new_empty(tokens, ffn)
    rows, columns, warps = config or FORWARD_CONFIGS[0]
    if out.numel():
        _forward_kernel[triton.cdiv(tokens, rows),](
            gate_up, scale, out, tokens, ffn, ROWS=rows, COLUMNS=columns, num_warps=warps
        )
    return out


def _backward(
    gate_up: Tensor, scale: Tensor, grad: Tensor, config: tuple[int, int, int] | None = None
) -> tuple[Tensor, Tensor]:
    """Gradients of gate_up and scale."""
    tokens, _, ffn = gate_up.shape
    d_gate_up, d_scale = torch.empty_like(gate_up), torch.empty_like(scale)
    rows, columns, warps = config or BACKWARD_CONFIGS[0]
    if grad.numel():
        _backward_kernel[triton.cdiv(tokens, rows),](
            gate_up,
            scale,
            grad,
            d_gate_up,
            d_scale,
            tokens,
            ffn,
            ROWS=rows,
            COLUMNS=columns,
            num_warps=warps,
        )
    return d_gate_up, d_scale


@triton.jit(do_not_specialize=["tokens"])
def _forward_kernel(gate_up, scale, out, tokens, ffn, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """out = SiLU(gate) * up * scale for a few rows."""
    wide = tl.float64 if gate_up.dtype.element_ty == tl.float64 else tl.float32
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    weight = tl.load(scale + row, row < tokens, 0).to(wide)[:, None]
    for start in range(0, ffn, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        mask = (row < tokens)[:, None] & (column < ffn)[None, :]
        at = row[:, None] * (2 * ffn) + column[None, :]
        gate = tl.load(gate_up + at, mask, 0).to(wide)
        up = tl.load(gate_up + at + ffn, mask, 0).to(wide)
        silu = gate / (1 + tl.exp(-gate))
        tl.store(
            out + row[:, None] * ffn + column[None, :], (silu * up * weight).to(out.dtype.element_ty), mask
        )


@triton.jit(do_not_specialize=["tokens"])
def _backward_kernel(
    gate_up, scale, grad, d_gate_up, d_scale, tokens, ffn, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Gradients for a few rows, that of scale summed over the columns in their order."""
    wide = tl.float64 if gate_up.dtype.element_ty == tl.float64 else tl.float32
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    weight = tl.load(scale + row, row < tokens, 0).to(wide)[:, None]
    total = tl.zeros((ROWS,), wide)
    for start in range(0, ffn, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        mask = (row < tokens)[:, None] & (column < ffn)[None, :]
        at = row[:, None] * (2 * ffn) + column[None, :]
        gate = tl.load(gate_up + at, mask, 0).to(wide)
        up = tl.load(gate_up + at + ffn, mask, 0).to(wide)
        d_out = tl.load(grad + row[:, None] * ffn + column[None, :], mask, 0).to(wide)
        sigmoid = 1 / (1 + tl.exp(-gate))
        silu = gate * sigmoid
        total += tl.sum(d_out * silu * up, 1)
        d_out = d_out * weight
        d_gate = d_out * up * (sigmoid + silu * (1 - sigmoid))
        tl.store(d_gate_up + at, d_gate.to(d_gate_up.dtype.element_ty), mask)
        tl.store(d_gate_up + at + ffn, (d_out * silu).to(d_gate_up.dtype.element_ty), mask)
    tl.store(d_scale + row, total.to(d_scale.dtype.element_ty), row < tokens)
