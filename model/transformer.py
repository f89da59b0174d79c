"""MiniMax-01's transformer: embed -> blocks -> norm -> head; parameter names count layers globally."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.cross_entropy import linear_cross_entropy
from kernels.documents import Documents, locate_documents
from kernels.reference import rotary_table, widen
from kernels.rms_norm import add_carried
from model.attention import SoftmaxAttention
from model.config import LayerType, ModelConfig, RouterConfig
from model.layers import ResidualNorm, RMSNorm
from model.lightning import LightningAttention, LightningCore
from model.moe import MoE
from model.router import Micro, Router


class Block(nn.Module):
    """Post-norm DeepNorm residuals: h = norm(x); x = alpha h + f(h), for the mixer and for the experts."""

    def __init__(self, cfg: ModelConfig, router: RouterConfig, layer: int) -> None:
        super().__init__()
        self.mixer_norm = ResidualNorm(cfg.hidden_size, cfg.norm_eps, cfg.alpha)
        self.mixer: nn.Module = (
            SoftmaxAttention(cfg)
            if cfg.layers[layer] is LayerType.softmax
            else LightningAttention(cfg, layer)
        )
        self.moe_norm = ResidualNorm(cfg.hidden_size, cfg.norm_eps, cfg.alpha)
        self.moe = MoE(cfg, router, layer)

    def forward(self, x: Tensor, documents: Documents, rotary: tuple[Tensor, Tensor], micro: Micro) -> Tensor:
        """[rows, tokens, hidden] -> [rows, tokens, hidden]."""
        h, carried = self.mixer_norm(x)
        h, carried = self.moe_norm(self.mixer(h, documents, rotary), carried)
        return add_carried(carried, self.moe(h, micro))


class Head(nn.Module):
    """Untied output projection, with the loss on top where targets are known."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(cfg.vocab_size, cfg.hidden_size))

    def forward(self, x: Tensor, targets: Tensor | None) -> Tensor:
        """[rows, tokens, hidden] -> [rows, tokens, vocab] fp32 logits, or [rows, tokens] losses."""
        if targets is None:
            return widen(F.linear(x, self.weight))
        return linear_cross_entropy(x, self.weight, targets)


class Transformer(nn.Module):
    """The whole model, or the layers of one pipeline stage with the ends that belong to it.

    Seams set from outside: `locate` tells documents and positions of the tokens that this rank holds;
    `sequence_parts` is how many ranks share the tokens of a hidden state between two blocks. `rope_theta`
    may change from stage to stage of a curriculum.
    """

    def __init__(
        self, cfg: ModelConfig, layers: Sequence[int] | None = None, *, router: RouterConfig | None = None
    ) -> None:
        super().__init__()
        router = RouterConfig() if router is None else router
        layers = range(cfg.num_layers) if layers is None else layers
        self.cfg = cfg
        self.locate: Callable[[Tensor, int], Documents] = locate_documents
        self.sequence_parts = 1
        self.rope_theta = cfg.rope_theta
        self.embed: nn.Module | None = nn.Embedding(cfg.vocab_size, cfg.hidden_size) if 0 in layers else None
        self.blocks = nn.ModuleDict({str(layer): Block(cfg, router, layer) for layer in layers})
        is_last = cfg.num_layers - 1 in layers
        self.norm: nn.Module | None = RMSNorm(cfg.hidden_size, cfg.norm_eps) if is_last else None
        self.head: nn.Module | None = Head(cfg) if is_last else None

    def forward(
        self, x: Tensor, offsets: Tensor, *, targets: Tensor | None = None, number: Tensor | None = None,
        lengths: Tensor | None = None, loss_weight: float | Tensor = 0.0,
    ) -> Tensor:  # fmt: skip
        """Logits, or each token's loss where targets are given; a stage without head returns hidden states.

        Args:
            x: [rows, tokens/cp] int64 token ids, or [rows, tokens/(cp tp), hidden] from the stage before.
            offsets: [rows, max_documents + 1] int32, starts of the row's documents padded with its length; on
                the host where it can be, as attention then knows how long they are.
            targets: [rows, tokens/cp] int64, negative = none.
            number: [rows] int64 on the host, the same in each: counts the run's micro-batches; None = 0.
            lengths: [rows]: tokens of each row before its padding, which is the last document; None = all.
            loss_weight: factor of each layer's balancing losses, before their coefficients, in the loss
                that will be differentiated; also as [rows] on the host, the same in each.

        Returns:
            [rows, tokens/cp, vocab] fp32 logits, [rows, tokens/cp] fp32 losses, 0 where there is no target,
            or [rows, tokens/(cp tp), hidden].
        """
        on_host = offsets.tolist() if offsets.device.type == "cpu" else None
        offsets = offsets.to(x.device, non_blocking=True)
        documents = self.locate(offsets, x.shape[1] * (1 if self.embed is not None else self.sequence_parts))
        documents = documents._replace(on_host=on_host)
        rotary = rotary_table(documents.positions, self.cfg.rotary_dim, self.rope_theta)
        weight = loss_weight if isinstance(loss_weight, float) else float(loss_weight[0])
        micro = Micro(offsets, 0 if number is None else int(number[0]), weight, lengths)
        if self.embed is not None:
            x = self.embed(x)
        for block in self.blocks.values():
            x = block(x, documents, rotary, micro)
        if self.norm is None or self.head is None:
            return x
        return self.head(self.norm(x), targets)

    def reset_buffers(self) -> None:
        """Fill all buffers: they hold nothing after a move from the meta device."""
        for module in self.modules():
            if isinstance(module, LightningCore | Router):
                module.reset_buffers()

    def routers(self) -> list[Router]:
        """The routers of this model's layers, in order."""
        return [module for module in self.modules() if isinstance(module, Router)]
