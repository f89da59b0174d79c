"""Router of the experts: fp32 softmax, top-k, balancing losses, counts; who admits: model/capacity.py.

`pool` is the place where a parallel form enters; its default knows one process.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.counting import count_keys
from kernels.reference import Balance, Record
from kernels.router import choose_experts, record_choices, route
from model.capacity import LocalPool, Pool, decide_replicas, line_up
from model.config import AuxNormalisation, AuxScope, Balancing, ModelConfig, Renormalise, RouterConfig
from model.hashing import draw, uniform

T = TypeVar("T")


class Micro(NamedTuple):
    """What the router knows of a micro-batch besides its hidden states."""

    offsets: Tensor
    """[rows, max_documents + 1], of the full rows."""
    number: int
    """Counts the micro-batches of the run."""
    loss_weight: float
    """Factor of each layer's balancing losses, before their coefficients, in the differentiated loss."""
    lengths: Tensor | None = None
    """[rows]: tokens of each row; those behind them are padding. None: there is none."""


class Routing(NamedTuple):
    """The router's decision for this rank's tokens."""

    weights: Tensor
    """[tokens, top_k] fp32."""
    experts: Tensor
    """[tokens, top_k] int64."""
    replicas: Tensor | None
    """[tokens, top_k]: EP group that computes the choice, -1 where none does; None where all are its own."""


class Decision(NamedTuple):
    """The part of a routing that has no gradient; recomputation takes it over from the first pass."""

    experts: Tensor
    """[tokens, top_k] int64."""
    replicas: Tensor | None
    """As in Routing."""
    real: Tensor | None
    """[tokens] bool: False for padding; None without padding."""
    share: Tensor
    """[experts]: part of the choices of aux_scope that chose each expert."""
    tokens: Tensor
    """Scalar: tokens of the pool."""


class Memo:
    """What the first pass of a block computed and its recomputation takes over, by name."""

    def __init__(self) -> None:
        self._kept: dict[str, Any] = {}

    def __contains__(self, name: str) -> bool:
        """Whether the first pass has computed it."""
        return name in self._kept

    def once(self, name: str, compute: Callable[[], T]) -> T:
        """Compute it in the first pass; return the same in the second."""
        if name not in self._kept:
            self._kept[name] = compute()
        return self._kept[name]


class Gate(nn.Linear):
    """[..., hidden] of any dtype -> [..., experts] in the weight's; keeps x for backward as it came."""

    def __init__(self, hidden_size: int, num_experts: int) -> None:
        super().__init__(hidden_size, num_experts, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Widen, multiply."""
        return _WideLinear.apply(x, self.weight)


class _WideLinear(torch.autograd.Function):
    """forward: x in the weight's dtype times the weight; backward: widens x again, no copy is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x.to(weight.dtype), weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        grad = grads[0].flatten(0, -2)
        of_x = (grad @ weight).to(x.dtype).view_as(x)
        return of_x, grad.T @ x.to(weight.dtype).flatten(0, -2)


class Router(nn.Module):
    """softmax over all experts in fp32, top-k, renormalised to 1, capacity (arXiv 2501.08313 sec. 2.1).

    Counts and loss sums are this rank's; their sum over the pool's ranks is the pool's.
    """

    load: Tensor
    dropped: Tensor
    moved: Tensor
    step_choices: Tensor
    bias: Tensor
    losses: Tensor

    def __init__(self, cfg: ModelConfig, router: RouterConfig, layer: int) -> None:
        super().__init__()
        self.cfg, self.layer, self.seed = router, layer, 0
        self.num_experts, self.top_k = cfg.num_experts, cfg.experts_per_token
        self.gate = Gate(cfg.hidden_size, cfg.num_experts)
        self.pool: Pool = LocalPool()
        self.memo: Memo | None = None
        """Set while a block runs that will be, or is being, computed again."""
        counts = torch.zeros(cfg.num_experts, dtype=torch.int64)
        for name in ("load", "dropped", "step_choices"):  # step_choices: of the whole pool
            self.register_buffer(name, counts.clone(), persistent=False)
        self.register_buffer("moved", torch.zeros((), dtype=torch.int64), persistent=False)
        self.register_buffer("bias", torch.zeros(cfg.num_experts), persistent=False)
        # [aux, z, entropy] of the step, each a sum of the micro-batches' means over the pool
        self.register_buffer("losses", torch.zeros(3), persistent=False)

    def reset_buffers(self) -> None:
        """Start all statistics, and the bias, from 0."""
        for buffer in self.buffers(recurse=False):
            buffer.zero_()

    def begin_step(self) -> None:
        """Forget the step before; load, dropped and moved go on until they are read."""
        self.step_choices.zero_()
        self.losses.zero_()

    def end_step(self) -> None:
        """Move the bias of each expert towards an equal share of the step's choices."""
        if self.cfg.balancing is Balancing.bias:
            choices = self.step_choices.double()
            self.bias += self.cfg.bias_update_rate * (choices.mean() - choices).sign().float()

    def forward(self, x: Tensor, micro: Micro) -> Routing:
        """Route [rows, tokens/(cp tp), hidden]; in training, count and attach the balancing losses."""
        seen = x * self._jitter(x, micro) if self.training and self.cfg.jitter else x
        logits = self.gate(seen).flatten(0, 1)
        memo = self.memo or Memo()
        decision = memo.once("decision", lambda: self._decide(logits.detach(), x, micro))
        weights = route(
            logits, decision.experts,
            replicas=decision.replicas if self.cfg.renormalise is Renormalise.after_drop else None,
            balance=self._balance(decision, micro) if self.training else None,
        )  # fmt: skip
        return Routing(weights, decision.experts, decision.replicas)

    @torch.no_grad()
    def _decide(self, logits: Tensor, x: Tensor, micro: Micro) -> Decision:
        """Choose experts by [tokens, experts] logits, drop what exceeds the capacity, count."""
        pool, real = self.pool, None
        replicas, group = None, pool.rank // pool.group_size
        if micro.lengths is not None:
            real = (pool.places(x).positions < micro.lengths[:, None]).flatten()
        bias = self.bias if self.cfg.balancing is Balancing.bias else None
        experts, sums = choose_experts(logits, self.top_k, bias=bias, real=real)
        if self.cfg.force != "none":
            experts = self._force(x, micro)
        wanted = experts
        if real is not None:
            wanted = torch.where(real[:, None], experts, self.num_experts)
            replicas = torch.where(real[:, None], group, -1).expand_as(experts)
        if not self.training:  # no capacity: held-out loss is that of the model as it is served
            return Decision(experts, replicas, real, *sums.new_empty(2, 0))
        dropped = None
        if self.cfg.capacity_factor is None:
            choices = count_keys(wanted.flatten(), self.num_experts)
            pooled = pool.sum(choices)
        else:
            cells, keys = line_up(pool.places(x), micro.offsets, draw(self.seed, micro.number, self.layer))
            replicas, choices, dropped, pooled = decide_replicas(
                wanted, cells, keys, pool, num_experts=self.num_experts, factor=self.cfg.capacity_factor
            )
            if pool.num_groups > 1:
                self.moved += ((replicas >= 0) & (replicas != group)).sum()
        share, tokens = record_choices(
            Record(self.load, self.dropped, self.step_choices, self.losses), sums, choices, dropped, pooled,
            top_k=self.top_k, scale=self._aux_scale, so_far=self.cfg.aux_scope is AuxScope.global_batch,
        )  # fmt: skip
        return Decision(experts, replicas, real, share, tokens)

    def _force(self, x: Tensor, micro: Micro) -> Tensor:
        """[tokens, top_k] experts that no logit has a say in."""
        index = self.pool.places(x).numbers.reshape(-1, 1)
        every_expert = torch.arange(self.num_experts, device=x.device)
        if self.cfg.skew is None:
            return (index * self.top_k + every_expert[: self.top_k] + self.layer) % self.num_experts
        key = draw(self.seed, micro.number, self.layer, 1)
        noise = -torch.log(-torch.log(uniform(index * self.num_experts + every_expert, key)))  # Gumbel
        return (noise - self.cfg.skew * torch.log(every_expert + 1.0)).topk(self.top_k, dim=-1).indices

    @property
    def _aux_scale(self) -> float:
        """Of sum_e share_e * mean P_e."""
        is_switch = self.cfg.aux_normalisation is AuxNormalisation.switch
        return self.num_experts if is_switch else 1 / self.num_experts

    def _balance(self, decision: Decision, micro: Micro) -> Balance:
        """This rank's part of the losses."""
        cfg = self.cfg
        return Balance(
            decision.real, decision.share, decision.tokens, scale=self._aux_scale,
            aux_coefficient=cfg.aux_loss_coefficient if cfg.balancing is Balancing.aux_loss else 0.0,
            z_coefficient=cfg.z_loss_coefficient, weight=micro.loss_weight,
        )  # fmt: skip

    def _jitter(self, x: Tensor, micro: Micro) -> Tensor:
        """Factors of [rows, tokens, hidden], by seed, micro-batch, layer, place in the pool and entry."""
        index = self.pool.places(x).numbers[..., None] * x.shape[-1]
        key = draw(self.seed, micro.number, self.layer, 2)
        noise = uniform(index + torch.arange(x.shape[-1], device=x.device), key)
        return (1 + self.cfg.jitter * (2 * noise - 1)).to(self.gate.weight.dtype)
