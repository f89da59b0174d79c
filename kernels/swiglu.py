"""SwiGLU of rows times the router's weight of each; backward computes it again from gate_up.

Letters: T rows, F = ffn; BT, BF = sizes of tiles.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.device import by_device
from kernels.reference import swiglu as swiglu_by_halves

CONFIG = (2, 1024, 8)
"""(BT, BF, warps) of a program, which walks over all columns of its rows."""


def swiglu_triton(gate_up: Tensor, scale: Tensor) -> Tensor:
    """`swiglu` by the kernel, whatever the device."""
    return _SwiGLU.apply(gate_up, scale)


swiglu = by_device(swiglu_triton, swiglu_by_halves)


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


def _forward(gate_up: Tensor, scale: Tensor) -> Tensor:
    tokens, _, ffn = gate_up.shape
    out = gate_up.new_empty(tokens, ffn)
    rows, columns, warps = CONFIG
    if out.numel():
        _forward_kernel[triton.cdiv(tokens, rows),](
            gate_up, scale, out, tokens, ffn, BT=rows, BF=columns, num_warps=warps
        )
    return out


def _backward(gate_up: Tensor, scale: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gate_up and scale."""
    tokens, _, ffn = gate_up.shape
    d_gate_up, d_scale = torch.empty_like(gate_up), torch.empty_like(scale)
    rows, columns, warps = CONFIG
    if grad.numel():
        _backward_kernel[triton.cdiv(tokens, rows),](
            gate_up, scale, grad, d_gate_up, d_scale, tokens, ffn, BT=rows, BF=columns, num_warps=warps
        )
    return d_gate_up, d_scale


@triton.jit(do_not_specialize=["T"])
def _forward_kernel(p_gate_up, p_scale, p_out, T, F, BT: tl.constexpr, BF: tl.constexpr):
    """Grid: tiles of rows. out = SiLU(gate) * up * scale."""
    wide = tl.float64 if p_gate_up.dtype.element_ty == tl.float64 else tl.float32
    o_t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    b_scale = tl.load(p_scale + o_t, o_t < T, 0).to(wide)[:, None]
    for i_f in range(0, F, BF):
        o_f = i_f + tl.arange(0, BF)
        mask = (o_t < T)[:, None] & (o_f < F)[None, :]
        o_g = o_t[:, None] * (2 * F) + o_f[None, :]
        b_gate = tl.load(p_gate_up + o_g, mask, 0).to(wide)
        b_up = tl.load(p_gate_up + o_g + F, mask, 0).to(wide)
        b_out = b_gate / (1 + tl.exp(-b_gate)) * b_up * b_scale
        tl.store(p_out + o_t[:, None] * F + o_f[None, :], b_out.to(p_out.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["T"])
def _backward_kernel(
    p_gate_up, p_scale, p_grad, p_d_gate_up, p_d_scale, T, F, BT: tl.constexpr, BF: tl.constexpr
):
    """Grid: tiles of rows. The gradient of scale is summed over the columns in their order."""
    wide = tl.float64 if p_gate_up.dtype.element_ty == tl.float64 else tl.float32
    o_t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    b_scale = tl.load(p_scale + o_t, o_t < T, 0).to(wide)[:, None]
    b_sum = tl.zeros((BT,), wide)
    for i_f in range(0, F, BF):
        o_f = i_f + tl.arange(0, BF)
        mask = (o_t < T)[:, None] & (o_f < F)[None, :]
        o_g = o_t[:, None] * (2 * F) + o_f[None, :]
        b_gate = tl.load(p_gate_up + o_g, mask, 0).to(wide)
        b_up = tl.load(p_gate_up + o_g + F, mask, 0).to(wide)
        b_grad = tl.load(p_grad + o_t[:, None] * F + o_f[None, :], mask, 0).to(wide)
        b_sigmoid = 1 / (1 + tl.exp(-b_gate))
        b_silu = b_gate * b_sigmoid
        b_sum += tl.sum(b_grad * b_silu * b_up, 1)
        b_grad *= b_scale
        b_gate = b_grad * b_up * (b_sigmoid + b_silu * (1 - b_sigmoid))
        tl.store(p_d_gate_up + o_g, b_gate.to(p_d_gate_up.dtype.element_ty), mask)
        tl.store(p_d_gate_up + o_g + F, (b_grad * b_silu).to(p_d_gate_up.dtype.element_ty), mask)
    tl.store(p_d_scale + o_t, b_sum.to(p_d_scale.dtype.element_ty), o_t < T)
