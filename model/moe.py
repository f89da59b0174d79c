"""Mixture of experts: router, dispatcher, SwiGLU experts.

`router.pool` and `dispatcher` are the places where a parallel form enters; their defaults know one process.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from kernels.expert_ffn import MasterGrads, expert_ffn
from kernels.permute import permute, sort_choices, unpermute
from model.config import ModelConfig, RouterConfig
from model.router import Micro, Router, Routing

Compute = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x [choices, hidden] sorted by expert, weights [choices] fp32, ends [experts/ep] int32) -> like x."""


class Dispatcher(Protocol):
    """The seam: brings tokens to their experts and back."""

    def __call__(self, x: Tensor, routing: Routing, compute: Compute) -> Tensor:
        """[tokens, hidden] -> [tokens, hidden]: each token's sum of what the experts made of it."""


class LocalDispatcher:
    """Sorts the choices by expert on one process.

    With a capacity or padding it reads how many are left on the host: one synchronisation a layer and pass.
    """

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts

    def __call__(self, x: Tensor, routing: Routing, compute: Compute) -> Tensor:
        """[tokens, hidden] -> [tokens, hidden]."""
        weights, experts, replicas = routing
        if replicas is None:
            sorting = sort_choices(experts.flatten(), self.num_experts)
        else:
            kept = torch.where(replicas >= 0, experts, self.num_experts)
            sorting = sort_choices(kept.flatten(), self.num_experts)
            sorting = sorting.keep(int(sorting.ends[-1]))
        y = compute(permute(x, sorting), permute(weights.reshape(-1, 1), sorting).flatten(), sorting.ends)
        return unpermute(y, sorting, len(x))


class Experts(nn.Module):
    """SwiGLU experts: down(SiLU(gate x) * up x * weight)."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(cfg.num_experts, 2, cfg.expert_ffn_size, cfg.hidden_size))
        self.down = nn.Parameter(torch.empty(cfg.num_experts, cfg.hidden_size, cfg.expert_ffn_size))
        self.master_grads: MasterGrads = None
        """Of gate_up and down, where a parallel form keeps fp32 masters."""

    def forward(self, x: Tensor, routing: Routing, dispatcher: Dispatcher) -> Tensor:
        """[tokens, hidden] -> the same; one call however often the dispatcher computes, as FSDP2 needs it."""
        return dispatcher(x, routing, self._compute)

    def _compute(self, x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
        return expert_ffn(x, self.gate_up, self.down, weights, ends, self.master_grads)


class MoE(nn.Module):
    """Router, dispatcher and experts of one layer."""

    def __init__(self, cfg: ModelConfig, router: RouterConfig, layer: int) -> None:
        super().__init__()
        self.router = Router(cfg, router, layer)
        self.dispatcher: Dispatcher = LocalDispatcher(cfg.num_experts)
        self.experts = Experts(cfg)

    def forward(self, x: Tensor, micro: Micro) -> Tensor:
        """[rows, tokens, hidden] -> [rows, tokens, hidden]."""
        return self.experts(x.flatten(0, 1), self.router(x, micro), self.dispatcher).view_as(x)
