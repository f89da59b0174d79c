"""Plain-torch twins: the truth that every kernel and every parallel form is compared with.

Sums and exponentials are fp32 (or the input's fp64), results come back in the input's dtype.
Shapes are those of one rank: heads, ffn and experts are whatever the caller holds.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.documents import Documents


def widen(x: Tensor) -> Tensor:
    """x in at least fp32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dim; rounded to x's dtype before the weight, as MiniMax-01 does.

    Args:
        x: [..., size]. weight: [size].
    """
    wide = widen(x)
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return normed.to(x.dtype) * weight


def gated_rms_norm(
    o: Tensor, gate: Tensor, weight: Tensor, eps: float, *, parts: int = 1,
    merge: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """sigmoid(gate) * o / rms(o) * weight over the last dim; o / rms(o) is rounded to o's dtype.

    Args:
        o, gate: [..., size]. weight: [size].
        parts: how many such parts make a whole row.
        merge: makes a sum over a part's entries, one number a row [..., 1], that over the whole row; its
            gradient is `merge` of the gradient. None = the part is the whole.
    """
    if merge is None:
        return torch.sigmoid(gate) * rms_norm(o, weight, eps)
    wide = widen(o)
    squares = merge(wide.square().sum(-1, keepdim=True))
    normed = wide * torch.rsqrt(squares / (o.shape[-1] * parts) + eps)
    return torch.sigmoid(gate) * (normed.to(o.dtype) * weight)


def rotary_table(positions: Tensor, rotary_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin of position * theta^(-2i / rotary_dim), each [rows, tokens, 1, rotary_dim / 2] fp32.

    Args:
        positions: [rows, tokens] integers.
    """
    exponent = torch.arange(0, rotary_dim, 2, device=positions.device, dtype=torch.float32) / rotary_dim
    angle = positions.float()[..., None, None] * theta**-exponent
    return angle.cos(), angle.sin()


def apply_rotary(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the first rotary_dim entries of each head (NeoX halves), pass the others through.

    Args:
        x: [rows, tokens, heads, head_dim].
        table: from `rotary_table`.
    """
    cos, sin = table
    half = cos.shape[-1]
    first, second, rest = widen(x).split([half, half, x.shape[-1] - 2 * half], dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1).to(x.dtype)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
    """Causal attention inside each document, scale head_dim^-0.5, grouped kv heads.

    Args:
        q: [rows, tokens, heads, head_dim]. k, v: [rows, tokens, kv_heads, head_dim].

    Returns:
        [rows, tokens, heads, head_dim].
    """
    seen = documents.ids[:, :, None] == documents.ids[:, None, :]
    group = q.shape[2] // k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen.tril()[:, None]).transpose(1, 2)


def attention_part(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Softmax attention over some of the keys, to be merged with that over the others.

    Args:
        q: [rows, queries, heads, head_dim]. k, v: [rows, keys, kv_heads, head_dim].
        seen: [rows, queries, keys], at least one key a query; None = all.

    Returns:
        o [rows, queries, heads, head_dim] and log-sum-exp [rows, queries, heads], at least fp32.
    """
    scores = _grouped_scores(q, k, seen)
    lse = scores.logsumexp(-1, keepdim=True)
    o = torch.einsum("rhgij,rjhd->rihgd", (scores - lse).exp(), widen(v))
    return o.flatten(2, 3), lse[..., 0].flatten(1, 2).transpose(1, 2)


def merge_attention(o: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> tuple[Tensor, Tensor]:
    """(o, log-sum-exp) of two disjoint sets of keys as that of their union; shapes of `attention_part`."""
    total = torch.logaddexp(lse, part_lse)
    return o * (lse - total).exp()[..., None] + part * (part_lse - total).exp()[..., None], total


def attention_part_backward(
    q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, grad: Tensor, seen: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """What some of the keys contribute to dq, and their dk and dv; shapes of `attention_part`.

    Args:
        lse: [rows, queries, heads] over all keys.
        delta: [rows, queries, heads] sum of o * grad over head_dim, o over all keys.
        grad: gradient of o.

    Returns:
        dq, dk, dv, at least fp32.
    """
    grouped = (k.shape[2], q.shape[2] // k.shape[2])
    lse, delta = (x.transpose(1, 2).unflatten(1, grouped)[..., None] for x in (lse, delta))
    p = (_grouped_scores(q, k, seen) - lse).exp()
    queries, grad = (widen(x).unflatten(2, grouped) for x in (q, grad))
    dp = torch.einsum("rihgd,rjhd->rhgij", grad, widen(v))
    ds = p * (dp - delta) * q.shape[-1] ** -0.5
    dq = torch.einsum("rhgij,rjhd->rihgd", ds, widen(k)).flatten(2, 3)
    dk = torch.einsum("rhgij,rihgd->rjhd", ds, queries)
    return dq, dk, torch.einsum("rhgij,rihgd->rjhd", p, grad)


def _grouped_scores(q: Tensor, k: Tensor, seen: Tensor | None) -> Tensor:
    """[rows, kv_heads, heads / kv_heads, queries, keys] scaled scores, -inf where not seen."""
    grouped = widen(q).unflatten(2, (k.shape[2], -1))
    scores = torch.einsum("rihgd,rjhd->rhgij", grouped, widen(k)) * q.shape[-1] ** -0.5
    return scores if seen is None else scores.masked_fill(~seen[:, None, None], -torch.inf)


def lightning_attention(
    q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, documents: Documents, *, chunk: int = 64,
    initial_state: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Linear attention with fixed decay: S_t = exp(-s) S_{t-1} + k_t^T v_t, o_t = q_t S_t, per document.

    Block form of MiniMax-01 (arXiv 2501.08313 sec. 2.2) with the document rules of LASP+: a chunk's state
    holds its last document only, and enters the next chunk only for the document that both share.

    Args:
        q, k, v: [rows, tokens, heads, head_dim].
        slopes: [heads] s > 0.
        chunk: tokens a block; changes the order of sums only.
        initial_state: [rows, heads, head_dim, head_dim] S before the first token, seen by each row's first
            document; None = 0.

    Returns:
        [rows, tokens, heads, head_dim].
    """
    tokens, dtype = q.shape[1], q.dtype
    padding = -tokens % chunk
    q, k, v = (
        F.pad(widen(x), (0, 0, 0, 0, 0, padding)).unflatten(1, (-1, chunk)).transpose(2, 3) for x in (q, k, v)
    )  # [rows, chunks, heads, chunk, head_dim]
    ids = F.pad(documents.ids, (0, padding), value=-1).unflatten(1, (-1, chunk))[
        :, :, None
    ]  # [rows, chunks, 1, chunk]
    step = torch.arange(chunk, device=q.device, dtype=q.dtype)
    slope = slopes.to(q.dtype)[:, None]  # [heads, 1]
    began = F.pad(ids[:, 1:, :, :1] == ids[:, :-1, :, -1:], (0, 0, 0, 0, 1, 0), value=True)
    head = began & (ids == ids[..., :1])
    tail = ids == ids[..., -1:]

    distance = (step[:, None] - step).clamp(min=0)
    inside = (ids[..., :, None] == ids[..., None, :]).tril() * torch.exp(-slope[..., None] * distance)
    to_left = (head * torch.exp(-slope * (step + 1)))[..., None]
    to_right = (tail * torch.exp(-slope * (chunk - 1 - step)))[..., None]
    through = (head.all(-1) * torch.exp(-slope[:, 0] * chunk))[..., None, None]  # [rows, chunks, heads, 1, 1]

    if initial_state is None:
        initial_state = torch.zeros_like(q[:, 0, :, :1] * k[:, 0, :, :1].transpose(-1, -2))
    states = [initial_state.to(q.dtype)]
    ends = ((k * to_right).transpose(-1, -2) @ v)[:, :-1]
    for end, factor in zip(ends.unbind(1), through[:, :-1].unbind(1), strict=True):
        states.append(end + factor * states[-1])
    o = ((q @ k.transpose(-1, -2)) * inside) @ v + (q * to_left) @ torch.stack(states, 1)
    return o.transpose(2, 3).flatten(1, 2)[:, :tokens].to(dtype)


def lightning_end_state(k: Tensor, v: Tensor, slopes: Tensor, documents: Documents) -> Tensor:
    """S after the last token, from 0 before the first: what `lightning_attention` hands on to later tokens.

    It is the sum of exp(-s (tokens - 1 - t)) k_t^T v_t over the tokens t of the last document.

    Args:
        k, v: [rows, tokens, heads, head_dim].
        slopes: [heads] s > 0.

    Returns:
        [rows, heads, head_dim, head_dim], at least fp32.
    """
    k, v = widen(k), widen(v)
    left = torch.arange(k.shape[1] - 1, -1, -1, device=k.device, dtype=k.dtype)
    tail = documents.ids == documents.ids[:, -1:]
    weight = torch.exp(-slopes.to(k.dtype) * left[:, None]) * tail[..., None]  # [rows, tokens, heads]
    return torch.einsum("rthd,rthe->rhde", k * weight[..., None], v)


def lightning_attention_with_state(
    q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, documents: Documents, *,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`lightning_attention`, and S after the last token, at least fp32; what entered lasts for one document.

    Shapes of `lightning_attention` and `lightning_end_state`.
    """
    state = lightning_end_state(k, v, slopes, documents)
    if initial_state is not None:
        state = carry_state(initial_state, state, slopes, documents)
    return lightning_attention(q, k, v, slopes, documents, initial_state=initial_state), state


def carry_state(initial: Tensor, state: Tensor, slopes: Tensor, documents: Documents) -> Tensor:
    """State after the last token from that before the first one and `lightning_end_state`, shaped alike."""
    through = torch.exp(-slopes.to(state.dtype) * documents.ids.shape[1]) * (documents.ids[:, -1:] == 0)
    return state + through[..., None, None] * initial


def lightning_step(
    q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One token of `lightning_attention_with_state`: S = exp(-s) S + k^T v, o = q S.

    Args:
        q, k, v: [rows, 1, heads, head_dim].
        state: [rows, heads, head_dim, head_dim]; None = 0.
    """
    query, key, value = (widen(x).transpose(1, 2) for x in (q, k, v))  # [rows, heads, 1, head_dim]
    new = key.transpose(-1, -2) @ value
    if state is not None:
        new = new + torch.exp(-slopes.to(new.dtype))[:, None, None] * state
    return (query @ new).transpose(1, 2).to(q.dtype), new


def swiglu(gate_up: Tensor, scale: Tensor) -> Tensor:
    """SiLU(gate) * up * scale.

    Args:
        gate_up: [tokens, 2, ffn], gate first.
        scale: [tokens] fp32, the router's weight of each row.

    Returns:
        [tokens, ffn].
    """
    gate, up = widen(gate_up).unbind(1)
    return (F.silu(gate) * up * scale[:, None]).to(gate_up.dtype)


def choose_experts(
    logits: Tensor, top_k: int, *, bias: Tensor | None = None, real: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Find each token's top_k experts by logit or, with a bias, by softmax + bias; among equals the first.

    No gradient.

    Args:
        logits: [tokens, experts].
        bias: [experts].
        real: [tokens] bool, False for padding, which chooses, too, but is in no sum; None = all.

    Returns:
        experts [tokens, top_k] int64, best first, and sums [parts, experts + 2], to be added up over parts (1
        here): softmax probabilities of each expert, squares of log-sum-exp, entropies.
    """
    probs, squares = widen(logits).softmax(-1), widen(logits).logsumexp(-1).square()
    scores = logits if bias is None else probs + bias
    experts = scores.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    if real is not None:
        probs, squares = probs * real[:, None], squares * real
    entropy = -torch.special.xlogy(probs, probs).sum()
    return experts, torch.cat([probs.sum(0), torch.stack([squares.sum(), entropy])])[None]


class Balance(NamedTuple):
    """The router's losses on a rank's tokens: weight * (aux_coefficient * aux + z_coefficient * z)."""

    real: Tensor | None
    """[tokens] bool, False for padding; None = all real."""
    share: Tensor
    """[experts]: each one's part of the choices."""
    tokens: Tensor
    """Scalar: of the pool."""
    scale: float
    """aux = scale * sum_e share_e * (sum of the probabilities of e) / tokens."""
    aux_coefficient: float
    z_coefficient: float
    """z = sum of log-sum-exp^2 / tokens."""
    weight: float

    @property
    def factors(self) -> tuple[float, float]:
        """Of what is divided by tokens, in aux and z."""
        return self.weight * self.aux_coefficient * self.scale, self.weight * self.z_coefficient


def route(
    logits: Tensor, experts: Tensor, *, replicas: Tensor | None = None, balance: Balance | None = None
) -> Tensor:
    """Softmax probabilities of the chosen experts, each token's divided by their sum.

    Args:
        logits: [tokens, experts].
        experts: [tokens, top_k], different ones.
        replicas: [tokens, top_k], negative where a choice gets weight 0; None = all get theirs.
        balance: losses whose gradient the logits get as if they had been added to the differentiated loss.

    Returns:
        [tokens, top_k], at least fp32.
    """
    logits = widen(logits)
    probs = logits.softmax(-1)
    weights = probs.gather(-1, experts)
    if replicas is not None:
        weights = torch.where(replicas >= 0, weights, 0)
    weights = weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
    if balance is None:
        return weights
    squares = logits.logsumexp(-1).square()
    if balance.real is not None:
        probs, squares = probs * balance.real[:, None], squares * balance.real
    loss = balance.z_coefficient * (squares.sum() / balance.tokens)
    if balance.aux_coefficient:
        aux = balance.scale * (balance.share * probs.sum(0)).sum() / balance.tokens
        loss = loss + balance.aux_coefficient * aux
    return _AddLoss.apply(weights, loss * balance.weight)


class _AddLoss(torch.autograd.Function):
    """forward: the tensor itself; backward: its gradient, and 1 for the loss, as if it had been added."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(torch.ones_like(loss))
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        return grads[0], ctx.saved_tensors[0]


class Record(NamedTuple):
    """A router's statistics, which `record_choices` adds to in place."""

    load: Tensor
    """[experts] int64: this rank's choices."""
    dropped: Tensor
    """[experts] int64: of them, not admitted."""
    pooled: Tensor
    """[experts] int64: choices of the whole pool."""
    losses: Tensor
    """[3]: aux, z, entropy."""


def record_choices(
    record: Record, sums: Tensor, choices: Tensor, dropped: Tensor | None, pooled: Tensor, *, top_k: int,
    scale: float, so_far: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Add a micro-batch to the record: its choices, and aux (as in Balance), z and entropy over pool tokens.

    Args:
        sums: from `choose_experts`.
        choices, dropped, pooled: [experts] int64 of the micro-batch; dropped None = 0.
        so_far: shares are those of all choices in record.pooled, otherwise of this micro-batch.

    Returns:
        share [experts], each expert's part of the choices, and tokens, a scalar: of the pool.
    """
    record.load.add_(choices)
    record.pooled.add_(pooled)
    if dropped is not None:
        record.dropped.add_(dropped)
    counted, total = record.pooled if so_far else pooled, sums.sum(0)
    share, tokens = counted.to(sums.dtype) / counted.sum(), pooled.sum() / top_k
    aux = scale * (share * total[:-2]).sum() / tokens
    record.losses.add_(torch.stack([aux, *(total[-2:] / tokens)]))
    return share, tokens


def count_keys(keys: Tensor, num_keys: int) -> Tensor:
    """[num_keys] int64: how many of [choices] integers are each key; num_keys or more: not counted."""
    return torch.bincount(keys.clamp(max=num_keys), minlength=num_keys + 1)[:num_keys]


def permute(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """Each token's row at the places of its choices.

    Args:
        x: [tokens, hidden].
        order: [kept] choice (token * top_k + slot) at each place.
        inverse: [tokens * top_k] place of each choice; kept or more: it has none.

    Returns:
        [kept, hidden].
    """
    return x[order // (inverse.numel() // max(1, x.shape[0]))]


def unpermute(y: Tensor, inverse: Tensor, tokens: int) -> Tensor:
    """The sum of the rows of each token's choices: the transpose of `permute`.

    Args:
        y: [kept, hidden].
        inverse: [tokens * top_k] place of each choice; kept or more: it has none.

    Returns:
        [tokens, hidden].
    """
    if len(y) < len(inverse):  # what was left out adds a row of zeros
        y = torch.cat([y, y.new_zeros(1, *y.shape[1:])])
        inverse = inverse.clamp(max=len(y) - 1)
    return y[inverse].unflatten(0, (tokens, inverse.numel() // max(1, tokens))).sum(1)


def grouped_gemm(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """One matrix product per expert on consecutive groups of rows; empty groups are fine.

    Args:
        x: [tokens, in], sorted by expert.
        weight: [experts, out, in].
        ends: [experts] int32, where each expert's rows end.

    Returns:
        [tokens, out].
    """
    parts = torch.tensor_split(x, ends[:-1].long().cpu())
    return torch.cat([part @ w.T for part, w in zip(parts, weight, strict=True)])


def expert_ffn(x: Tensor, gate_up: Tensor, down: Tensor, scale: Tensor, ends: Tensor) -> Tensor:
    """Each row's expert: down(SiLU(gate x) * up x * scale).

    Args:
        x: [choices, hidden], sorted by expert.
        gate_up: [experts, 2, ffn, hidden], gate first.
        down: [experts, hidden, ffn].
        scale: [choices].
        ends: [experts] int32, cumulative.
    """
    inner = grouped_gemm(x, gate_up.flatten(1, 2), ends)
    return grouped_gemm(swiglu(inner.unflatten(-1, (2, -1)), scale), down, ends)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """-log softmax(hidden @ weight^T)[target] of each token, 0 where the target is negative; fp32.

    Args:
        hidden: [tokens, hidden]. weight: [vocab, hidden]. targets: [tokens].

    Returns:
        [tokens] losses.
    """
    logits = widen(hidden @ weight.T)
    return F.cross_entropy(logits, targets.clamp(min=0), reduction="none") * (targets >= 0)


def adamw(
    master: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, clip: Tensor, lr: float,
    beta1: float, beta2: float, eps: float, weight_decay: float, step: int,
) -> None:  # fmt: skip
    """One AdamW step of a tensor in place, on its gradient times `clip`; `step` counts this one."""
    grad = grad * clip
    exp_avg.mul_(beta1).add_(grad, alpha=1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    root = exp_avg_sq.sqrt().mul_((1 - beta2**step) ** -0.5).add_(eps)
    master.mul_(1 - lr * weight_decay).addcdiv_(exp_avg, root, value=-lr / (1 - beta1**step))
