"""MiniMax-01's transformer: embed -> blocks -> norm -> head; parameter names count layers globally."""

import torch
from torch import Tensor, nn

from kernels.cross_entropy import linear_cross_entropy
from kernels.documents import Documents, locate_documents
from kernels.reference import rotary_table
from model.attention import SoftmaxAttention
from model.config import LayerType, ModelConfig
from model.layers import RMSNorm, linear
from model.lightning import LightningAttention, LightningCore
from model.moe import MoE, Router


class Block(nn.Module):
    """Post-norm DeepNorm residuals: h = norm(x); x = alpha h + f(h), for the mixer and for the experts."""

    def __init__(self, cfg: ModelConfig, layer: int) -> None:
        super().__init__()
        self.alpha = cfg.alpha
        self.mixer_norm = RMSNorm(cfg.hidden_size, cfg.norm_eps)
        self.mixer: nn.Module = (
            SoftmaxAttention(cfg)
            if cfg.layers[layer] is LayerType.softmax
            else LightningAttention(cfg, layer)
        )
        self.moe_norm = RMSNorm(cfg.hidden_size, cfg.norm_eps)
        self.moe = MoE(cfg)

    def forward(
        self, x: Tensor, documents: Documents, rotary: tuple[Tensor, Tensor], aux_weight: float
    ) -> Tensor:
        """[rows, tokens, hidden] -> [rows, tokens, hidden]."""
        h = self.mixer_norm(x)
        h = self.moe_norm(self.alpha * h + self.mixer(h, documents, rotary))
        return self.alpha * h + self.moe(h, aux_weight)


class Transformer(nn.Module):
    """The whole model."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.embed = nn.Embedding(cfg.vocab_size, cfg.hidden_size)
        self.blocks = nn.ModuleDict({str(layer): Block(cfg, layer) for layer in range(cfg.num_layers)})
        self.norm = RMSNorm(cfg.hidden_size, cfg.norm_eps)
        self.head = linear(cfg.hidden_size, cfg.vocab_size)

    def forward(
        self, tokens: Tensor, offsets: Tensor, *, targets: Tensor | None = None, aux_weight: float = 0.0
    ) -> Tensor:
        """Logits, or the loss of each token where targets are given.

        Args:
            tokens: [rows, tokens] int64.
            offsets: [rows, max_documents + 1] int32, starts of the documents padded with the row length.
            targets: [rows, tokens] int64, negative = none.
            aux_weight: factor of each layer's aux loss in the loss that will be differentiated.

        Returns:
            [rows, tokens, vocab] fp32 logits, or [rows, tokens] fp32 losses, 0 where there is no target.
        """
        documents = locate_documents(offsets, tokens.shape[1])
        rotary = rotary_table(documents.positions, self.cfg.rotary_dim, self.cfg.rope_theta)
        x = self.embed(tokens)
        for block in self.blocks.values():
            x = block(x, documents, rotary, aux_weight)
        x = self.norm(x)
        if targets is None:
            return self.head(x).to(torch.promote_types(x.dtype, torch.float32))
        return linear_cross_entropy(x, self.head.weight, targets)

    def reset_buffers(self) -> None:
        """Fill all buffers: they hold nothing after a move from the meta device."""
        for module in self.modules():
            if isinstance(module, LightningCore | Router):
                module.reset_buffers()

    def routers(self) -> list[Router]:
        """The routers of this model's layers, in order."""
        return [module for module in self.modules() if isinstance(module, Router)]
