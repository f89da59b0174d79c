"""AdamW over this rank's fp32 masters: NVIDIA apex's where it is installed, else our kernel, torch's on CPU.

Moments have no library's format: `exp_avg`, `exp_avg_sq` by parameter name, and one step count.
"""

import importlib.util
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.adamw import Hyperparameters, Moving, adamw
from parallel.config import Offload
from parallel.gradients import Gradients
from parallel.placement import Shard, publish
from parallel.zero import build_cpu_adam

log = logging.getLogger(__name__)

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(kw_only=True)
class OptimizerConfig:
    """AdamW; MiniMax-01 publishes the betas and the decay, not eps and clip (arXiv 2501.08313 sec. 4.2)."""

    lr: float = 2e-4
    """Peak learning rate."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled decay; norm weights have none."""
    offload: Offload = Offload.none
    """cpu: masters, moments and the step in host memory, by DeepSpeed's CPU Adam."""
    max_grad_norm: float = 1.0
    """Gradients with a larger norm are scaled down to it; .inf = never."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        for key in ("lr", "weight_decay"):
            if not 0 <= getattr(self, key) < math.inf:
                raise ValueError(f"optimizer.{key}={getattr(self, key)} must be a number >= 0")
        if not 0 < self.eps < math.inf:
            raise ValueError(
                f"optimizer.eps={self.eps} must be a number above 0, such as 1e-8: it divides moments of 0"
            )
        if not self.max_grad_norm > 0:
            raise ValueError(
                f"optimizer.max_grad_norm={self.max_grad_norm} must be above 0; inf = no clipping"
            )
        for key in ("beta1", "beta2"):
            if not 0 <= getattr(self, key) < 1:
                raise ValueError(f"optimizer.{key}={getattr(self, key)} must lie in [0, 1)")


class FusedAdamW(torch.optim.Optimizer):
    """kernels/adamw.py as an optimizer: one pass clips, steps, and writes what the model computes with."""

    def __init__(self, groups: list[dict[str, Any]], shards: Sequence[Shard], **options: Any) -> None:
        super().__init__(groups, options)
        self.copies = {s.master: s.parameter.detach() for s in shards if s.is_copied}

    @torch.no_grad()
    def step(self, closure: None = None, *, clip: Tensor | None = None) -> None:  # type: ignore[override]
        """Update all masters and their copies from the gradients times `clip`, an fp32 scalar."""
        for group in self.param_groups:
            group["step"] += 1
            beta1, beta2 = group["betas"]
            hyper = Hyperparameters(
                group["lr"], beta1, beta2, group["eps"], group["weight_decay"], group["step"]
            )
            moving = [
                Moving(p, p.grad, self.state[p]["exp_avg"], self.state[p]["exp_avg_sq"], self.copies.get(p))
                for p in group["params"]
            ]
            if moving:
                adamw(moving, moving[0].master.new_ones(()) if clip is None else clip, hyper)


def build_optimizer(shards: Sequence[Shard], cfg: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW with two parameter groups (matrices decay, norm weights do not), its moments at zero."""
    groups = [
        {"params": [s.master for s in shards if len(s.shape) > 1], "weight_decay": cfg.weight_decay},
        {"params": [s.master for s in shards if len(s.shape) == 1], "weight_decay": 0.0},
    ]
    optimizer: torch.optim.Optimizer
    options: dict[str, Any] = {"lr": cfg.lr, "betas": (cfg.beta1, cfg.beta2), "eps": cfg.eps}
    device = shards[0].master.device
    reason = _why_not_apex(device)
    if cfg.offload is Offload.cpu:
        log.info("optimizer: DeepSpeed CPU Adam (optimizer.offload=cpu)")
        optimizer = build_cpu_adam(groups, **options)
    elif reason is None:
        from apex.optimizers import FusedAdam

        log.info("optimizer: apex FusedAdam")
        optimizer = FusedAdam(groups, adam_w_mode=True, **options)
    elif device.type == "cuda":
        log.info("optimizer: fused AdamW (%s)", reason)
        optimizer = FusedAdamW(groups, shards, **options)
    else:
        log.info("optimizer: torch fused AdamW (%s)", reason)
        optimizer = torch.optim.AdamW(groups, fused=True, **options)
    for shard in shards:
        optimizer.state[shard.master].update({m: torch.zeros_like(shard.master) for m in MOMENTS})
    set_step(optimizer, shards, 0)
    return optimizer


def clipped_step(optimizer: torch.optim.Optimizer, gradients: Gradients, clip: Tensor) -> None:
    """One step on the gradients times `clip`, an fp64 scalar; the model computes with the new values."""
    if isinstance(optimizer, FusedAdamW):
        optimizer.step(clip=clip.float())
        return
    factor = clip.item()
    if factor != 1:
        gradients.scale(factor)
    optimizer.step()
    publish(gradients.shards)


def _why_not_apex(device: torch.device) -> str | None:
    """Why NVIDIA apex cannot be used; None if it can."""
    if device.type != "cuda":
        return "apex needs CUDA"
    if importlib.util.find_spec("apex") is None:
        return "apex is not installed"
    if importlib.util.find_spec("amp_C") is None:
        return "apex is installed without its CUDA kernels"
    return None


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Use this learning rate in the next step."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def moments(optimizer: torch.optim.Optimizer, shards: Sequence[Shard]) -> dict[str, Tensor]:
    """`exp_avg.NAME` and `exp_avg_sq.NAME` of every shard, each [local shape] fp32."""
    return {f"{m}.{s.name}": optimizer.state[s.master][m] for s in shards for m in MOMENTS}


def set_step(optimizer: torch.optim.Optimizer, shards: Sequence[Shard], step: int) -> None:
    """Set the number of optimizer steps that the moments have seen."""
    if type(optimizer).__name__ in ("FusedAdam", "FusedAdamW"):  # they count by group, the others by tensor
        for group in optimizer.param_groups:
            group["step"] = step
        return
    is_torch = isinstance(optimizer, torch.optim.AdamW)
    for shard in shards:
        count = torch.tensor(float(step), device=shard.master.device) if is_torch else step
        optimizer.state[shard.master]["step"] = count
