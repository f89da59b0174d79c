"""RMSNorm, alone or of DeepNorm's sum alpha * h + branch, which then never reaches memory.

The residual is the normed tensor h itself. Backward rebuilds the sum from h and the branch, and adds the
gradients of h's two uses, so that neither alpha * h nor a gradient of it is written.
T rows of K entries, tiles of BT x BK.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.device import by_device, has_kernel
from kernels.reference import rms_norm as plain_rms_norm
from kernels.row_tiles import (
    Config,
    as_rows,
    choose_backward,
    choose_forward,
    load_tile,
    persistent_programs,
    sum_partials,
)


class Carried(NamedTuple):
    """alpha * h on its way to the next sum. Opaque: only the functions of this file read it."""

    tensor: Tensor
    """alpha * h, or h alone where kernels run; its gradient is that of alpha * h in both cases."""
    factor: float
    """Still to be multiplied."""


def carry_rms_norm(
    x: Tensor, weight: Tensor, eps: float, alpha: float, carried: Carried | None = None
) -> tuple[Tensor, Carried]:
    """h = RMSNorm of x, or of carried + x; and alpha * h for the next sum.

    Args:
        x: [..., size]. weight: [size].
    """
    if has_kernel(x):
        return carry_rms_norm_triton(x, weight, eps, alpha, carried)
    h = plain_rms_norm(x if carried is None else carried.tensor + x, weight, eps)
    return h, Carried(alpha * h, 1.0)


def add_carried(carried: Carried, branch: Tensor) -> Tensor:
    """carried + branch, [..., size]."""
    return add_carried_triton(carried, branch) if has_kernel(branch) else carried.tensor + branch


def rms_norm_triton(x: Tensor, weight: Tensor, eps: float, *, config: Config | None = None) -> Tensor:
    """`rms_norm` by the kernels."""
    return _RMSNorm.apply(x, None, weight, eps, 1.0, 1.0, config)[0]


rms_norm = by_device(rms_norm_triton, plain_rms_norm)


def carry_rms_norm_triton(
    x: Tensor, weight: Tensor, eps: float, alpha: float, carried: Carried | None = None, *,
    config: Config | None = None,
) -> tuple[Tensor, Carried]:  # fmt: skip
    """`carry_rms_norm` by the kernels."""
    residual, factor = (None, 1.0) if carried is None else carried
    h, same = _RMSNorm.apply(x, residual, weight, eps, factor, alpha, config)
    return h, Carried(same, alpha)


def add_carried_triton(carried: Carried, branch: Tensor) -> Tensor:
    """`add_carried` where kernels made `carried`."""
    return _AddCarried.apply(*carried, branch)


class _AddCarried(torch.autograd.Function):
    """forward: factor * tensor + branch; backward: the gradient of both, see `Carried`."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, factor: float, branch: Tensor) -> Tensor:
        return torch.add(branch, tensor, alpha=factor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, Tensor]:
        return grads[0], None, grads[0]


class _RMSNorm(torch.autograd.Function):
    """forward: h = norm(x + factor * residual), a second time as what is carried; backward: one kernel."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, factor: float,
        alpha: float, config: Config | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        if x.shape[-1:] != weight.shape or (residual is not None and residual.shape != x.shape):
            shapes = [tuple(t.shape) for t in (x, weight, residual) if t is not None]
            raise ValueError(f"x, weight and residual {shapes}: expected [..., size], [size] and x's shape")
        size = x.shape[-1]
        launch = choose_forward(size) if config is None else config.forward
        rows, others = as_rows(x), as_rows(x if residual is None else residual)
        y = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, weight.dtype), device=x.device)
        rstd = torch.empty(rows.shape[0], dtype=torch.float32, device=x.device)
        bt, bk = launch.tile(size)
        if rows.shape[0]:
            _forward[(triton.cdiv(rows.shape[0], bt),)](
                rows, others, weight, y, rstd, rows.shape[0], rows.stride(0), others.stride(0), eps, factor,
                K=size, BT=bt, BK=bk, HAS_RESIDUAL=residual is not None, num_warps=launch.num_warps,
            )  # fmt: skip
        ctx.save_for_backward(x, residual, weight, rstd)
        ctx.factor, ctx.alpha, ctx.config = factor, alpha, config
        ctx.set_materialize_grads(False)
        return y, y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, residual, weight, rstd = ctx.saved_tensors
        used = [grad for grad in grads if grad is not None]
        if not used:
            return (None,) * 7
        first, second = as_rows(used[0]), as_rows(used[-1])  # the same twice if h was used once
        rows, others = as_rows(x), as_rows(x if residual is None else residual)
        ds = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        read = [x.dtype, *(y.dtype for y in used), *([] if residual is None else [residual.dtype])]
        launch = choose_backward(x.shape[-1], *read) if ctx.config is None else ctx.config.backward
        bt, bk = launch.tile(x.shape[-1])
        tiles = triton.cdiv(rows.shape[0], bt)
        programs = persistent_programs(tiles, x.device)
        partials = torch.empty(programs, x.shape[-1], dtype=torch.float32, device=x.device)
        if tiles:
            _backward[(programs,)](
                first, second, rows, others, weight, rstd, ds, partials, rows.shape[0],
                first.stride(0), second.stride(0), rows.stride(0), others.stride(0), ctx.alpha, ctx.factor,
                K=x.shape[-1], BT=bt, BK=bk, HAS_RESIDUAL=residual is not None,
                HAS_FIRST=grads[0] is not None, HAS_SECOND=grads[1] is not None,
                STAGES=launch.num_stages, num_warps=launch.num_warps,
            )  # fmt: skip
        dresidual = None if residual is None else ds
        return ds, dresidual, sum_partials(partials, weight.dtype), None, None, None, None


@triton.jit
def _forward(
    p_x, p_residual, p_weight, p_y, p_rstd, T, s_x, s_residual, eps, factor,
    K: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BT + tl.arange(0, BT).to(tl.int64)
    cols = tl.arange(0, BK)
    is_row, is_col = rows < T, cols < K
    mask = is_row[:, None] & is_col[None, :]
    x = load_tile(p_x, s_x, rows, cols, mask)
    if HAS_RESIDUAL:
        x += factor * load_tile(p_residual, s_residual, rows, cols, mask)
    weight = tl.load(p_weight + cols, mask=is_col, other=0.0).to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x, 1) / K + eps)
    normed = (x * rstd[:, None]).to(p_x.dtype.element_ty).to(tl.float32)
    tl.store(p_rstd + rows, rstd, mask=is_row)
    tl.store(p_y + rows[:, None] * K + cols, (normed * weight).to(p_y.dtype.element_ty), mask=mask)


@triton.jit
def _backward(
    p_first, p_second, p_x, p_residual, p_weight, p_rstd, p_ds, p_partials, T,
    s_first, s_second, s_x, s_residual, alpha, factor,
    K: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    HAS_FIRST: tl.constexpr, HAS_SECOND: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    cols = tl.arange(0, BK)
    is_col = cols < K
    weight = tl.load(p_weight + cols, mask=is_col, other=0.0).to(tl.float32)
    dweight = tl.zeros([BT, BK], tl.float32)
    for tile in tl.range(tl.program_id(0), tl.cdiv(T, BT), tl.num_programs(0), num_stages=STAGES):
        rows = tile * BT + tl.arange(0, BT).to(tl.int64)
        is_row = rows < T
        mask = is_row[:, None] & is_col[None, :]
        x = load_tile(p_x, s_x, rows, cols, mask)
        if HAS_RESIDUAL:
            x += factor * load_tile(p_residual, s_residual, rows, cols, mask)
        rstd = tl.load(p_rstd + rows, mask=is_row, other=0.0)[:, None]
        dh = tl.zeros([BT, BK], tl.float32)
        if HAS_FIRST:
            dh += load_tile(p_first, s_first, rows, cols, mask)
        if HAS_SECOND:
            dh += alpha * load_tile(p_second, s_second, rows, cols, mask)
        normed = x * rstd
        dweight += dh * normed.to(p_x.dtype.element_ty).to(tl.float32)
        dh *= weight
        ds = rstd * (dh - normed * (tl.sum(dh * normed, 1) / K)[:, None])
        tl.store(p_ds + rows[:, None] * K + cols, ds.to(p_ds.dtype.element_ty), mask=mask)
    tl.store(p_partials + tl.program_id(0) * K + cols, tl.sum(dweight, 0), mask=is_col)
