"""Parameters and FLOPs of a model, by formula (minimax-01: 456.09 B parameters, 45.9 B active)."""

from dataclasses import dataclass

from model.config import LayerType, ModelConfig


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of parameters."""

    total: int
    """All."""
    active: int
    """Those a token meets, without embedding and head."""


def count_parameters(cfg: ModelConfig) -> ParameterCount:
    """Count the parameters of a model without building it."""
    h, width, kv_width = cfg.hidden_size, cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim
    mixer = {
        LayerType.lightning: 5 * h * width + width,
        LayerType.softmax: 2 * h * width + 2 * h * kv_width,
    }
    expert = 3 * h * cfg.expert_ffn_size
    shared = sum(mixer[kind] for kind in cfg.layers) + cfg.num_layers * (2 * h + h * cfg.num_experts) + h
    return ParameterCount(
        total=shared + cfg.num_layers * cfg.num_experts * expert + 2 * cfg.vocab_size * h,
        active=shared + cfg.num_layers * cfg.experts_per_token * expert,
    )


def forward_flops_per_token(
    cfg: ModelConfig, context_tokens: float, *, chunk: int = 256
) -> tuple[list[float], float]:
    """Matmul FLOPs of one token's forward pass: of each layer, and of the head.

    Args:
        context_tokens: mean document length over tokens, sum len^2 / sum len; a token sees half of it.
        chunk: block of the lightning kernel, of which a token sees half (arXiv 2501.08313: 256).
    """
    h, width, kv_width = cfg.hidden_size, cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim
    mixer = {
        LayerType.lightning: 10 * h * width + 4 * width * cfg.head_dim + 2 * width * chunk,
        LayerType.softmax: 4 * h * (width + kv_width) + 2 * width * context_tokens,
    }
    moe = 2 * h * (3 * cfg.experts_per_token * cfg.expert_ffn_size + cfg.num_experts)
    return [mixer[kind] + moe for kind in cfg.layers], 2 * h * cfg.vocab_size


def training_flops_per_token(cfg: ModelConfig, context_tokens: float) -> float:
    """Matmul FLOPs of forward and backward (twice the forward) of one token, recomputation not counted."""
    layers, head = forward_flops_per_token(cfg, context_tokens)
    return 3 * (sum(layers) + head)
