"""Mixture of experts: fp32 router, dispatch, SwiGLU experts, combine.

`router.pool` and `dispatcher` are the places where a parallel form enters; their defaults know one process.
"""

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from kernels.grouped_gemm import grouped_gemm
from kernels.permute import permute, sort_choices, unpermute
from kernels.reference import swiglu
from model.config import ModelConfig
from model.layers import linear


class Routing(NamedTuple):
    """The router's decision."""

    weights: Tensor
    """[tokens, top_k] fp32, each row sums to 1."""
    experts: Tensor
    """[tokens, top_k] int64."""


class LocalPool(nn.Module):
    """Sums router statistics over the ranks that share a micro-batch: here, one."""

    def forward(self, statistics: Tensor) -> Tensor:
        """Pooled statistics of the same shape; the gradient is that of this rank's share."""
        return statistics


class Router(nn.Module):
    """softmax over all experts in fp32, top-k, renormalised to 1 (arXiv 2501.08313 sec. 2.1)."""

    load: Tensor
    aux_loss: Tensor

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.top_k = cfg.experts_per_token
        self.gate = linear(cfg.hidden_size, cfg.num_experts)
        self.pool: nn.Module = LocalPool()
        self.is_recording = True  # off while a block is computed again for its backward pass
        self.register_buffer("load", torch.zeros(cfg.num_experts, dtype=torch.int64), persistent=False)
        self.register_buffer("aux_loss", torch.zeros(()), persistent=False)

    def reset_buffers(self) -> None:
        """Start the statistics again."""
        self.load.zero_()
        self.aux_loss.zero_()

    def forward(self, x: Tensor, aux_weight: float) -> Routing:
        """Route [tokens, hidden]; aux_weight is the aux loss's factor in the loss that is differentiated.

        In training, adds the pool's choices to `load` and its aux loss to `aux_loss`.
        """
        probs = self.gate(x.to(self.gate.weight.dtype)).softmax(-1)
        weights, experts = probs.topk(self.top_k, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        if self.training:
            weights = self._balance(weights, probs, experts, aux_weight)
        return Routing(weights, experts)

    def _balance(self, weights: Tensor, probs: Tensor, experts: Tensor, aux_weight: float) -> Tensor:
        """Attach E * sum_e f_e P_e to the weights: f = share of choices, P = mean probability in the pool."""
        choices = torch.bincount(experts.flatten(), minlength=probs.shape[-1])
        pooled_choices, pooled_probs = self.pool(
            torch.stack([choices.to(probs.dtype), probs.sum(0)])
        ).unbind()
        tokens = pooled_choices.detach().sum() / self.top_k
        share = pooled_choices.detach() / (tokens * self.top_k)
        aux_loss = probs.shape[-1] * (share * (pooled_probs / tokens)).sum()
        if self.is_recording:
            with torch.no_grad():
                self.load += pooled_choices.long()
                self.aux_loss += aux_loss
        return _AddLoss.apply(weights, aux_loss * aux_weight)


class _AddLoss(torch.autograd.Function):
    """forward: the tensor itself; backward: its gradient, and 1 for the loss, as if it had been added."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(torch.ones_like(loss))
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        return grads[0], ctx.saved_tensors[0]


class Dispatched(NamedTuple):
    """Tokens on their way through the experts that this process holds."""

    x: Tensor
    """[choices, hidden], sorted by expert."""
    weights: Tensor
    """[choices] fp32 router weights."""
    ends: Tensor
    """[experts/ep] int32, where each expert's rows end."""
    way: Any
    """What the dispatcher needs to bring the rows back."""


class Dispatcher(Protocol):
    """The seam: brings tokens to their experts and back."""

    def dispatch(self, x: Tensor, routing: Routing) -> Dispatched:
        """[tokens, hidden] -> the rows of each expert, consecutive."""

    def combine(self, y: Tensor, sent: Dispatched) -> Tensor:
        """[choices, hidden], as the experts left them -> [tokens, hidden]: each token's sum."""


class LocalDispatcher(nn.Module):
    """Sorts the choices by expert on one process."""

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts

    def dispatch(self, x: Tensor, routing: Routing) -> Dispatched:
        """[tokens, hidden] -> the rows of each expert, consecutive and in token order."""
        order, inverse, ends = sort_choices(routing.experts.flatten(), self.num_experts)
        weights = permute(routing.weights.reshape(-1, 1), order, inverse)[:, 0]
        return Dispatched(permute(x, order, inverse), weights, ends, (order, inverse, x.shape[0]))

    def combine(self, y: Tensor, sent: Dispatched) -> Tensor:
        """[choices, hidden] -> [tokens, hidden]: each token's sum."""
        return unpermute(y, *sent.way)


class Experts(nn.Module):
    """SwiGLU experts: down(SiLU(gate x) * up x * weight)."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(cfg.num_experts, 2, cfg.expert_ffn_size, cfg.hidden_size))
        self.down = nn.Parameter(torch.empty(cfg.num_experts, cfg.hidden_size, cfg.expert_ffn_size))

    def forward(self, x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
        """[choices, hidden] sorted by expert -> [choices, hidden]."""
        gate_up = grouped_gemm(x, self.gate_up.flatten(1, 2), ends)
        return grouped_gemm(swiglu(gate_up.unflatten(-1, (2, -1)), weights), self.down, ends)


class MoE(nn.Module):
    """Router, dispatcher and experts of one layer."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.router = Router(cfg)
        self.dispatcher: Dispatcher = LocalDispatcher(cfg.num_experts)
        self.experts = Experts(cfg)

    def forward(self, x: Tensor, aux_weight: float) -> Tensor:
        """[rows, tokens, hidden] -> [rows, tokens, hidden]."""
        flat = x.flatten(0, 1)
        sent = self.dispatcher.dispatch(flat, self.router(flat, aux_weight))
        y = self.experts(sent.x, sent.weights, sent.ends)
        return self.dispatcher.combine(y, sent).view_as(x)
