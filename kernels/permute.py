"""Tokens sorted by expert and back: forward and backward move whole rows, no sum depends on chance.

Letters: T tokens, S slots a token, K places (those kept), H columns; BT, BH = sizes of tiles.
Invariant: `inverse` names every place below K exactly once, so what is written by place is written wholly.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.counting import count_sort
from kernels.reference import permute as permute_by_index
from kernels.reference import unpermute as unpermute_by_index


class Sorting(NamedTuple):
    """A stable order of choices by a key, such as their expert; the last ones may be left out."""

    order: Tensor
    """[kept]: choice number (token * top_k + slot) at each place."""
    inverse: Tensor
    """[choices]: place of each choice; kept or more: it has none."""
    ends: Tensor
    """[keys] int32, where each key's choices end."""

    @property
    def counts(self) -> Tensor:
        """[keys] int64: choices of each key."""
        return self.ends.long().diff(prepend=self.ends.new_zeros(1).long())

    def keep(self, count: int) -> "Sorting":
        """The same without the choices from place `count` on."""
        return self._replace(order=self.order[:count])


def sort_choices(keys: Tensor, num_keys: int) -> Sorting:
    """Sort choices by integer keys, with no host synchronisation; keys from num_keys on come last, uncounted.

    Args:
        keys: [choices] int64 >= 0.
    """
    if keys.is_cuda:
        return Sorting(*count_sort(keys, num_keys))
    ordered, order = keys.sort(stable=True)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
    every_key = torch.arange(num_keys, device=keys.device)
    return Sorting(order, inverse, torch.searchsorted(ordered, every_key, right=True, out_int32=True))


def permute(x: Tensor, sorting: Sorting) -> Tensor:
    """Copy each token once for every one of its kept choices, in the order of the choices.

    Args:
        x: [tokens, hidden], or [tokens * top_k, hidden]: a row for each choice.

    Returns:
        [kept, hidden].
    """
    return _Permute.apply(x, sorting.order, sorting.inverse, x.is_cuda)


def permute_triton(x: Tensor, sorting: Sorting) -> Tensor:
    """`permute` by the kernel, whatever the device."""
    return _Permute.apply(x, sorting.order, sorting.inverse, True)


def unpermute(y: Tensor, sorting: Sorting, tokens: int) -> Tensor:
    """Sum the rows of each token's kept choices: the transpose of `permute`.

    Args:
        y: [kept, hidden].

    Returns:
        [tokens, hidden].
    """
    return _Unpermute.apply(y, sorting.order, sorting.inverse, tokens, y.is_cuda)


def unpermute_triton(y: Tensor, sorting: Sorting, tokens: int) -> Tensor:
    """`unpermute` by the kernel, whatever the device."""
    return _Unpermute.apply(y, sorting.order, sorting.inverse, tokens, True)


class _Permute(torch.autograd.Function):
    """forward: copies each token's row to its choices; backward: sum of each token's rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor, by_kernel: bool) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.tokens, ctx.by_kernel = x.shape[0], by_kernel
        return _spread(x, order, inverse) if by_kernel else permute_by_index(x, order, inverse)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse,) = ctx.saved_tensors
        add = _collect if ctx.by_kernel else unpermute_by_index
        return add(grads[0], inverse, ctx.tokens), None, None, None


class _Unpermute(torch.autograd.Function):
    """forward: sum of each token's rows; backward: copies each token's row to its choices."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, order: Tensor, inverse: Tensor, tokens: int, by_kernel: bool) -> Tensor:
        ctx.save_for_backward(order, inverse)
        ctx.by_kernel = by_kernel
        return (_collect if by_kernel else unpermute_by_index)(y, inverse, tokens)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        order, inverse = ctx.saved_tensors
        copy = _spread if ctx.by_kernel else permute_by_index
        return copy(grads[0], order, inverse), None, None, None, None


CONFIGS = [(1, 2048, 8), (128, 1, 4)]
"""(BT, BH, warps) of a program: for rows of hidden states, and for single numbers such as weights."""


def _spread(x: Tensor, order: Tensor, inverse: Tensor, config: tuple[int, int, int] | None = None) -> Tensor:
    """[tokens, hidden] -> [kept, hidden]; reads a token once, a gather by place would do so top_k times."""
    y = x.new_empty(len(order), x.shape[1])
    _launch(_spread_kernel, x, y, inverse, tokens=len(x), kept=len(order), config=config)
    return y


def _collect(y: Tensor, inverse: Tensor, tokens: int, config: tuple[int, int, int] | None = None) -> Tensor:
    """[kept, hidden] -> [tokens, hidden]."""
    x = y.new_empty(tokens, y.shape[1])
    _launch(_collect_kernel, y, x, inverse, tokens=tokens, kept=len(y), config=config)
    return x


def _launch(
    kernel: Any, source: Tensor, target: Tensor, inverse: Tensor, *, tokens: int, kept: int,
    config: tuple[int, int, int] | None,
) -> None:  # fmt: skip
    hidden = source.shape[1]
    rows, columns, warps = config or CONFIGS[hidden == 1]
    if target.numel():
        kernel[triton.cdiv(tokens, rows), triton.cdiv(hidden, columns)](
            source.contiguous(), target, inverse, tokens, kept, hidden,
            S=inverse.numel() // tokens, BT=rows, BH=columns, num_warps=warps,
        )  # fmt: skip


@triton.jit(do_not_specialize=["T", "K"])
def _spread_kernel(p_x, p_y, p_inverse, T, K, H, S: tl.constexpr, BT: tl.constexpr, BH: tl.constexpr):
    """Grid: tiles of tokens, tiles of columns. y[inverse[t, s]] = x[t]."""
    o_t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    o_h = tl.program_id(1) * BH + tl.arange(0, BH)
    m_t, m_h = o_t < T, (o_h < H)[None, :]
    b_x = tl.load(p_x + o_t[:, None] * H + o_h[None, :], m_t[:, None] & m_h)
    for i_s in tl.static_range(S):
        o_k = tl.load(p_inverse + o_t * S + i_s, m_t, K)
        tl.store(p_y + o_k[:, None] * H + o_h[None, :], b_x, (o_k < K)[:, None] & m_h)


@triton.jit(do_not_specialize=["T", "K"])
def _collect_kernel(p_y, p_x, p_inverse, T, K, H, S: tl.constexpr, BT: tl.constexpr, BH: tl.constexpr):
    """Grid: tiles of tokens, tiles of columns. x[t] = sum of y[inverse[t, s]], slots in order."""
    wide = tl.float64 if p_y.dtype.element_ty == tl.float64 else tl.float32
    o_t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    o_h = tl.program_id(1) * BH + tl.arange(0, BH)
    m_t, m_h = o_t < T, (o_h < H)[None, :]
    b_x = tl.zeros((BT, BH), wide)
    for i_s in tl.static_range(S):
        o_k = tl.load(p_inverse + o_t * S + i_s, m_t, K)
        b_x += tl.load(p_y + o_k[:, None] * H + o_h[None, :], (o_k < K)[:, None] & m_h, 0).to(wide)
    tl.store(p_x + o_t[:, None] * H + o_h[None, :], b_x.to(p_x.dtype.element_ty), m_t[:, None] & m_h)
