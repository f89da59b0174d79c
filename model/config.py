"""What a model is: its sizes and the constants of its formulas."""

import math
from dataclasses import dataclass
from enum import StrEnum

LayerType = StrEnum("LayerType", ["lightning", "softmax"])
"""The mixer of a block."""
SlopeRule = StrEnum("SlopeRule", ["text01", "transformers"])
"""Public formulas for the decay slopes; they differ unless num_heads is a power of two (then by 1e-5)."""


def divisors(size: int) -> list[int]:
    """List what divides size, ascending, 1 and size included."""
    return [n for n in range(1, size + 1) if size % n == 0]


def require_divisor(key: str, value: int, of_key: str, size: int, *, most: int = 512) -> None:
    """Refuse a value that does not divide a size.

    Args:
        most: the largest legal value to suggest.

    Raises:
        ValueError: value does not divide size; it lists the values that do.
    """
    if size % value:
        legal = [n for n in divisors(size) if n <= most]
        raise ValueError(f"{key}={value} must divide {of_key}={size}; use one of {legal}")


@dataclass(kw_only=True)
class ModelConfig:
    """Hybrid lightning/softmax transformer with a mixture of experts in every layer (arXiv 2501.08313)."""

    num_layers: int
    """Blocks."""
    hidden_size: int
    """Width of the residual stream."""
    num_heads: int
    """Query heads of softmax layers, heads of lightning layers."""
    num_kv_heads: int
    """Key and value heads of softmax layers; divides num_heads."""
    head_dim: int
    """Width of a head."""
    rotary_dim: int
    """Entries of each head that RoPE rotates, even; the others pass through."""
    vocab_size: int
    """Rows of the embedding and of the untied head."""
    num_experts: int
    """Experts of each layer."""
    experts_per_token: int = 2
    """Choices of each token (top-k); with 1 the gate learns from the balancing losses alone."""
    expert_ffn_size: int
    """Inner width of each SwiGLU expert."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""
    softmax_every: int = 8
    """Every n-th layer is softmax, counted from 1; overridden by layer_types."""
    layer_types: list[LayerType] | None = None
    """Mixer of each layer; null = by softmax_every."""
    slope_rule: SlopeRule = SlopeRule.text01
    """Formula of the lightning decay slopes."""
    residual_alpha: float | None = None
    """DeepNorm weight of the normed residual; null = (2 num_layers)^0.25."""
    norm_eps: float = 1e-5
    """Epsilon of the block norms and the final norm."""
    lightning_norm_eps: float = 1e-6
    """Epsilon of the output norm in lightning layers (MiniMax-01 does not pass norm_eps to it)."""

    def __post_init__(self) -> None:
        """Check sizes and divisions."""
        for name, value in vars(self).items():
            if isinstance(value, int) and value < 1:
                raise ValueError(f"model.{name}={value} must be at least 1")
        if not 0 < self.rope_theta < math.inf:
            raise ValueError(
                f"model.rope_theta={self.rope_theta} must be a number above 0, such as 1e4 (8k) or 1e7 (1M)"
            )
        if not 0 < self.alpha < math.inf:
            raise ValueError(
                f"model.residual_alpha={self.residual_alpha} must be a number above 0; "
                "null = (2 num_layers)^0.25"
            )
        for name in ("norm_eps", "lightning_norm_eps"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(
                    f"model.{name}={getattr(self, name)} must be a number >= 0; MiniMax-01 has 1e-5 and 1e-6"
                )
        require_divisor("model.num_kv_heads", self.num_kv_heads, "model.num_heads", self.num_heads)
        if self.rotary_dim % 2 or self.rotary_dim > self.head_dim:
            raise ValueError(
                f"model.rotary_dim={self.rotary_dim} must be even and <= head_dim={self.head_dim}"
            )
        if self.experts_per_token > self.num_experts:
            raise ValueError(
                f"model.experts_per_token={self.experts_per_token} must be <= num_experts={self.num_experts}"
            )
        if self.layer_types is not None and len(self.layer_types) != self.num_layers:
            raise ValueError(
                f"model.layer_types has {len(self.layer_types)} entries; give one for each of "
                f"model.num_layers={self.num_layers}"
            )

    @property
    def layers(self) -> list[LayerType]:
        """Mixer of each layer."""
        if self.layer_types is not None:
            return self.layer_types
        last = self.softmax_every - 1
        return [
            LayerType.softmax if i % self.softmax_every == last else LayerType.lightning
            for i in range(self.num_layers)
        ]

    @property
    def alpha(self) -> float:
        """DeepNorm weight of the residual."""
        return (2 * self.num_layers) ** 0.25 if self.residual_alpha is None else self.residual_alpha


Scope = StrEnum("Scope", {"local": "local", "global": "global"})
"""Which tokens share an expert's capacity: those of one EP group, or of all (MiniMax-01's global router)."""


class AuxScope(StrEnum):
    """Over which tokens the aux loss counts choices."""

    micro_batch = "micro_batch"
    global_batch = "global_batch"
    """Those of the step so far, its probabilities those of the micro-batch."""


class AuxNormalisation(StrEnum):
    """Factor of the sum over experts of (share of choices) * (mean probability)."""

    switch = "switch"
    """experts: 1 at balance (Switch, Megatron)."""
    paper = "paper"
    """1 / experts, as MiniMax-01 prints it: 1 / experts^2 at balance."""


class Balancing(StrEnum):
    """What keeps experts equally loaded."""

    aux_loss = "aux_loss"
    """A loss on the gate."""
    bias = "bias"
    """A bias on the choice alone, moved after each step; no gradient (arXiv 2408.15664)."""


class Renormalise(StrEnum):
    """Which of a token's choices share a weight of 1."""

    before_drop = "before_drop"
    """All top-k: a dropped one's weight is lost."""
    after_drop = "after_drop"
    """Those that were admitted."""


@dataclass(kw_only=True)
class RouterConfig:
    """How tokens find their experts."""

    capacity_factor: float | None = None
    """Choices an expert may get, relative to an equal share; null = dropless. Evaluation drops nothing."""
    scope: Scope = Scope["global"]
    """Which tokens share the capacity; `local` depends on the layout and is there to compare with."""
    pool_groups: int | None = None
    """EP groups that share the capacity under scope global; null = all, else the layout matters."""
    renormalise: Renormalise = Renormalise.before_drop
    """Which of a token's choices share a weight of 1."""
    aux_loss_coefficient: float = 0.01
    """Weight of the load-balancing loss in the training loss."""
    aux_scope: AuxScope = AuxScope.micro_batch
    """Over which tokens it counts choices."""
    aux_normalisation: AuxNormalisation = AuxNormalisation.switch
    """Its scale."""
    z_loss_coefficient: float = 0.0
    """Weight of the mean square of the gate's log-sum-exp."""
    balancing: Balancing = Balancing.aux_loss
    """aux_loss, or bias: then the aux loss is a metric only."""
    bias_update_rate: float = 0.001
    """How far a step moves an expert's bias."""
    jitter: float = 0.0
    """The gate's input is multiplied by 1 +- up to this in training."""
    force: str = "none"
    """For benchmarks: `balanced`, or `skewed:ALPHA` (Zipf), chooses the experts instead of the gate."""

    def __post_init__(self) -> None:
        """Check each value by itself."""
        if self.capacity_factor is not None and not 1e-6 <= self.capacity_factor <= 1e6:
            raise ValueError(
                f"router.capacity_factor={self.capacity_factor} must lie in [1e-6, 1e6]; null = dropless"
            )
        if self.pool_groups is not None and (self.pool_groups < 1 or self.scope is Scope["local"]):
            raise ValueError(
                f"router.pool_groups={self.pool_groups} must be at least 1 and needs router.scope=global; "
                "use null for all EP groups"
            )
        for key in ("aux_loss_coefficient", "z_loss_coefficient", "bias_update_rate"):
            if not 0 <= getattr(self, key) < math.inf:
                raise ValueError(f"router.{key}={getattr(self, key)} must be >= 0")
        if not 0 <= self.jitter < 1:
            raise ValueError(f"router.jitter={self.jitter} must be >= 0 and below 1")
        kind, _, alpha = self.force.partition(":")
        try:
            is_skew = kind == "skewed" and 0 <= float(alpha) < math.inf
        except ValueError:
            is_skew = False
        if not is_skew and self.force not in ("none", "balanced"):
            raise ValueError(
                f"router.force={self.force} must be none, balanced or skewed:ALPHA with ALPHA >= 0"
            )

    @property
    def skew(self) -> float | None:
        """ALPHA of force=skewed:ALPHA."""
        kind, _, alpha = self.force.partition(":")
        return float(alpha) if kind == "skewed" else None

    def groups_in_pool(self, edp: int) -> int:
        """How many of edp EP groups share their capacity; 1 where choices never leave their group.

        Raises:
            ValueError: pool_groups does not divide edp.
        """
        if self.capacity_factor is None or self.scope is Scope["local"]:
            return 1
        if self.pool_groups is not None and edp % self.pool_groups:
            raise ValueError(
                f"router.pool_groups={self.pool_groups} must divide the EP groups, edp={edp}; "
                f"use {divisors(edp)}"
            )
        return self.pool_groups or edp
