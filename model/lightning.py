"""Lightning mixer: linear attention with a fixed decay per head and layer, full-width norm and sigmoid gate.

The rows of `qkv` are interleaved per head ([q_h | k_h | v_h]), so a contiguous row split is a head split.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.documents import Documents
from kernels.lightning_attention import lightning_attention
from kernels.packed_heads import split_heads
from model.config import ModelConfig, SlopeRule
from model.layers import GatedRMSNorm, linear


def decay_slopes(cfg: ModelConfig, layer: int) -> list[float]:
    """[num_heads] slopes s_h,l of a layer counted over all layers, softmax ones included.

    `text01`: the ALiBi slopes times 1 - l/(L-1) + 1e-5; a head count between two powers of two takes the
    lower power's slopes, then every other one of the upper's. `transformers`: 2^(-8(h+1)/H) for any H, and
    L-1+1e-5 below l.
    """
    heads = cfg.num_heads
    if cfg.slope_rule is SlopeRule.transformers:
        slopes = _geometric(heads)
        factor = 1 - layer / (cfg.num_layers - 1 + 1e-5) + 1e-5
    else:
        lower = 2 ** int(math.log2(heads))
        slopes = _geometric(lower) + _geometric(2 * lower)[0::2][: heads - lower]
        factor = 1 - layer / max(1, cfg.num_layers - 1) + 1e-5
    return [slope * factor for slope in slopes]


def _geometric(heads: int) -> list[float]:
    return [2 ** (-8 * (h + 1) / heads) for h in range(heads)]


class LightningCore(nn.Module):
    """Linear attention of one process; the context-parallel prefix form has the same signature."""

    slopes: Tensor

    def __init__(self, cfg: ModelConfig, layer: int) -> None:
        super().__init__()
        self.slope_values = decay_slopes(cfg, layer)
        self.register_buffer("slopes", torch.empty(cfg.num_heads, dtype=torch.float32), persistent=False)
        self.reset_buffers()

    def reset_buffers(self) -> None:
        """Fill the slopes again after the module came from the meta device."""
        self.slopes.copy_(torch.tensor(self.slope_values, device=self.slopes.device))

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, documents: Documents, *, filler: Callable[[], Any]
    ) -> tuple[Tensor, Any]:
        """q, k, v [rows, tokens, heads, head_dim] -> (o alike, result of filler)."""
        return lightning_attention(q, k, v, self.slopes, documents), filler()


class LightningAttention(nn.Module):
    """out(sigmoid(gate(x)) * RMSNorm(o)), o from SiLU(qkv(x)); no scale, no RoPE (arXiv 2501.08313)."""

    def __init__(self, cfg: ModelConfig, layer: int) -> None:
        super().__init__()
        width = cfg.num_heads * cfg.head_dim
        self.head_dim = cfg.head_dim
        self.qkv = linear(cfg.hidden_size, 3 * width)
        self.gate = linear(cfg.hidden_size, width)
        self.out = linear(width, cfg.hidden_size)
        self.norm: nn.Module = GatedRMSNorm(width, cfg.lightning_norm_eps)
        self.core: nn.Module = LightningCore(cfg, layer)

    def forward(self, x: Tensor, documents: Documents, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """[rows, tokens, hidden] -> [rows, tokens, hidden]; `rotary` is the other mixer's."""
        q, k, v = split_heads(F.silu(self.qkv(x)), self.head_dim)
        o, gate = self.core(q, k, v, documents, filler=lambda: self.gate(x))
        return self.out(self.norm(o.flatten(-2), gate))
