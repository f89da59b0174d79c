"""RMSNorm of o times the sigmoid of a gate, in one kernel each way; backward computes the normed o again.

Where a row's entries lie on several ranks, `merge` adds up one sum a row in the middle: then it takes two, in
two nodes of the graph, because a pipeline may run that of the weight's gradient again, and none with `merge`.
T rows of K entries here, tiles of BT x BK.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.device import by_device
from kernels.reference import gated_rms_norm as plain_gated_rms_norm
from kernels.row_tiles import (
    Config,
    Launch,
    as_rows,
    choose_backward,
    choose_forward,
    load_tile,
    persistent_programs,
    sum_partials,
)

Merge = Callable[[Tensor], Tensor]


def gated_rms_norm_triton(
    o: Tensor, gate: Tensor, weight: Tensor, eps: float, *, parts: int = 1, merge: Merge | None = None,
    config: Config | None = None,
) -> Tensor:  # fmt: skip
    """`gated_rms_norm` by the kernels."""
    if o.shape != gate.shape or o.shape[-1:] != weight.shape:
        shapes = f"o {tuple(o.shape)}, gate {tuple(gate.shape)}, weight {tuple(weight.shape)}"
        raise ValueError(f"{shapes}: expected [..., size] twice and [size]")
    if merge is None:
        return _GatedRMSNorm.apply(o, gate, weight, eps, config)
    plain = (x.detach() for x in (weight, o, gate))
    y, rstd = _PartOfRows.apply(o, gate, next(plain), eps, parts, merge, config)
    return _PartOfWeight.apply(y, rstd, weight, *plain, config)


gated_rms_norm = by_device(gated_rms_norm_triton, plain_gated_rms_norm)


class _GatedRMSNorm(torch.autograd.Function):
    """forward: normed o times weight times sigmoid(gate), keeps 1 / rms; backward: all three gradients."""

    @staticmethod
    def forward(
        ctx: Any, o: Tensor, gate: Tensor, weight: Tensor, eps: float, config: Config | None
    ) -> Tensor:
        rstd = torch.empty(o.numel() // max(1, o.shape[-1]), dtype=torch.float32, device=o.device)
        y = _launch_forward(o, gate, weight, rstd, eps, config, is_part=False)
        ctx.save_for_backward(o, gate, weight, rstd)
        ctx.config = config
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        o, gate, weight, rstd = ctx.saved_tensors
        do, dgate, partials = _launch_backward(grads[0], o, gate, weight, rstd, None, ctx.config)
        return do, dgate, sum_partials(partials, weight.dtype), None, None


class _PartOfRows(torch.autograd.Function):
    """forward: y and 1 / rms [rows]; backward: gradients of o and gate, `merge` of what came for 1 / rms."""

    @staticmethod
    def forward(
        ctx: Any, o: Tensor, gate: Tensor, weight: Tensor, eps: float, parts: int, merge: Merge,
        config: Config | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        rows, size = as_rows(o), o.shape[-1]
        squares = torch.empty(rows.shape[0], dtype=torch.float32, device=o.device)
        launch = choose_forward(size) if config is None else config.forward
        bt, bk = launch.tile(size)
        if len(rows):
            _squares[(triton.cdiv(len(rows), bt),)](
                rows, squares, len(rows), rows.stride(0), K=size, BT=bt, BK=bk, num_warps=launch.num_warps
            )
        rstd = torch.rsqrt(merge(squares) / (size * parts) + eps)
        y = _launch_forward(o, gate, weight, rstd, eps, config, is_part=True)
        ctx.save_for_backward(o, gate, weight, rstd)
        ctx.parts, ctx.merge, ctx.config = parts, merge, config
        return y, rstd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        o, gate, weight, rstd = ctx.saved_tensors
        mean = ctx.merge(grads[1]) / (o.shape[-1] * ctx.parts)
        do, dgate, _ = _launch_backward(grads[0], o, gate, weight, rstd, mean, ctx.config)
        return do, dgate, None, None, None, None, None


class _PartOfWeight(torch.autograd.Function):
    """forward: y itself; backward: weight's gradient, and each row's part of the sum that do needs."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, rstd: Tensor, weight: Tensor, o: Tensor, gate: Tensor, config: Config | None
    ) -> Tensor:
        ctx.save_for_backward(o, gate, weight, rstd)
        ctx.config = config
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        o, gate, weight, rstd = ctx.saved_tensors
        tensors = [as_rows(x) for x in (grads[0], o, gate)]
        sums = torch.empty_like(rstd)
        launch, programs, partials = _persistent(tensors, ctx.config)
        bt, bk = launch.tile(o.shape[-1])
        if programs:
            _dots[(programs,)](
                *tensors, weight, rstd, sums, partials, len(sums), *(x.stride(0) for x in tensors),
                K=o.shape[-1], BT=bt, BK=bk, STAGES=launch.num_stages, num_warps=launch.num_warps,
            )  # fmt: skip
        return grads[0], sums, sum_partials(partials, weight.dtype), None, None, None


def _launch_forward(
    o: Tensor, gate: Tensor, weight: Tensor, rstd: Tensor, eps: float, config: Config | None, *, is_part: bool
) -> Tensor:
    """y; writes rstd [rows] or, of parts, reads it."""
    rows, gates, size = as_rows(o), as_rows(gate), o.shape[-1]
    dtype = torch.promote_types(torch.promote_types(o.dtype, gate.dtype), weight.dtype)
    y = torch.empty(o.shape, dtype=dtype, device=o.device)
    launch = choose_forward(size) if config is None else config.forward
    bt, bk = launch.tile(size)
    if len(rows):
        _forward[(triton.cdiv(len(rows), bt),)](
            rows, gates, weight, y, rstd, len(rows), rows.stride(0), gates.stride(0), eps,
            K=size, BT=bt, BK=bk, IS_PART=is_part, num_warps=launch.num_warps,
        )  # fmt: skip
    return y


def _launch_backward(
    dy: Tensor, o: Tensor, gate: Tensor, weight: Tensor, rstd: Tensor, mean: Tensor | None,
    config: Config | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """do, dgate, and what makes weight's gradient, which is not written where `mean` [rows] is given."""
    tensors = [as_rows(x) for x in (dy, o, gate)]
    do, dgate = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (o, gate))
    launch, programs, partials = _persistent(tensors, config)
    bt, bk = launch.tile(o.shape[-1])
    if programs:
        _backward[(programs,)](
            *tensors, weight, rstd, mean, do, dgate, partials, len(rstd), *(x.stride(0) for x in tensors),
            K=o.shape[-1], BT=bt, BK=bk, IS_PART=mean is not None,
            STAGES=launch.num_stages, num_warps=launch.num_warps,
        )  # fmt: skip
    return do, dgate, partials


def _persistent(tensors: list[Tensor], config: Config | None) -> tuple[Launch, int, Tensor]:
    """Launch, programs and partial sums [programs, size] of a kernel that reads these rows."""
    count, size = tensors[0].shape
    launch = choose_backward(size, *(x.dtype for x in tensors)) if config is None else config.backward
    programs = persistent_programs(triton.cdiv(count, launch.tile(size)[0]), tensors[0].device)
    return launch, programs, torch.empty(programs, size, dtype=torch.float32, device=tensors[0].device)


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
    p_dy, p_o, p_gate, p_weight, p_rstd, p_sum, p_partials, T, s_dy, s_o, s_gate,
    K: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    cols = tl.arange(0, BK)
    weight = tl.load(p_weight + cols, mask=cols < K, other=0.0).to(tl.float32)
    dweight = tl.zeros([BT, BK], tl.float32)
    for tile in tl.range(tl.program_id(0), tl.cdiv(T, BT), tl.num_programs(0), num_stages=STAGES):
        rows = tile * BT + tl.arange(0, BT).to(tl.int64)
        mask = (rows < T)[:, None] & (cols < K)[None, :]
        dy = load_tile(p_dy, s_dy, rows, cols, mask)
        o = load_tile(p_o, s_o, rows, cols, mask)
        dy *= tl.sigmoid(load_tile(p_gate, s_gate, rows, cols, mask))
        o *= tl.load(p_rstd + rows, mask=rows < T, other=0.0)[:, None]
        dweight += dy * o.to(p_o.dtype.element_ty).to(tl.float32)
        tl.store(p_sum + rows, tl.sum(dy * weight * o, 1), mask=rows < T)
    tl.store(p_partials + tl.program_id(0) * K + cols, tl.sum(dweight, 0), mask=cols < K)


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
        if not IS_PART:
            dweight += dy * normed
        dy *= weight
        mean = tl.load(p_mean + rows, mask=rows < T, other=0.0) if IS_PART else tl.sum(dy * o, 1) / K
        do = rstd[:, None] * (dy - o * mean[:, None])
        places = rows[:, None] * K + cols[None, :]
        tl.store(p_dgate + places, dgate.to(p_dgate.dtype.element_ty), mask=mask)
        tl.store(p_do + places, do.to(p_do.dtype.element_ty), mask=mask)
    if not IS_PART:
        tl.store(p_partials + tl.program_id(0) * K + cols, tl.sum(dweight, 0), mask=cols < K)
