"""SwiGLU experts on rows sorted by expert: quack-kernels' fused GEMMs where they are installed, else torch's.

quack's epilogues compute SwiGLU and its gradient from accumulators in registers. What backward needs again is
kept with gate and up in turns, [choices, ffn, 2], which is how they meet in one epilogue.
"""

import importlib
import logging
from collections.abc import Callable
from enum import StrEnum
from functools import cache, partial
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from kernels.grouped_gemm import grouped_gemm
from kernels.optional import announce, compare_with_twin, is_usable
from kernels.swiglu import swiglu

log = logging.getLogger(__name__)

QUACK = "0.6.5"
"""The version of quack-kernels whose functions are called here."""


class Backend(StrEnum):
    """Who multiplies."""

    quack = "quack"
    """GEMMs with SwiGLU in their epilogues; bf16 and fp16 on Hopper."""
    torch = "torch"
    """Grouped GEMMs, and SwiGLU by a kernel between them."""


class Tile(NamedTuple):
    """How quack cuts a GEMM."""

    rows: int
    columns: int
    is_pingpong: bool
    """Two groups of warps work on a tile each, one computes while the other stores."""
    cluster: tuple[int, int]
    """Multiprocessors that share what they load, along rows and columns."""


# The fastest of eight tiles times three clusters on an H100 (docs/design/decisions.md).
GATE_UP = Tile(128, 192, True, (2, 1))
DOWN = Tile(192, 128, True, (1, 2))
D_GATE_UP = Tile(128, 128, True, (2, 1))
D_X = Tile(128, 256, False, (1, 2))
D_GATE_UP_WEIGHT = Tile(192, 128, True, (1, 2))
D_DOWN_WEIGHT = Tile(256, 128, False, (2, 1))


MasterGrad = Callable[[], tuple[Tensor, bool]]
"""Returns the fp32 gradient of a weight's master to write into, and whether to add to what it holds."""
MasterGrads = tuple[MasterGrad, MasterGrad] | None
"""Of gate_up and down: where backward may put what it would otherwise return."""


def expert_ffn(
    x: Tensor, gate_up: Tensor, down: Tensor, scale: Tensor, ends: Tensor, master_grads: MasterGrads = None
) -> Tensor:
    """down(SiLU(gate x) * up x * scale) by each row's expert; expert e owns the rows up to ends[e].

    Args:
        x: [choices, hidden], sorted by expert.
        gate_up: [experts, 2, ffn, hidden], gate first.
        down: [experts, hidden, ffn].
        scale: [choices] fp32, the router's weight of each row.
        ends: [experts] int32, cumulative.
        master_grads: only with a backward pass that runs once and as a whole.

    Returns:
        [choices, hidden].
    """
    return expert_ffn_by(backend_for(x, gate_up), x, gate_up, down, scale, ends, master_grads)


def expert_ffn_by(
    backend: Backend, x: Tensor, gate_up: Tensor, down: Tensor, scale: Tensor, ends: Tensor,
    master_grads: MasterGrads = None,
) -> Tensor:  # fmt: skip
    """`expert_ffn` by one of the backends."""
    if backend is Backend.quack and x.numel():
        return _FusedExperts.apply(x, gate_up, down, scale, ends, master_grads)
    inner = grouped_gemm(x, gate_up.flatten(1, 2), ends)
    return grouped_gemm(swiglu(inner.unflatten(-1, (2, -1)), scale), down, ends)


def choose_backend(
    dtype: torch.dtype,
    hidden: int,
    ffn: int,
    *,
    capability: tuple[int, int] | None,
    has_quack: Callable[[], bool],
) -> tuple[Backend, str]:
    """The fastest backend, and why.

    Args:
        capability: of the GPU; None = the tensors are elsewhere.
        has_quack: asked only where nothing else speaks against quack, as it compiles GEMMs.
    """
    if capability is None:
        return Backend.torch, "tensors are not on a GPU"
    if capability[0] != 9:
        return Backend.torch, f"the tiles for quack are those of compute capability 9, this is {capability}"
    if dtype not in (torch.bfloat16, torch.float16):
        return Backend.torch, f"quack takes bf16 and fp16, not {dtype}"
    if hidden % 8 or ffn % 8:
        sizes = f"hidden_size {hidden} and expert_ffn_size {ffn}"
        return Backend.torch, f"quack needs multiples of 8, not {sizes}"
    if not has_quack():
        return Backend.torch, "no quack-kernels that works"
    return Backend.quack, "quack-kernels is installed"


def backend_for(x: Tensor, gate_up: Tensor) -> Backend:
    """What `expert_ffn` takes for these."""
    capability = torch.cuda.get_device_capability(x.device) if x.is_cuda else None
    sizes = x.shape[1], gate_up.shape[2]
    backend, reason = choose_backend(x.dtype, *sizes, capability=capability, has_quack=has_quack)
    announce(log, logging.INFO, f"experts by {backend}: {reason}")
    return backend


@cache
def has_quack() -> bool:
    """Whether quack-kernels is installed and computes what torch does; this compiles its GEMMs."""
    return is_usable("quack-kernels", _try_quack, tested=QUACK)


def _try_quack(device: str = "cuda") -> None:
    """Compare a small case with torch's grouped GEMMs."""
    random = partial(torch.randn, device=device, generator=torch.Generator(device).manual_seed(0))
    sizes = ((64, 64), (2, 2, 64, 64), (2, 64, 64))
    inputs = [random(size).mul(0.125).bfloat16() for size in sizes] + [random(64)]
    ends = torch.tensor([24, 64], dtype=torch.int32, device=device)
    fast, twin = (partial(expert_ffn_by, backend, ends=ends) for backend in Backend)
    compare_with_twin(fast, twin, inputs)


def _quack() -> ModuleType:
    return importlib.import_module("quack.gemm_interface")


class _FusedExperts(torch.autograd.Function):
    """forward: two GEMMs, the first with SwiGLU; backward: four, the first with SwiGLU's gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gate_up: Tensor, down: Tensor, scale: Tensor, ends: Tensor,
        master_grads: MasterGrads,
    ) -> Tensor:  # fmt: skip
        x, scale, starts = x.contiguous(), scale.contiguous(), pad(ends, (1, 0))
        scale = scale.clone() if scale.data_ptr() % 16 else scale  # part of a longer one, perhaps
        ffn = gate_up.shape[2]
        both, inner = x.new_empty(len(x), 2 * ffn), x.new_empty(len(x), ffn)
        _swiglu_gemm()(
            x, gate_up.flatten(1, 2).mT, out={"D": both, "inner": inner}, scale=scale, tuned=False,
            config=_config(GATE_UP), cu_seqlens_m=starts, concat_layout=("B",),
        )  # fmt: skip
        ctx.save_for_backward(x, gate_up, down, scale, starts, both)
        ctx.master_grads = master_grads or (None, None)
        return _gemm(DOWN, inner, down.mT, torch.empty_like(x), cu_seqlens_m=starts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, gate_up, down, scale, starts, both = ctx.saved_tensors
        grad, weight = grads[0].contiguous(), gate_up.flatten(1, 2)
        d_both, inner, d_scale = _quack().gemm_dgated(
            grad, down, both, activation="swiglu", colvec_scale=scale, colvec_reduce=True,
            cu_seqlens_m=starts, dynamic_scheduler=False, tuned=False, config=_config(D_GATE_UP),
        )  # fmt: skip
        d_x = _gemm(D_X, d_both, weight, torch.empty_like(x), cu_seqlens_m=starts, concat_layout=("B",))
        first, second = ctx.master_grads
        d_gate_up = _weight_gradient(
            D_GATE_UP_WEIGHT, d_both.mT, x, gate_up, first, cu_seqlens_k=starts, concat_layout=("out",)
        )
        d_down = _weight_gradient(D_DOWN_WEIGHT, grad.mT, inner, down, second, cu_seqlens_k=starts)
        return d_x, d_gate_up, d_down, d_scale, None, None


def _weight_gradient(
    tile: Tile, a: Tensor, b: Tensor, weight: Tensor, master_grad: MasterGrad | None, **groups: Any
) -> Tensor | None:
    """a b for each expert, like the weight; None if it went into the master's gradient, unrounded."""
    grad, adds = (torch.empty_like(weight), False) if master_grad is None else master_grad()
    _gemm(tile, a, b, grad.view(len(grad), -1, grad.shape[-1]), add_to_output=adds, **groups)
    return grad if master_grad is None else None


def _gemm(tile: Tile, a: Tensor, b: Tensor, out: Tensor, **groups: Any) -> Tensor:
    """out = a b for each expert, whose part of the rows or of the summed dim `groups` tells."""
    _quack().gemm_tuned.fn(a, b, out, config=_config(tile), **groups)
    return out


@cache  # quack tells pinned configurations apart by their identity
def _config(tile: Tile) -> Any:
    from quack.gemm_config import GemmConfig

    return GemmConfig(
        tile_m=tile.rows, tile_n=tile.columns, pingpong=tile.is_pingpong, cluster_m=tile.cluster[0],
        cluster_n=tile.cluster[1], is_dynamic_persistent=False, device_capacity=9,
    )  # fmt: skip


@cache
def _swiglu_gemm() -> Any:
    """GEMM that gives out the pairs of gate and up as `D` and SwiGLU times each row's scale as `inner`."""
    from quack.activation import swiglu as fused_swiglu
    from quack.epilogue.frontend import gemm_epilogue
    from quack.epilogue.math import pack, unpack
    from quack.epilogue.ops import ColVecLoad

    @gemm_epilogue(outputs=("inner",), ops={"scale": ColVecLoad("scale")}, mode="acc_pair")
    def epilogue(acc: Any, scale: Any) -> dict[str, Any]:
        gate, up = unpack(acc)
        return {"D": pack(gate, up), "inner": fused_swiglu(gate, up) * scale}

    return epilogue
