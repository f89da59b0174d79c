"""AdamW over this rank's fp32 masters: one interface, whoever computes the step.

Moments have no library's format: `exp_avg`, `exp_avg_sq` by parameter name, and one step count.
"""

import importlib.util
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
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


class Implementation(StrEnum):
    """Who computes the step of AdamW."""

    auto = "auto"
    """kernel on a GPU, torch on a CPU, DeepSpeed's CPU Adam with offload=cpu."""
    kernel = "kernel"
    """kernels/adamw.py: one pass clips, steps, and writes what the model computes with."""
    torch = "torch"
    """torch.optim.AdamW, fused."""
    apex = "apex"
    """NVIDIA apex's FusedAdam."""


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
    implementation: Implementation = Implementation.auto
    """Who computes the step; all give the same update but for rounding."""
    offload: Offload = Offload.none
    """cpu: masters, moments and the step in host memory, by DeepSpeed's CPU Adam."""
    max_grad_norm: float = 1.0
    """Gradients with a larger norm are scaled down to it; .inf = never."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.offload is Offload.cpu and self.implementation is not Implementation.auto:
            raise ValueError(
                f"optimizer.implementation={self.implementation} must be auto with optimizer.offload=cpu, "
                "which DeepSpeed computes; leave one of them out"
            )
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


class AdamW:
    """AdamW over the masters of all shards, its moments at zero."""

    def __init__(self, gradients: Gradients, cfg: OptimizerConfig) -> None:
        """Choose who computes it.

        Raises:
            ValueError: the implementation that was asked for cannot work here.
        """
        self.gradients, self.shards = gradients, gradients.shards
        on_gpu = self.shards[0].master.device.type == "cuda"
        self.who = str(choose_implementation(cfg, on_gpu=on_gpu))
        self.groups: list[dict[str, Any]] = [
            {"params": [s.master for s in self.shards if len(s.shape) > 1], "weight_decay": cfg.weight_decay},
            {"params": [s.master for s in self.shards if len(s.shape) == 1], "weight_decay": 0.0},
        ]
        options: dict[str, Any] = {"lr": cfg.lr, "betas": (cfg.beta1, cfg.beta2), "eps": cfg.eps}
        self.state: Mapping[Tensor, dict[str, Any]] = {shard.master: {} for shard in self.shards}
        self.copies = {s.master: s.parameter.detach() for s in self.shards if s.is_copied}
        self.library: torch.optim.Optimizer | None = None
        match self.who:
            case "kernel":
                self.groups = [options | group for group in self.groups]
            case "apex":
                from apex.optimizers import FusedAdam

                self.library = FusedAdam(self.groups, adam_w_mode=True, **options)
            case "torch":
                self.library = torch.optim.AdamW(self.groups, fused=True, **options)
            case _:
                self.library = build_cpu_adam(self.groups, **options)
        if self.library is not None:
            self.groups, self.state = self.library.param_groups, self.library.state
        for shard in self.shards:
            self.state[shard.master].update({m: torch.zeros_like(shard.master) for m in MOMENTS})
        self.set_step(0)
        log.info("optimizer: AdamW by %s", self.who)

    def step(self, clip: float = 1.0) -> None:
        """Step once on the gradients times `clip`; the model computes with the new values."""
        if self.library is None:
            for group in self.groups:
                self._step_by_kernel(group, clip)
            return
        if clip != 1:
            self.gradients.scale(clip)
        self.library.step()
        publish(self.shards)

    @torch.no_grad()
    def _step_by_kernel(self, group: dict[str, Any], clip: float) -> None:
        group["step"] += 1
        beta1, beta2 = group["betas"]
        hyper = Hyperparameters(group["lr"], beta1, beta2, group["eps"], group["weight_decay"], group["step"])
        moving = []
        for p in group["params"]:
            first, second = (self.state[p][m] for m in MOMENTS)
            moving.append(Moving(p, p.grad, first, second, self.copies.get(p)))
        if moving:
            adamw(moving, moving[0].master.new_full((), clip), hyper)

    def set_lr(self, lr: float) -> None:
        """Use this learning rate from the next step on."""
        for group in self.groups:
            group["lr"] = lr

    def moments(self, shards: Sequence[Shard]) -> dict[str, Tensor]:
        """Return `exp_avg.NAME` and `exp_avg_sq.NAME` of these shards, each [local shape] fp32."""
        return {f"{m}.{s.name}": self.state[s.master][m] for s in shards for m in MOMENTS}

    def set_step(self, step: int) -> None:
        """Set the number of optimizer steps that the moments have seen."""
        if self.who in ("kernel", "apex"):  # they count by group, the others by tensor
            for group in self.groups:
                group["step"] = step
            return
        for shard in self.shards:
            count = torch.tensor(float(step), device=shard.master.device) if self.who == "torch" else step
            self.state[shard.master]["step"] = count


def choose_implementation(cfg: OptimizerConfig, *, on_gpu: bool) -> Implementation | str:
    """Choose who computes the step.

    Args:
        on_gpu: whether the masters are.

    Raises:
        ValueError: what was asked for needs a GPU or apex.
    """
    asked = cfg.implementation
    if cfg.offload is Offload.cpu:
        return "DeepSpeed's CPU Adam"
    if asked is Implementation.auto:
        return Implementation.kernel if on_gpu else Implementation.torch
    if asked is not Implementation.torch and not on_gpu:
        raise ValueError(f"optimizer.implementation={asked} needs a GPU; use auto or torch")
    lacks = [name for name in ("apex", "amp_C") if importlib.util.find_spec(name) is None]
    if asked is Implementation.apex and lacks:
        what = "is not installed" if "apex" in lacks else "is installed without its CUDA kernels"
        raise ValueError(f"optimizer.implementation=apex: apex {what}; build it from source, or use auto")
    return asked
