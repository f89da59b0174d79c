"""Times of one rank's MoE layer beside what its matrix products cost alone; CUDA events, after warm-up."""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

from model.capacity import LocalPool, decide_replicas, line_up
from model.config import RouterConfig
from model.moe import MoE
from model.router import Micro
from scripts.benchmarks.moe import one_layer

FLOOR_TFLOPS = 790
"""Dense bf16 rate of an H100 or H200 under load, of which the floor is computed."""
WARM_UP = 5
TIME_COLUMNS = (
    "capacity\nfactor", "skew", "admitted\nchoices", "layer ms\n(lowest to highest)", "decision\nus",
    "floor\nms", "dense\nms", "layer /\ndense",
)  # fmt: skip

Clock = Callable[[Callable[[], object], int], list[float]]
"""(call, repeats) -> milliseconds of each."""


@dataclass(frozen=True, kw_only=True)
class LayerSettings:
    """Sizes of the timed layer."""

    experts: int
    """Of the layer, all on this rank."""
    top_k: int
    """Choices of a token."""
    tokens: int
    """Of one row."""
    hidden: int
    """Width of the residual stream; the first entries carry the logits."""
    ffn: int
    """Inner width of an expert."""
    repeats: int
    """Timed runs."""

    def __post_init__(self) -> None:
        """Check each value, then what must fit together."""
        sizes = {"layer-tokens": self.tokens, "layer-hidden": self.hidden, "layer-ffn": self.ffn}
        for key, value in (sizes | {"repeats": self.repeats}).items():
            if value < 1:
                raise ValueError(f"--{key}={value} must be at least 1")
        if self.hidden < self.experts:
            raise ValueError(f"--layer-hidden={self.hidden} must be >= --experts={self.experts}")


class Time(NamedTuple):
    """A line of the table."""

    capacity_factor: float | None
    skew: float
    admitted: int
    """Choices that the experts compute."""
    layer_ms: list[float]
    """Forward and backward."""
    decision_ms: list[float]
    """line_up and decide_replicas alone; empty without a capacity."""
    floor_ms: float
    """Matrix products of the admitted choices at FLOOR_TFLOPS."""
    dense_ms: list[float]
    """As many FLOPs by torch.matmul, as if all choices had one expert."""

    def line(self) -> list[str]:
        """As printed."""
        layer, dense = median(self.layer_ms), median(self.dense_ms)
        return [
            "null" if self.capacity_factor is None else f"{self.capacity_factor:g}",
            f"{self.skew:g}",
            f"{self.admitted}",
            f"{layer:.3f} ({min(self.layer_ms):.3f} to {max(self.layer_ms):.3f})",
            f"{1000 * median(self.decision_ms):.0f}" if self.decision_ms else "-",
            f"{self.floor_ms:.3f}",
            f"{dense:.3f}",
            f"{layer / dense:.2f}",
        ]


def cuda_ms(call: Callable[[], object], repeats: int) -> list[float]:
    """Time a call that leaves its work on the current CUDA device."""
    for _ in range(WARM_UP):
        call()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, end in events:
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]


def build_layer(settings: LayerSettings, factor: float | None, device: torch.device) -> MoE:
    """A layer in bf16 with an fp32 gate whose logits are the first entries of its input."""
    s = settings
    cfg = one_layer(s.experts, s.top_k, hidden=s.hidden, ffn=s.ffn)
    with torch.device(device):
        moe = MoE(cfg, RouterConfig(capacity_factor=factor), 0)
    moe.experts.to(torch.bfloat16)
    for parameter in moe.experts.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    torch.nn.init.eye_(moe.router.gate.weight)
    return moe


def draw_input(settings: LayerSettings, skew: float, device: torch.device) -> Tensor:
    """[1, tokens, hidden] bf16; its first entries let the gate choose as under force=skewed:SKEW."""
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(1, settings.tokens, settings.hidden, generator=generator, device=device)
    uniform = torch.rand(settings.tokens, settings.experts, generator=generator, device=device)
    noise = -torch.log(-torch.log(uniform.clamp(1e-7, 1 - 1e-7)))  # Gumbel
    rank = torch.arange(1, settings.experts + 1, device=device)
    x[0, :, : settings.experts] = noise - skew * torch.log(rank)
    return x.bfloat16()


def time_layer(
    settings: LayerSettings, factor: float | None, skew: float, device: torch.device, clock: Clock
) -> Time:
    """Time the layer, its decision, and a dense product of equal FLOPs."""
    s = settings
    moe = build_layer(s, factor, device)
    x = draw_input(s, skew, device).requires_grad_()
    grad = torch.randn_like(x)
    micro = Micro(torch.tensor([[0, s.tokens]], device=device), 0, 1.0)

    def layer() -> None:
        x.grad = None
        moe.zero_grad(set_to_none=True)
        moe(x, micro).backward(grad)

    moe.router.reset_buffers()
    layer()
    admitted = int((moe.router.load - moe.router.dropped).sum())
    flops = 3 * admitted * 2 * 3 * s.hidden * s.ffn  # backward is two products for each of the forward's
    return Time(
        capacity_factor=factor, skew=skew, admitted=admitted, layer_ms=clock(layer, s.repeats),
        decision_ms=[] if factor is None else clock(_decision(s, factor, moe, x.detach()), s.repeats),
        floor_ms=flops / FLOOR_TFLOPS / 1e9, dense_ms=clock(_dense(s, admitted, device), s.repeats),
    )  # fmt: skip


def _decision(settings: LayerSettings, factor: float, moe: MoE, x: Tensor) -> Callable[[], object]:
    """The router's decision as it stands between top-k and dispatch."""
    s, pool = settings, LocalPool()
    offsets = torch.tensor([[0, s.tokens]], device=x.device)
    places = pool.places(x)
    with torch.no_grad():
        experts = moe.router.gate(x[0].float()).topk(s.top_k, dim=-1).indices

    def decide() -> None:
        cells, keys = line_up(places, offsets, 0)
        decide_replicas(experts, cells, keys, pool, num_experts=s.experts, factor=factor)

    return decide


def _dense(settings: LayerSettings, rows: int, device: torch.device) -> Callable[[], object]:
    """Both products of one expert that takes all rows, forward and backward."""
    s = settings
    shapes = ((rows, s.hidden), (s.hidden, 2 * s.ffn), (rows, s.ffn), (s.ffn, s.hidden))
    x, gate_up, y, down = (
        (0.02 * torch.randn(shape, device=device)).bfloat16().requires_grad_() for shape in shapes
    )
    grads = [torch.randn(rows, width, device=device).bfloat16() for width in (2 * s.ffn, s.hidden)]

    def multiply() -> None:
        for leaf in (x, gate_up, y, down):
            leaf.grad = None
        torch.autograd.backward([torch.matmul(x, gate_up), torch.matmul(y, down)], grads)

    return multiply
