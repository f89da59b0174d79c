"""What a model is: its sizes and the constants of its formulas."""

from dataclasses import dataclass
from enum import StrEnum


class LayerType(StrEnum):
    """The mixer of a block."""

    lightning = "lightning"
    softmax = "softmax"


class SlopeRule(StrEnum):
    """Public formulas for the decay slopes; they differ unless num_heads is a power of two (then by 1e-5)."""

    text01 = "text01"
    transformers = "transformers"


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
    """Choices of each token (top-k)."""
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
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"model.num_kv_heads={self.num_kv_heads} must divide model.num_heads={self.num_heads}; "
                f"use one of {[n for n in range(1, self.num_heads + 1) if self.num_heads % n == 0]}"
            )
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


@dataclass(kw_only=True)
class RouterConfig:
    """How tokens find their experts."""

    aux_loss_coefficient: float = 0.01
    """Weight of the load-balancing loss in the training loss."""

    def __post_init__(self) -> None:
        """Refuse a negative weight."""
        if self.aux_loss_coefficient < 0:
            raise ValueError(f"router.aux_loss_coefficient={self.aux_loss_coefficient} must be >= 0")
