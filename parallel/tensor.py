"""Tensor parallelism with sequence parallelism: heads and vocabulary over tp, hidden states by tokens.

Between blocks a rank holds [rows, tokens/(cp tp), hidden]; hooks gather the tokens before each mixer and
reduce-scatter its partial sums after it (Megatron's sequence-parallel region).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.cross_entropy import linear_cross_entropy
from kernels.gated_norm import gated_rms_norm
from kernels.reference import widen
from model.lightning import LightningAttention, LightningCore
from model.transformer import Transformer
from parallel.collectives import Axis, all_gather, all_reduce_both, gather_from_sequence, scatter_to_sequence
from parallel.placement import Placement


def apply_tensor(model: Transformer, tp: Axis) -> dict[str, Placement]:
    """Cut the weights of a model on the meta device in place; which box of which parameter stayed here."""
    placements: dict[str, Placement] = {}
    if tp.size == 1:
        return placements
    cut = _Cutter(model, tp, placements)
    for layer, block in model.blocks.items():
        prefix, mixer = f"blocks.{layer}.mixer", block.get_submodule("mixer")
        if isinstance(mixer, LightningAttention):
            for part in ("qkv.weight", "gate.weight", "norm.weight"):
                cut(f"{prefix}.{part}", dim=0)
            mixer.norm = ShardedGatedRMSNorm(
                mixer.norm.get_parameter("weight"), model.cfg.lightning_norm_eps, tp
            )
            _cut_slopes(mixer.core, tp)
        else:
            cut(f"{prefix}.q.weight", dim=0)
            for part in ("k.weight", "v.weight"):
                cut(f"{prefix}.{part}", dim=0, parts=min(tp.size, model.cfg.num_kv_heads))
        cut(f"{prefix}.out.weight", dim=1)
        mixer.register_forward_pre_hook(_GatherInput(tp))
        mixer.register_forward_hook(_ScatterOutput(tp))
    if model.embed is not None:
        cut("embed.weight", dim=0)
        model.embed = VocabParallelEmbedding(model.embed.get_parameter("weight"), tp)
    if model.head is not None:
        cut("head.weight", dim=0)
        model.head = VocabParallelHead(model.head.get_parameter("weight"), tp)
    model.sequence_parts = tp.size
    return placements


class _Cutter:
    """Replaces a parameter by its local part and notes where that came from."""

    def __init__(self, model: nn.Module, tp: Axis, placements: dict[str, Placement]) -> None:
        self.model, self.tp, self.placements = model, tp, placements

    def __call__(self, name: str, *, dim: int, parts: int | None = None) -> None:
        """Keep 1/parts of dim; with fewer parts than tp ranks, consecutive ranks keep the same one."""
        parts = parts or self.tp.size
        path, _, leaf = name.rpartition(".")
        module = self.model.get_submodule(path)
        whole = getattr(module, leaf)
        share = self.tp.size // parts
        size = whole.shape[dim] // parts
        start = self.tp.rank // share * size
        offset = tuple(start if i == dim else 0 for i in range(whole.dim()))
        setattr(module, leaf, nn.Parameter(whole.detach().narrow(dim, start, size).contiguous()))
        self.placements[name] = Placement(tuple(whole.shape), offset, share)


def _cut_slopes(core: nn.Module, tp: Axis) -> None:
    assert isinstance(core, LightningCore), "tensor parallelism comes before context parallelism"
    heads = len(core.slope_values) // tp.size
    core.slope_values = core.slope_values[tp.rank * heads : (tp.rank + 1) * heads]
    core.slopes = core.slopes[:heads].clone()


class _GatherInput:
    """Pre-hook of a mixer. forward: all-gather of the tokens; backward: reduce-scatter."""

    def __init__(self, tp: Axis) -> None:
        self.tp = tp

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return gather_from_sequence(args[0], self.tp), *args[1:]


class _ScatterOutput:
    """Hook of a mixer. forward: reduce-scatter of the partial sums; backward: all-gather."""

    def __init__(self, tp: Axis) -> None:
        self.tp = tp

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return scatter_to_sequence(output, self.tp)


class ShardedGatedRMSNorm(nn.Module):
    """Gated RMSNorm over heads that lie on several ranks: one all-reduced sum a token each way."""

    def __init__(self, weight: nn.Parameter, eps: float, tp: Axis) -> None:
        super().__init__()
        self.weight, self.eps, self.tp = weight, eps, tp

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        """[..., heads/tp * head_dim] twice -> the same shape."""
        return gated_rms_norm(x, gate, self.weight, self.eps, parts=self.tp.size, merge=self._merge)

    def _merge(self, total: Tensor) -> Tensor:
        return all_reduce_both(total, self.tp)


class VocabParallelEmbedding(nn.Module):
    """Rows of the embedding on several ranks: local look-up, zeros elsewhere, reduce-scatter along tokens."""

    def __init__(self, weight: nn.Parameter, tp: Axis) -> None:
        super().__init__()
        self.weight, self.tp = weight, tp

    def forward(self, tokens: Tensor) -> Tensor:
        """[rows, tokens/cp] ids -> [rows, tokens/(cp tp), hidden]."""
        local = tokens - self.tp.rank * self.weight.shape[0]
        is_here = (local >= 0) & (local < self.weight.shape[0])
        found = F.embedding(torch.where(is_here, local, 0), self.weight)
        return scatter_to_sequence(found * is_here[..., None], self.tp)


class VocabParallelHead(nn.Module):
    """Rows of the head on several ranks; losses merge three floats a token, full logits never exist."""

    def __init__(self, weight: nn.Parameter, tp: Axis) -> None:
        super().__init__()
        self.weight, self.tp = weight, tp

    def forward(self, x: Tensor, targets: Tensor | None) -> Tensor:
        """[rows, tokens/(cp tp), hidden] -> [rows, tokens/cp] losses, or logits without gradient."""
        x = gather_from_sequence(x, self.tp)
        if targets is None:
            return all_gather(widen(F.linear(x, self.weight)), self.tp, dim=2)
        first = self.tp.rank * self.weight.shape[0]
        return linear_cross_entropy(x, self.weight, targets, first=first, merge=self._merge)

    def _merge(self, summary: Tensor) -> Tensor:
        """[3, rows] of the whole vocabulary, from this rank's part of it."""
        peaks, totals, picked = all_gather(summary[None], self.tp).unbind(1)
        peak = peaks.amax(0)
        return torch.stack([peak, (totals * (peaks - peak).exp()).sum(0), picked.sum(0)])
