"""Softmax mixer: grouped-query attention with partial RoPE inside each document."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from kernels.documents import Documents
from kernels.rotary import rotate_
from kernels.softmax_attention import softmax_attention
from model.config import ModelConfig
from model.layers import linear


class SoftmaxCore(nn.Module):
    """Attention of one process; the context-parallel ring has the same signature."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, documents: Documents, *, filler: Callable[[], Any]
    ) -> tuple[Tensor, Any]:
        """q [rows, tokens, heads, head_dim], k and v with kv_heads -> (o like q, result of filler)."""
        return softmax_attention(q, k, v, documents), filler()


class SoftmaxAttention(nn.Module):
    """out(attention(RoPE(q), RoPE(k), v)); no bias, no qk-norm, no gate (arXiv 2501.08313 sec. 2)."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.head_dim = cfg.head_dim
        self.q = linear(cfg.hidden_size, cfg.num_heads * cfg.head_dim)
        self.k = linear(cfg.hidden_size, cfg.num_kv_heads * cfg.head_dim)
        self.v = linear(cfg.hidden_size, cfg.num_kv_heads * cfg.head_dim)
        self.out = linear(cfg.num_heads * cfg.head_dim, cfg.hidden_size)
        self.core: nn.Module = SoftmaxCore()

    def forward(self, x: Tensor, documents: Documents, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """[rows, tokens, hidden] -> [rows, tokens, hidden]."""
        q, k = rotate_(self.q(x), self.k(x), rotary, head_dim=self.head_dim)
        v = self.v(x).unflatten(-1, (-1, self.head_dim))
        o, _ = self.core(q, k, v, documents, filler=lambda: None)
        return self.out(o.flatten(-2))
