"""The cases of `bench.py kernels`: what each must do at least, our call, and the calls of peers.

The only file that imports peers, and only when a case with peers is built.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from kernels.adamw import Hyperparameters, Moving, adamw, square_sum
from kernels.cross_entropy import linear_cross_entropy
from kernels.documents import Documents, locate_documents
from kernels.expert_ffn import Backend as ExpertBackend
from kernels.expert_ffn import expert_ffn, expert_ffn_by, has_quack
from kernels.gated_norm import gated_rms_norm
from kernels.lightning_attention import lightning_attention
from kernels.permute import permute, sort_choices, unpermute
from kernels.reference import apply_rotary, rotary_table
from kernels.reference import gated_rms_norm as plain_gated_rms_norm
from kernels.reference import swiglu as plain_swiglu
from kernels.reference import unpermute as unpermute_by_index
from kernels.rms_norm import Carried, carry_rms_norm, rms_norm
from kernels.rotary import rotate_
from kernels.router import route
from kernels.softmax_attention import Backend, backend_for, softmax_attention, softmax_attention_flash
from kernels.swiglu import swiglu
from model.config import RouterConfig
from model.router import Micro, Router
from scripts.benchmarks.kernels import OURS, Case, Op, Work, captured
from scripts.benchmarks.moe import one_layer

Ops = dict[str, Op]
DOCUMENTS = (16384, 8192, 4096, 2048, 1024, 512, 256, 128, 128)
"""Parts of a row of 32k."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """MiniMax-01's, but for the experts, which are those of a small model."""

    tokens: int = 32768
    short: int = 8192
    """Tokens of the short cases."""
    hidden: int = 6144
    heads: int = 64
    kv_heads: int = 8
    head_dim: int = 128
    rotary_dim: int = 64
    experts: int = 32
    moe_hidden: int = 2048
    moe_ffn: int = 1408
    ffn: int = 9216
    vocab: int = 200064
    parameters: int = 10**9
    """Of the optimizer's case."""


class _Draw:
    """Random tensors on one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.generator = torch.Generator(device).manual_seed(0)

    def leaf(self, *shape: int, scale: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """Normal numbers, of which gradients are wanted."""
        x = torch.randn(shape, generator=self.generator, device=self.device, dtype=torch.float32)
        return (x * scale).to(dtype).requires_grad_()


def documents_of(lengths: Sequence[int], device: torch.device) -> Documents:
    """One row."""
    starts = [sum(lengths[:number]) for number in range(len(lengths) + 1)]
    offsets = torch.tensor([starts], dtype=torch.int32, device=device)
    return locate_documents(offsets, starts[-1])._replace(on_host=[starts])


def all_cases(device: torch.device, sizes: Sizes | None = None) -> list[Case]:
    """In the order of the table."""
    s = Sizes() if sizes is None else sizes
    draw = _Draw(device)
    return [*_attention(s, draw), *_experts(s, draw), _cross_entropy(s, draw), *_elementwise(s, draw)]


def _packed(s: Sizes) -> list[int]:
    return [length * s.tokens // sum(DOCUMENTS) for length in DOCUMENTS]


def _attention(s: Sizes, draw: _Draw) -> list[Case]:
    whole, packed = [s.tokens], _packed(s)
    cases = [
        _lightning(s, draw, [s.short], s.heads),
        _lightning(s, draw, whole, s.heads),
        _lightning(s, draw, packed, s.heads),
        few := _lightning(s, draw, whole, s.kv_heads),
        *_in_a_graph(few, draw),
    ]
    flops = sum(2 * s.head_dim * s.heads * length**2 for length in packed)

    def softmax(with_peers: bool) -> Ops:
        documents = documents_of(packed, draw.device)
        heads = (s.heads, s.kv_heads, s.kv_heads)
        q, k, v = inputs = [draw.leaf(1, s.tokens, n, s.head_dim) for n in heads]
        ops = {OURS: Op(lambda: softmax_attention(q, k, v, documents), inputs)}
        for backend in (Backend.cudnn, Backend.flash2) if with_peers else ():
            if backend is not backend_for(q, documents):
                ops[backend] = Op(partial(softmax_attention_flash, q, k, v, documents, backend), inputs)
        return ops

    name = f"softmax {_k(s.tokens)} in {len(packed)} docs, {s.heads}/{s.kv_heads} heads"
    return [*cases, Case("softmax", name, Work(flops, 0), Work(2.5 * flops, 0), softmax)]


def _in_a_graph(case: Case, draw: _Draw) -> list[Case]:
    """The forward pass from a CUDA graph: without what the host needs to launch it kernel by kernel."""

    def build(with_peers: bool) -> Ops:
        return {name: Op(captured(op.forward)) for name, op in case.build(with_peers).items()}

    is_gpu = draw.device.type == "cuda"
    return [case._replace(name=f"{case.name}, graph", backward=None, build=build)] if is_gpu else []


def _lightning(s: Sizes, draw: _Draw, lengths: list[int], heads: int) -> Case:
    tokens, d, chunk = sum(lengths), s.head_dim, 64

    def build(with_peers: bool) -> Ops:
        documents = documents_of(lengths, draw.device)
        slopes = 2.0 ** (-8 * torch.arange(1, heads + 1, device=draw.device) / heads)
        q, k, v = inputs = [draw.leaf(1, tokens, heads, d) for _ in range(3)]
        ops = {OURS: Op(lambda: lightning_attention(q, k, v, slopes, documents), inputs)}
        if with_peers:
            from fla.ops.simple_gla import chunk_simple_gla

            ends = documents.offsets[0].long() if len(lengths) > 1 else None
            named = {"g_gamma": -slopes, "scale": 1.0, "cu_seqlens": ends}
            ops["fla"] = Op(lambda: chunk_simple_gla(q, k, v, **named)[0], inputs)
        return ops

    suffix = f" in {len(lengths)} docs" if len(lengths) > 1 else ""
    rows = tokens * heads * d  # each token of a head, times its width
    return Case(
        "lightning", f"lightning {heads} x {d}, {_k(tokens)}{suffix}",
        Work(rows * (4 * d + 4 * chunk), rows * 8), Work(rows * (10 * d + 10 * chunk), rows * 14), build,
    )  # fmt: skip


def _experts(s: Sizes, draw: _Draw) -> list[Case]:
    top_k, h, f = 2, s.moe_hidden, s.moe_ffn
    choices = s.tokens * top_k
    flops = choices * 6 * h * f

    def choose() -> Tensor:
        scores = torch.rand(s.tokens, s.experts, generator=draw.generator, device=draw.device)
        return scores.topk(top_k).indices

    def block(with_peers: bool) -> Ops:
        experts = choose()
        sorting = sort_choices(experts.flatten(), s.experts)
        x, weights = draw.leaf(s.tokens, h), draw.leaf(s.tokens, top_k, dtype=torch.float32)
        gate_up, down = draw.leaf(s.experts, 2, f, h, scale=0.02), draw.leaf(s.experts, h, f, scale=0.02)

        def by(compute: Callable[..., Tensor]) -> Tensor:
            rows, scale = permute(x, sorting), permute(weights.reshape(-1, 1), sorting).flatten()
            return unpermute(compute(rows, gate_up, down, scale, sorting.ends), sorting, s.tokens)

        def eager() -> Tensor:
            rows = x[sorting.order // top_k]
            inner = F.grouped_mm(rows, gate_up.flatten(1, 2).mT, offs=sorting.ends).unflatten(-1, (2, -1))
            rows = plain_swiglu(inner, weights.flatten()[sorting.order])
            rows = F.grouped_mm(rows, down.mT, offs=sorting.ends)[sorting.inverse]
            return rows.unflatten(0, (-1, top_k)).sum(1)

        inputs = [x, weights, gate_up, down]
        ops = {OURS: Op(lambda: by(expert_ffn), inputs)}
        if with_peers:
            from liger_kernel.ops import LigerFusedMoEFunction as Fused

            index = experts.int()
            if has_quack():
                ops["torch"] = Op(lambda: by(partial(expert_ffn_by, ExpertBackend.torch)), inputs)
            ops["eager"] = Op(eager, inputs)
            ops["liger"] = Op(lambda: Fused.apply(x, gate_up.flatten(1, 2), down, index, weights), inputs)
        return ops

    def back(with_peers: bool) -> Ops:
        sorting = sort_choices(choose().flatten(), s.experts)
        y = draw.leaf(choices, s.hidden)
        ops = {OURS: Op(lambda: unpermute(y, sorting, s.tokens), [y])}
        if with_peers:
            ops["eager"] = Op(lambda: unpermute_by_index(y, sorting.inverse, s.tokens), [y])
        return ops

    moved = Work(0, 3 * s.tokens * s.hidden * 2)
    name = f"MoE {s.experts} x {h} x {f}, top-2, {_k(s.tokens)}"
    return [
        Case("moe", name, Work(flops, 0), Work(2 * flops, 0), block),
        *_router(s, draw),
        Case("permute", f"un-permute {_k(s.tokens)} x {s.hidden}, top-2", moved, moved, back),
    ]


def _router(s: Sizes, draw: _Draw) -> list[Case]:
    """From logits to experts, weights, admitted choices and what is recorded."""
    factor = 1.25

    def build(with_peers: bool) -> Ops:
        logits = draw.leaf(s.tokens, s.experts, dtype=torch.float32)
        with torch.device(draw.device):
            cfg = one_layer(s.experts, 2, hidden=s.moe_hidden, ffn=s.moe_ffn)
            router = Router(cfg, RouterConfig(capacity_factor=factor), 0)
        router.reset_buffers()
        micro = Micro(documents_of([s.tokens], draw.device).offsets, 0, 1.0)

        def ours() -> Tensor:
            decision = router._decide(logits.detach(), logits[None], micro)
            balance = router._balance(decision, micro)
            return route(logits, decision.experts, replicas=decision.replicas, balance=balance)

        def eager() -> Tensor:
            weights, experts = logits.softmax(-1).topk(2)
            before = F.one_hot(experts.flatten(), s.experts).cumsum(0) - 1
            place = before.gather(1, experts.reshape(-1, 1)).view_as(experts)
            kept = place < factor * 2 * s.tokens / s.experts
            return weights / weights.sum(-1, keepdim=True) * kept

        ops = {OURS: Op(ours, [logits])}
        return {**ops, "eager": Op(eager, [logits])} if with_peers else ops

    read, written = s.tokens * s.experts * 4, s.tokens * 2 * (4 + 8)
    name = f"router {_k(s.tokens)} x {s.experts}, capacity {factor}"
    case = Case("router", name, Work(0, read + written), Work(0, 2 * read + written), build)
    return [case, *_in_a_graph(case, draw)]


def _cross_entropy(s: Sizes, draw: _Draw) -> Case:
    def build(with_peers: bool) -> Ops:
        x, weight = draw.leaf(s.short, s.hidden), draw.leaf(s.vocab, s.hidden, scale=0.02)
        targets = torch.randint(s.vocab, (s.short,), generator=draw.generator, device=draw.device)
        ops = {OURS: Op(lambda: linear_cross_entropy(x, weight, targets).mean(), [x, weight])}
        if with_peers:
            from liger_kernel.ops import LigerFusedLinearCrossEntropyFunction as Fused

            ops["eager"] = Op(lambda: F.cross_entropy((x @ weight.T).float(), targets), [x, weight])
            ops["liger"] = Op(lambda: Fused.apply(x, weight, targets)[0], [x, weight])
        return ops

    name = f"linear CE {_k(s.short)} x {s.hidden} x {s.vocab}"
    flops = 3 * 2 * s.short * s.hidden * s.vocab
    return Case("cross_entropy", name, Work(flops, 0), None, build, is_joint=True)


def _elementwise(s: Sizes, draw: _Draw) -> list[Case]:
    optimizer = [_adamw(s, draw, with_norm=with_norm) for with_norm in (False, True)]
    return [*_norms(s, draw), *_activations(s, draw), _rotary(s, draw), *optimizer]


def _moving(name: str, size: int, forward: int, backward: int, build: Callable[[bool], Ops]) -> Case:
    """A case that reads and writes so many bf16 tensors of `size` entries."""
    return Case("elementwise", name, Work(0, 2 * forward * size), Work(0, 2 * backward * size), build)


def _norms(s: Sizes, draw: _Draw) -> list[Case]:
    width, hidden, tokens = s.heads * s.head_dim, s.hidden, _k(s.tokens)

    def norm(with_peers: bool) -> Ops:
        x, weight = draw.leaf(s.tokens, hidden), draw.leaf(hidden)
        ops = {OURS: Op(lambda: rms_norm(x, weight, 1e-5), [x, weight])}
        if with_peers:
            from fla.modules.norm.layernorm import rms_norm as fla_norm
            from liger_kernel.ops import LigerRMSNormFunction as Norm

            ops["eager"] = Op(lambda: F.rms_norm(x, (hidden,), weight, 1e-5), [x, weight])
            ops["fla"] = Op(lambda: fla_norm(x, weight, None), [x, weight])
            ops["liger"] = Op(lambda: Norm.apply(x, weight, 1e-5, 0.0, "llama", False), [x, weight])
        return ops

    def add_norm(with_peers: bool) -> Ops:
        x, r, weight = inputs = [draw.leaf(s.tokens, hidden), draw.leaf(s.tokens, hidden), draw.leaf(hidden)]
        alpha = 3.5565588200778455

        def ours() -> tuple[Tensor, Tensor]:
            h, carried = carry_rms_norm(x, weight, 1e-5, alpha, Carried(r, alpha))
            return h, carried.tensor

        ops = {OURS: Op(ours, inputs)}
        if with_peers:
            from liger_kernel.ops import LigerFusedAddRMSNormFunction as Fused

            ops["liger"] = Op(lambda: Fused.apply(x, r, weight, 1e-5, 0.0, "llama", False), inputs)
        return ops

    def gated(with_peers: bool) -> Ops:
        o, gate, weight = inputs = [draw.leaf(s.tokens, width), draw.leaf(s.tokens, width), draw.leaf(width)]
        ops = {OURS: Op(lambda: gated_rms_norm(o, gate, weight, 1e-6), inputs)}
        if with_peers:
            from fla.modules.norm.fused_norm_gate import rms_norm_gated

            ops["eager"] = Op(lambda: plain_gated_rms_norm(o, gate, weight, 1e-6), inputs)
            ops["fla"] = Op(lambda: rms_norm_gated(o, gate, weight, None, activation="sigmoid"), inputs)
        return ops

    size = s.tokens * hidden
    return [
        _moving(f"RMSNorm {tokens} x {hidden}", size, 2, 3, norm),
        _moving(f"add + RMSNorm {tokens} x {hidden}", size, 3, 4, add_norm),
        _moving(f"gated norm {tokens} x {width}", s.tokens * width, 3, 5, gated),
    ]


def _activations(s: Sizes, draw: _Draw) -> list[Case]:
    rows, width = 2 * s.tokens, 3 * s.heads * s.head_dim

    def gate_up(with_peers: bool) -> Ops:
        x, scale = draw.leaf(rows, 2, s.ffn), draw.leaf(rows, dtype=torch.float32)
        ops = {OURS: Op(lambda: swiglu(x, scale), [x, scale])}
        if with_peers:
            from liger_kernel.ops import LigerFusedGateUpSiLUMulFunction as Fused

            ops["eager"] = Op(lambda: plain_swiglu(x, scale), [x, scale])
            ops["liger"] = Op(lambda: Fused.apply(x.flatten(1)), [x])  # without the router's weights
        return ops

    def silu(with_peers: bool) -> Ops:
        x = draw.leaf(s.tokens, width)
        return {OURS: Op(lambda: F.silu(x), [x])}

    return [
        _moving(f"SwiGLU {_k(rows)} x 2 x {s.ffn}", rows * s.ffn, 3, 5, gate_up),
        _moving(f"SiLU(qkv) {_k(s.tokens)} x {width}", s.tokens * width, 2, 3, silu),
    ]


def _rotary(s: Sizes, draw: _Draw) -> Case:
    def build(with_peers: bool) -> Ops:
        table = rotary_table(documents_of([s.tokens], draw.device).positions, s.rotary_dim, 1e4)
        # They are turned in place: no leaves, and gradients are wanted of what they were before.
        q, k = (draw.leaf(1, s.tokens, n * s.head_dim) * 1.0 for n in (s.heads, s.kv_heads))
        before = [get_gradient_edge(x) for x in (q, k)]
        ops = {OURS: Op(lambda: rotate_(q, k, table, head_dim=s.head_dim), before)}
        if with_peers:
            from liger_kernel.ops import LigerRopeFunction as Turn

            heads = [draw.leaf(1, s.tokens, n, s.head_dim) for n in (s.heads, s.kv_heads)]
            cos, sin = (torch.cat([x[:, :, 0], x[:, :, 0]], -1).bfloat16() for x in table)
            ops["eager"] = Op(lambda: [apply_rotary(x, table) for x in heads], heads)
            ops["liger"] = Op(lambda: Turn.apply(*(x.transpose(1, 2) for x in heads), cos, sin), heads)
        return ops

    moved = Work(0, s.tokens * (s.heads + s.kv_heads) * s.rotary_dim * 4)
    name = f"RoPE {_k(s.tokens)}, {s.heads}/{s.kv_heads} heads, {s.rotary_dim}/{s.head_dim}"
    return Case("elementwise", name, moved, moved, build)


def _adamw(s: Sizes, draw: _Draw, *, with_norm: bool) -> Case:
    def build(with_peers: bool) -> Ops:
        tensors = [torch.empty(s.parameters, device=draw.device) for _ in range(4)]
        for tensor in tensors:
            tensor.normal_(generator=draw.generator)
        master, grad, average, square = tensors
        square.square_()
        hyper = Hyperparameters(1e-6, 0.9, 0.95, 1e-8, 0.1, 1000)
        one = torch.ones((), device=draw.device)

        def ours() -> None:
            clip = (1e9 / square_sum([grad], [1]).sqrt()).clamp(max=1).float() if with_norm else one
            adamw([Moving(master, grad, average, square)], clip, hyper)

        ops = {OURS: Op(ours)}
        if with_peers:
            weight = torch.nn.Parameter(master)
            weight.grad = grad
            optimizer = torch.optim.AdamW([weight], lr=hyper.lr, betas=(0.9, 0.95), fused=True)

            def fused() -> None:
                if with_norm:
                    torch.nn.utils.clip_grad_norm_([weight], 1e9)
                optimizer.step()

            ops["torch fused"] = Op(fused)
        return ops

    name = f"AdamW{' + norm' if with_norm else ''}, {s.parameters / 1e9:.0f}e9 fp32"
    return Case("elementwise", name, Work(0, (32 if with_norm else 28) * s.parameters), None, build)


def _k(count: int) -> str:
    return f"{count // 1024}k" if count % 1024 == 0 else f"{count}"
