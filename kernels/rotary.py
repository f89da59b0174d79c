"""Partial rotary embedding of q and k in one launch, in place: only the entries that turn are touched.

A program turns all heads of BT of the T tokens; NeoX pairs: entry i with entry i + HALF of a head of D.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.device import has_kernel
from kernels.reference import apply_rotary
from kernels.row_tiles import Launch

Table = tuple[Tensor, Tensor]


def rotate_(q: Tensor, k: Tensor, table: Table, *, head_dim: int) -> tuple[Tensor, Tensor]:
    """Turn the first rotary_dim entries of each head of q and k; only the results may be used afterwards.

    On a GPU they share the memory of q and k, and backward turns its gradients in place, too: whatever
    computes with the results must hand over gradients that nobody else reads, as attention does.

    Args:
        q: [rows, tokens, heads * head_dim]. k: [rows, tokens, kv_heads * head_dim].
        table: cos and sin, from `rotary_table`.

    Returns:
        [rows, tokens, heads, head_dim] and [rows, tokens, kv_heads, head_dim].
    """
    if has_kernel(q):
        return rotate_triton_(q, k, table, head_dim=head_dim)
    q, k = (x.unflatten(-1, (-1, head_dim)) for x in (q, k))
    return apply_rotary(q, table), apply_rotary(k, table)


LAUNCH = Launch(4096, 8)  # 4096 to 16384 entries and 2 to 16 warps are within 3 %


def rotate_triton_(q: Tensor, k: Tensor, table: Table, *, head_dim: int) -> tuple[Tensor, Tensor]:
    """`rotate_` by the kernel."""
    cos, sin = (x.contiguous() for x in table)
    is_same_tokens = q.shape[:2] == k.shape[:2] == cos.shape[:2]
    if not is_same_tokens or 2 * cos.shape[-1] > head_dim or any(x.shape[-1] % head_dim for x in (q, k)):
        shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, table {tuple(cos.shape)} and head_dim {head_dim}"
        raise ValueError(f"{shapes} do not fit")
    q, k = _Rotate.apply(q.contiguous(), k.contiguous(), cos, sin, head_dim)
    return q.unflatten(-1, (-1, head_dim)), k.unflatten(-1, (-1, head_dim))


class _Rotate(torch.autograd.Function):
    """forward: turns q and k in place; backward: turns their gradients back, in place."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, head_dim: int
    ) -> tuple[Tensor, Tensor]:
        _turn(q, k, cos, sin, head_dim, is_back=False)
        ctx.mark_dirty(q, k)
        ctx.save_for_backward(cos, sin)
        ctx.head_dim = head_dim
        return q, k

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dq, dk = (grad.contiguous() for grad in grads)
        if dq.data_ptr() == dk.data_ptr():  # of a sum of the two
            dk = dk.clone()
        cos, sin = ctx.saved_tensors
        _turn(dq, dk, cos, sin, ctx.head_dim, is_back=True)
        return dq, dk, None, None, None


def _turn(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, head_dim: int, *, is_back: bool) -> None:
    """Contiguous q and k by the angles of the table, or back."""
    half, (heads, kv_heads) = cos.shape[-1], (x.shape[-1] // head_dim for x in (q, k))
    tokens = cos.shape[0] * cos.shape[1]
    blocks = [triton.next_power_of_2(n) for n in (heads, kv_heads, half)]
    bt = max(1, LAUNCH.elements // (2 * blocks[0] * blocks[2]))
    if tokens and half:
        _turn_kernel[(triton.cdiv(tokens, bt),)](
            q, k, cos, sin, tokens, heads, kv_heads, D=head_dim, HALF=half,
            BT=bt, BH=blocks[0], BG=blocks[1], BI=blocks[2], IS_BACK=is_back, num_warps=LAUNCH.num_warps,
        )  # fmt: skip


@triton.jit
def _turn_kernel(
    p_q, p_k, p_cos, p_sin, T, H, G, D: tl.constexpr, HALF: tl.constexpr,
    BT: tl.constexpr, BH: tl.constexpr, BG: tl.constexpr, BI: tl.constexpr, IS_BACK: tl.constexpr,
):  # fmt: skip
    tokens = tl.program_id(0) * BT + tl.arange(0, BT).to(tl.int64)
    i = tl.arange(0, BI)
    mask = (tokens < T)[:, None] & (i < HALF)[None, :]
    places = tokens[:, None] * HALF + i[None, :]
    cos = tl.load(p_cos + places, mask=mask, other=0.0)[:, None, :]
    sin = tl.load(p_sin + places, mask=mask, other=0.0)[:, None, :]
    if IS_BACK:
        sin = -sin
    _turn_heads(p_q, tokens, T, H, i, cos, sin, D, HALF, BH)
    _turn_heads(p_k, tokens, T, G, i, cos, sin, D, HALF, BG)


@triton.jit
def _turn_heads(p_x, tokens, T, H, i, cos, sin, D: tl.constexpr, HALF: tl.constexpr, BH: tl.constexpr):
    heads = tl.arange(0, BH)
    mask = (tokens < T)[:, None, None] & (heads < H)[None, :, None] & (i < HALF)[None, None, :]
    p_first = p_x + (tokens[:, None, None] * H + heads[None, :, None]) * D + i[None, None, :]
    first = tl.load(p_first, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(p_first + HALF, mask=mask, other=0.0).to(tl.float32)
    tl.store(p_first, (first * cos - second * sin).to(p_x.dtype.element_ty), mask=mask)
    tl.store(p_first + HALF, (second * cos + first * sin).to(p_x.dtype.element_ty), mask=mask)
