"""The router's arithmetic on logits: which experts each token chooses, with what weights, and the losses.

Letters: T tokens in tiles of BT; E experts, padded to BE; K choices of a token, padded to BK.
A token's choice and weights depend on its own logits alone, whatever tile it lies in: all layouts agree. Sums
over tokens are added up tile by tile and part by part, in the same order every time.
"""

from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.counting import ceil_div
from kernels.device import by_device
from kernels.reference import Balance, Record
from kernels.reference import choose_experts as choose_experts_by_sort
from kernels.reference import record_choices as record_choices_by_torch
from kernels.reference import route as route_by_torch

MAX_PARTS = 1024
"""Partial sums over tokens, at most."""
NONE = tl.constexpr(-(2**63))
"""Below all keys."""
TINY = tl.constexpr(torch.finfo(torch.float32).tiny)
"""Sum of the weights of a token without choices."""


class Config(NamedTuple):
    """Constants of the kernels over tokens."""

    elements: int
    """Of a tile [BT, BE], unless one token has more."""
    num_warps: int


CONFIGS = [Config(2048, 4), Config(1024, 4), Config(4096, 4), Config(4096, 8)]


def choose_experts_triton(
    logits: Tensor, top_k: int, *, bias: Tensor | None = None, real: Tensor | None = None,
    config: Config = CONFIGS[0],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`choose_experts` by the kernel."""
    tokens, num_experts = logits.shape
    tile = _tile(num_experts, config)
    tiles = ceil_div(tokens, tile["BT"])
    each = max(1, ceil_div(tiles, MAX_PARTS))  # tiles of a program
    experts = torch.empty((tokens, top_k), dtype=torch.int64, device=logits.device)
    sums = logits.new_empty((max(1, ceil_div(tiles, each)), num_experts + 2), dtype=torch.float32)
    _choose_kernel[(len(sums),)](
        logits.contiguous(), bias, real, experts, sums, tokens, num_experts, each,
        K=top_k, HAS_BIAS=bias is not None, HAS_REAL=real is not None, **tile,
    )  # fmt: skip
    return experts, sums


choose_experts = by_device(choose_experts_triton, choose_experts_by_sort)


def route_triton(
    logits: Tensor, experts: Tensor, *, replicas: Tensor | None = None, balance: Balance | None = None,
    config: Config = CONFIGS[0],
) -> Tensor:  # fmt: skip
    """`route` by the kernels."""
    return _Route.apply(logits, experts, replicas, balance, config)


route = by_device(route_triton, route_by_torch)


def record_choices_triton(
    record: Record, sums: Tensor, choices: Tensor, dropped: Tensor | None, pooled: Tensor, *, top_k: int,
    scale: float, so_far: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`record_choices` by the kernel."""
    num_experts = len(choices)
    share, tokens = sums.new_empty(num_experts), sums.new_empty(())
    padded = _tile(num_experts, CONFIGS[0])["BE"]
    _record_kernel[(1,)](
        *record, sums, choices, dropped, pooled, share, tokens, len(sums), num_experts, scale,
        K=top_k, HAS_DROPPED=dropped is not None, SO_FAR=so_far, BP=max(1, 16384 // padded), BE=padded,
        num_warps=8,
    )  # fmt: skip
    return share, tokens


record_choices = by_device(record_choices_triton, record_choices_by_torch)


@cache
def _tile(num_experts: int, config: Config) -> dict[str, int]:
    """Chosen by the number of experts alone, so that a token's sums are the same among any others."""
    padded = triton.next_power_of_2(num_experts)
    return {"BT": max(1, config.elements // padded), "BE": padded, "num_warps": config.num_warps}


class _Route(torch.autograd.Function):
    """forward: weights of the choices; backward: of the weights and of the losses, in one launch."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, experts: Tensor, replicas: Tensor | None, balance: Balance | None,
        config: Config,
    ) -> Tensor:  # fmt: skip
        logits, experts = logits.contiguous(), experts.contiguous()
        (tokens, num_experts), top_k = logits.shape, experts.shape[1]
        weights = logits.new_empty(experts.shape, dtype=torch.float32)
        tile = _tile(num_experts, config)
        if tokens:
            _route_kernel[(ceil_div(tokens, tile["BT"]),)](
                logits, experts, None if replicas is None else replicas.contiguous(), weights,
                tokens, num_experts, K=top_k, HAS_REPLICAS=replicas is not None, **tile,
            )  # fmt: skip
        real, share, pool_tokens = (None,) * 3 if balance is None else balance[:3]
        ctx.save_for_backward(logits, experts, weights, real, share, pool_tokens)
        ctx.factors, ctx.tile = (0.0, 0.0) if balance is None else balance.factors, tile
        return weights

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        logits, experts, weights, real, share, pool_tokens = ctx.saved_tensors
        (tokens, num_experts), grad = logits.shape, torch.empty_like(logits)
        if tokens:
            _route_backward_kernel[(ceil_div(tokens, ctx.tile["BT"]),)](
                logits, experts, weights, grads[0].contiguous(), real, share, pool_tokens, grad,
                tokens, num_experts, *ctx.factors, K=experts.shape[1],
                HAS_REAL=real is not None, HAS_BALANCE=share is not None, **ctx.tile,
            )  # fmt: skip
        return grad, None, None, None, None


@triton.jit
def _softmax(p_logits, o_t, o_e, T, E):
    """Logits [BT, BE], their softmax and their log-sum-exp [BT]; tokens beyond the last have logits 0."""
    mask = (o_t[:, None] < T) & (o_e[None, :] < E)
    b_x = tl.load(p_logits + o_t[:, None] * E + o_e[None, :], mask=mask, other=0.0).to(tl.float32)
    b_x = tl.where(o_e[None, :] < E, b_x, float("-inf"))
    b_top = tl.max(b_x, 1)
    b_p = tl.exp(b_x - b_top[:, None])
    b_sum = tl.sum(b_p, 1)
    return b_x, b_p / b_sum[:, None], b_top + tl.log(b_sum)


@triton.jit
def _as_keys(b_score, o_e, E, BE: tl.constexpr):
    """int64 that sort like (score, -expert), NaN above all; the expert is in the low half."""
    bits = (b_score + 0.0).to(tl.int32, bitcast=True)  # -0.0 becomes 0.0, its equal
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)
    return tl.where(o_e[None, :] < E, (ordered << 32) | (BE - 1 - o_e)[None, :], NONE)


@triton.jit
def _choose_kernel(
    p_logits, p_bias, p_real, p_experts, p_sums, T, E, tiles,
    K: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_REAL: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """Grid: parts of `tiles` tiles."""
    i_p = tl.program_id(0).to(tl.int64)
    o_e = tl.arange(0, BE)
    b_probs = tl.zeros([BE], tl.float32)
    b_squares, b_entropies = tl.zeros([BT], tl.float32), tl.zeros([BT], tl.float32)
    for i_t in range(tiles):
        o_t = (i_p * tiles + i_t) * BT + tl.arange(0, BT)
        b_x, b_p, b_lse = _softmax(p_logits, o_t, o_e, T, E)
        b_score = b_x
        if HAS_BIAS:
            b_score = b_p + tl.load(p_bias + o_e, mask=o_e < E, other=0.0)[None, :]
        b_key = _as_keys(b_score, o_e, E, BE)
        for k in tl.static_range(K):
            b_best = tl.max(b_key, 1)
            tl.store(p_experts + o_t * K + k, BE - 1 - (b_best & 0xFFFFFFFF), mask=o_t < T)
            b_key = tl.where(b_key == b_best[:, None], NONE, b_key)
        is_in = o_t < T
        if HAS_REAL:
            is_in = tl.load(p_real + o_t, mask=is_in, other=0) != 0
        b_probs += tl.sum(tl.where(is_in[:, None], b_p, 0.0), 0)
        b_squares += tl.where(is_in, b_lse * b_lse, 0.0)
        b_entropy = tl.sum(tl.where(b_p > 0, b_p * (b_lse[:, None] - b_x), 0.0), 1)
        b_entropies += tl.where(is_in, b_entropy, 0.0)
    p_sums += i_p * (E + 2)
    tl.store(p_sums + o_e, b_probs, mask=o_e < E)
    tl.store(p_sums + E, tl.sum(b_squares, 0))
    tl.store(p_sums + E + 1, tl.sum(b_entropies, 0))


@triton.jit
def _route_kernel(
    p_logits, p_experts, p_replicas, p_weights, T, E,
    K: tl.constexpr, HAS_REPLICAS: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """Grid: tiles. Probabilities relative to each token's largest: their denominator cancels."""
    o_t, o_e = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT), tl.arange(0, BE)
    mask = (o_t[:, None] < T) & (o_e[None, :] < E)
    b_x = tl.load(p_logits + o_t[:, None] * E + o_e[None, :], mask=mask, other=float("-inf")).to(tl.float32)
    b_top = tl.where(o_t < T, tl.max(b_x, 1), 0.0)
    b_sum = tl.zeros([BT], tl.float32)
    for k in tl.static_range(K):
        b_sum += _probability(p_logits, p_experts, p_replicas, o_t, o_t * K + k, b_top, T, E, HAS_REPLICAS)
    b_sum = tl.maximum(b_sum, TINY)
    for k in tl.static_range(K):
        b_p = _probability(p_logits, p_experts, p_replicas, o_t, o_t * K + k, b_top, T, E, HAS_REPLICAS)
        tl.store(p_weights + o_t * K + k, b_p / b_sum, mask=o_t < T)


@triton.jit
def _probability(p_logits, p_experts, p_replicas, o_t, o_n, b_top, T, E, HAS_REPLICAS: tl.constexpr):
    """[BT] of the tokens' choices o_n, relative to their largest; 0 where dropped."""
    b_expert = tl.load(p_experts + o_n, mask=o_t < T, other=0)
    b_x = tl.load(p_logits + o_t * E + b_expert, mask=o_t < T, other=0.0).to(tl.float32)
    b_p = tl.exp(b_x - b_top)
    if HAS_REPLICAS:
        b_p = tl.where(tl.load(p_replicas + o_n, mask=o_t < T, other=-1) >= 0, b_p, 0.0)
    return b_p


@triton.jit
def _route_backward_kernel(
    p_logits, p_experts, p_weights, p_grads, p_real, p_share, p_tokens, p_out, T, E, aux_factor, z_factor,
    K: tl.constexpr, HAS_REAL: tl.constexpr, HAS_BALANCE: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """Grid: tiles.

    A weight is a softmax over the token's kept choices: dx_k = w_k (dw_k - sum_j w_j dw_j). The losses add
    p_e (a_e - sum_f p_f a_f + 2 z lse) with a_e = aux share_e / tokens and z = z_factor / tokens.
    """
    o_t, o_e = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT), tl.arange(0, BE)
    b_grad = tl.zeros([BT, BE], tl.float32)
    if HAS_BALANCE:
        b_x, b_p, b_lse = _softmax(p_logits, o_t, o_e, T, E)
        tokens = tl.load(p_tokens)
        b_a = tl.load(p_share + o_e, mask=o_e < E, other=0.0) * (aux_factor / tokens)
        # Relative to the likeliest expert's, hardly anything cancels where one probability is nearly 1.
        is_top = b_x == tl.max(b_x, 1)[:, None]
        b_a = b_a[None, :] - tl.max(tl.where(is_top, b_a[None, :], float("-inf")), 1)[:, None]
        b_a -= tl.sum(b_p * b_a, 1)[:, None]
        b_grad = b_p * (b_a + (b_lse * (2 * z_factor / tokens))[:, None])
        if HAS_REAL:
            is_real = tl.load(p_real + o_t, mask=o_t < T, other=0) != 0
            b_grad = tl.where(is_real[:, None], b_grad, 0.0)
    b_mean = tl.zeros([BT], tl.float32)
    for k in tl.static_range(K):
        b_weight = tl.load(p_weights + o_t * K + k, mask=o_t < T, other=0.0)
        b_mean += b_weight * tl.load(p_grads + o_t * K + k, mask=o_t < T, other=0.0)
    for k in tl.static_range(K):
        b_expert = tl.load(p_experts + o_t * K + k, mask=o_t < T, other=0)
        b_weight = tl.load(p_weights + o_t * K + k, mask=o_t < T, other=0.0)
        b_dx = b_weight * (tl.load(p_grads + o_t * K + k, mask=o_t < T, other=0.0) - b_mean)
        b_grad += tl.where(o_e[None, :] == b_expert[:, None], b_dx[:, None], 0.0)
    mask = (o_t[:, None] < T) & (o_e[None, :] < E)
    tl.store(p_out + o_t[:, None] * E + o_e[None, :], b_grad.to(p_out.dtype.element_ty), mask=mask)


@triton.jit
def _record_kernel(
    p_load, p_dropped_so_far, p_pooled_so_far, p_losses, p_sums, p_choices, p_dropped, p_pooled,
    p_share, p_tokens, P, E, scale,
    K: tl.constexpr, HAS_DROPPED: tl.constexpr, SO_FAR: tl.constexpr, BP: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """Grid: one program."""
    o_e = tl.arange(0, BE)
    b_probs = tl.zeros([BE], tl.float32)
    b_squares, b_entropies = tl.zeros([BP], tl.float32), tl.zeros([BP], tl.float32)
    for i_p in range(0, P, BP):
        o_p = i_p + tl.arange(0, BP)
        mask = (o_p[:, None] < P) & (o_e[None, :] < E)
        b_probs += tl.sum(tl.load(p_sums + o_p[:, None] * (E + 2) + o_e[None, :], mask=mask, other=0.0), 0)
        b_squares += tl.load(p_sums + o_p * (E + 2) + E, mask=o_p < P, other=0.0)
        b_entropies += tl.load(p_sums + o_p * (E + 2) + E + 1, mask=o_p < P, other=0.0)
    b_pooled = tl.load(p_pooled + o_e, mask=o_e < E, other=0)
    _add(p_load, tl.load(p_choices + o_e, mask=o_e < E, other=0), o_e, E)
    if HAS_DROPPED:
        _add(p_dropped_so_far, tl.load(p_dropped + o_e, mask=o_e < E, other=0), o_e, E)
    b_so_far = _add(p_pooled_so_far, b_pooled, o_e, E)
    b_counted = b_so_far if SO_FAR else b_pooled
    b_share = b_counted.to(tl.float32) / tl.sum(b_counted, 0).to(tl.float32)
    tokens = tl.sum(b_pooled, 0).to(tl.float32) / K
    tl.store(p_share + o_e, b_share, mask=o_e < E)
    tl.store(p_tokens, tokens)
    aux = scale * tl.sum(tl.where(o_e < E, b_share * b_probs, 0.0), 0)
    tl.store(p_losses, tl.load(p_losses) + aux / tokens)
    tl.store(p_losses + 1, tl.load(p_losses + 1) + tl.sum(b_squares, 0) / tokens)
    tl.store(p_losses + 2, tl.load(p_losses + 2) + tl.sum(b_entropies, 0) / tokens)


@triton.jit
def _add(p_total, b_part, o_e, E):
    """Add to a total in memory; returns it."""
    b_total = tl.load(p_total + o_e, mask=o_e < E, other=0) + b_part
    tl.store(p_total + o_e, b_total, mask=o_e < E)
    return b_total
