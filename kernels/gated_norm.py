"""RMSNorm of o times the sigmoid of a gate, in one kernel each way; backward computes the normed o again.

Where a row's entries lie on several ranks, `merge` adds up one sum a row in the middle: then it takes two.
T rows of K entries here, tiles of BT x BK.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.reference import gated_rms_norm as plain_gated_rms_norm
from kernels.row_tiles import (
    Config,
    as_rows,
    choose_backward,
    choose_forward,
    has_kernel,
    load_tile,
    persistent_programs,
    sum_partials,
)

Merge = Callable[[Tensor], Tensor]


def gated_rms_norm(
    o: Tensor, gate: Tensor, weight: Tensor, eps: float, *, parts: int = 1, merge: Merge | None = None
) -> Tensor:
    """sigmoid(gate) * o / rms(o) * weight over the last dim; o / rms(o) is rounded to o's dtype.

    Args:
        o, gate: [..., size]. weight: [size].
        parts: how many such parts make a whole row.
        merge: makes a sum over a part's entries, one fp32 number a row, that over the whole row; its gradient
            is `merge` of the gradient. None = the part is the whole.
    """
    compute = gated_rms_norm_triton if has_kernel(o) else plain_gated_rms_norm
    return compute(o, gate, weight, eps, parts=parts, merge=merge)


def gated_rms_norm_triton(
    o: Tensor,
    gate: Tensor,
    weight: Tensor,
    eps: float,
    *,
    parts: int = 1,
    merge: Merge | None = None,
    config: Config | None = None,
) -> Tensor:
    """`gated_rms_norm` by the kernels."""
    if o.shape != gate.shape or o.shape[-1:] != weight.shape:
        shapes = f"o {tuple(o.shape)}, gate {tuple(gate.shape)}, weight {tuple(weight.shape)}"
        raise ValueError(f"{shapes}: expected [..., size] twice and [size]")
    return _GatedRMSNorm.apply(o, gate, weight, eps, parts, merge, config)


class _GatedRMSNorm(torch.autograd.Function):
    """forward: normed o times weight times sigmoid(gate), keeps 1 / rms; backward: all three gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        o: Tensor,
        gate: Tensor,
        weight: Tensor,
        eps: float,
        parts: int,
        merge: Merge | None,
        config: Config | None,
    ) -> Tensor:
        rows, gates, size = as_rows(o), as_rows(gate), o.shape[-1]
        dtype = torch.promote_types(torch.promote_types(o.dtype, gate.dtype), weight.dtype)
        y = torch.empty(o.shape, dtype=dtype, device=o.device)
        rstd = torch.empty(rows.shape[0], dtype=torch.float32, device=o.device)
        launch = choose_forward(size) if config is None else config.forward
        bt, bk = launch.tile(size)
        grid = (triton.cdiv(rows.shape[0], bt),)
        options = {"K": size, "BT": bt, "BK": bk, "num_warps": launch.num_warps}
        if merge is not None:
            if grid[0]:
                _squares[grid](rows, rstd, rows.shape[0], rows.stride(0), **options)
            rstd = torch.rsqrt(merge(rstd) / (size * parts) + eps)
        if grid[0]:
            _forward[grid](
                rows, gates, weight, y, rstd, rows.shape[0], rows.stride(0), gates.stride(0), eps,
                IS_PART=merge is not None, **options,
            )  # fmt: skip
        ctx.save_for_backward(o, gate, weight, rstd)
        ctx.parts, ctx.merge, ctx.config = parts, merge, config
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        o, gate, weight, rstd = ctx.saved_tensors
        tensors = [as_rows(x) for x in (grads[0], o, gate)]
        strides, (count, size) = [x.stride(0) for x in tensors], tensors[0].shape
        do, dgate = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (o, gate))
        mean = rstd
        if ctx.merge is not None:
            mean = torch.empty_like(rstd)
            launch = choose_forward(size) if ctx.config is None else ctx.config.forward
            bt, bk = launch.tile(size)
            if count:
                _dots[(triton.cdiv(count, bt),)](
                    *tensors, weight, rstd, mean, count, *strides,
                    K=size, BT=bt, BK=bk, num_warps=launch.num_warps,
                )  # fmt: skip
            mean = ctx.merge(mean) / (size * ctx.parts)
        read = (x.dtype for x in tensors)
        launch = choose_backward(size, *read) if ctx.config is None else ctx.config.backward
        bt, bk = launch.tile(size)
        programs = persistent_programs(triton.cdiv(count, bt), o.device)
        partials = torch.empty(programs, size, dtype=torch.float32, device=o.device)
        if count:
            _backward[(programs,)](
                *tensors, weight, rstd, mean, do, dgate, partials, count, *strides,
                K=size, BT=bt, BK=bk, IS_PART=ctx.merge is not None,
                STAGES=launch.num_stages, num_warps=launch.num_warps,
            )  # fmt: skip
        return do, dgate, sum_partials(partials, weight.dtype), None, None, None, None


@triton.jit
def _squares(p_o, p_sum, T, s_o, K: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr):
    rows = tl.program_id(0) * BT + tl.arange(0, BT).to(tl.int64)
    cols = tl.arange(0, BK)
    o = load_tile(p_o, s_o, rows, cols, (rows < T)[:, None] & (cols < K)[None, :])
    tl.store(p_sum + rows, tl.sum(o * o, 1), mask=rows < T)


@triton.jit
def _forward(
    p_o, p_gate, p_weight, p_y, p_rstd, T, s_o, s_gate, eps,
    K: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, IS_PART: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BT + tl.arange(0, BT).to(tl.int64)
    cols = tl.arange(0, BK)
    mask = (rows < T)[:, None] & (cols < K)[None, :]
    o = load_tile(p_o, s_o, rows, cols, mask)
    gate = load_tile(p_gate, s_gate, rows, cols, mask)
    weight = tl.load(p_weight + cols, mask=cols < K, other=0.0).to(tl.float32)
    if IS_PART:
        rstd = tl.load(p_rstd + rows, mask=rows < T, other=0.0)
    else:
        rstd = tl.rsqrt(tl.sum(o * o, 1) / K + eps)
        tl.store(p_rstd + rows, rstd, mask=rows < T)
    normed = (o * rstd[:, None]).to(p_o.dtype.element_ty).to(tl.float32)
    y = normed * weight * tl.sigmoid(gate)
    tl.store(p_y + rows[:, None] * K + cols[None, :], y.to(p_y.dtype.element_ty), mask=mask)


@triton.jit
def _dots(
    p_dy, p_o, p_gate, p_weight, p_rstd, p_sum, T, s_dy, s_o, s_gate,
    K: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BT + tl.arange(0, BT).to(tl.int64)
    cols = tl.arange(0, BK)
    mask = (rows < T)[:, None] & (cols < K)[None, :]
    dy = load_tile(p_dy, s_dy, rows, cols, mask)
    o = load_tile(p_o, s_o, rows, cols, mask)
    gate = load_tile(p_gate, s_gate, rows, cols, mask)
    weight = tl.load(p_weight + cols, mask=cols < K, other=0.0).to(tl.float32)
    rstd = tl.load(p_rstd + rows, mask=rows < T, other=0.0)
    tl.store(p_sum + rows, tl.sum(dy * tl.sigmoid(gate) * weight * o, 1) * rstd, mask=rows < T)


@triton.jit
def _backward(
    p_dy, p_o, p_gate, p_weight, p_rstd, p_mean, p_do, p_dgate, p_partials, T, s_dy, s_o, s_gate,
    K: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, IS_PART: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    cols = tl.arange(0, BK)
    weight = tl.load(p_weight + cols, mask=cols < K, other=0.0).to(tl.float32)
    dweight = tl.zeros([BT, BK], tl.float32)
    for tile in tl.range(tl.program_id(0), tl.cdiv(T, BT), tl.num_programs(0), num_stages=STAGES):
        rows = tile * BT + tl.arange(0, BT).to(tl.int64)
        mask = (rows < T)[:, None] & (cols < K)[None, :]
        dy = load_tile(p_dy, s_dy, rows, cols, mask)
        o = load_tile(p_o, s_o, rows, cols, mask)
        open_by = tl.sigmoid(load_tile(p_gate, s_gate, rows, cols, mask))
        rstd = tl.load(p_rstd + rows, mask=rows < T, other=0.0)
        o *= rstd[:, None]
        normed = o.to(p_o.dtype.element_ty).to(tl.float32)
        dy *= open_by
        dgate = dy * (1 - open_by) * normed * weight
        dweight += dy * normed
        dy *= weight
        mean = tl.load(p_mean + rows, mask=rows < T, other=0.0) if IS_PART else tl.sum(dy * o, 1) / K
        do = rstd[:, None] * (dy - o * mean[:, None])
        places = rows[:, None] * K + cols[None, :]
        tl.store(p_dgate + places, dgate.to(p_dgate.dtype.element_ty), mask=mask)
        tl.store(p_do + places, do.to(p_do.dtype.element_ty), mask=mask)
    tl.store(p_partials + tl.program_id(0) * K + cols, tl.sum(dweight, 0), mask=cols < K)
