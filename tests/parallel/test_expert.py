"""Expert parallelism against one process: outputs, gradients, placements, and the collectives it takes."""

import copy
import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from model.config import ModelConfig
from model.moe import MoE
from model.router import Micro
from model.transformer import Transformer
from parallel.collectives import Axis, all_reduce_sum
from parallel.config import ParallelConfig
from parallel.expert import AllToAllDispatcher, apply_expert
from parallel.mesh import Mesh, init_mesh, one_process
from parallel.placement import Placement
from parallel.pool import StagePool
from tests.support.dist import run_distributed

CPU = torch.device("cpu")
HIDDEN = 16
ONE, FEW, NONE = "all choices on one ep rank", "random, no tokens on one rank", "no tokens but on one rank"


def model_config(num_experts: int, ffn: int = 24) -> ModelConfig:
    return ModelConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        num_heads=1,
        num_kv_heads=1,
        head_dim=HIDDEN,
        rotary_dim=4,
        vocab_size=8,
        num_experts=num_experts,
        expert_ffn_size=ffn,
    )


def whole_model(cfg: ModelConfig, case: str, dtype: torch.dtype) -> Transformer:
    generator = torch.Generator().manual_seed(1)
    model = Transformer(cfg)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    if case == ONE:  # experts 0 and 1 get every token: feature 0 is 1 and counts against the others
        model.blocks["0"].moe.router.gate.weight.data[2:, 0] = -50
    gate = model.blocks["0"].moe.router.gate
    model.to(dtype)
    gate.to(torch.promote_types(dtype, torch.float32))
    return model


def draw_tokens(world_size: int, case: str, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """The tokens of each rank, and the gradient of the output at each of them."""
    generator = torch.Generator().manual_seed(2)
    counts = torch.randint(1, 14, (world_size,), generator=generator)
    counts[world_size - 1] = 0
    if case == NONE:
        counts[1:] = 0
    x, grad = torch.randn(2, int(counts.sum()), HIDDEN, generator=generator, dtype=torch.float64).to(dtype)
    x[:, 0] = 1
    return list(x.split(counts.tolist())), list(grad.split(counts.tolist()))


def run_layer(moe: MoE, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Output and gradient of the input; leaves gradients on the parameters."""
    x = x[None].clone().requires_grad_()
    offsets = torch.tensor([[0, x.shape[1]]], dtype=torch.int32)
    y = moe(x, Micro(offsets, 0, 10.0))
    y.backward(grad[None])
    assert y.shape == x.shape
    assert x.grad is not None
    return y[0].detach(), x.grad[0]


def assert_near(actual: Tensor, expected: Tensor, box: slice | tuple[slice, ...], bound: float) -> None:
    """Compare with a box of what is expected, relative to the largest entry of all of it."""
    part = expected[box]
    assert actual.shape == part.shape
    if part.numel():
        error = (actual.double() - part.double()).abs().max() / expected.abs().max()
        assert error <= bound, f"{error:.1e}"


def box_of(placement: Placement, parameter: Tensor) -> tuple[slice, ...]:
    return tuple(slice(a, a + n) for a, n in zip(placement.offset, parameter.shape, strict=True))


def count_collectives() -> list[str]:
    """The names of all collectives from now on, in the order of their calls."""
    calls: list[str] = []

    def watch(name: str, collective: Callable) -> Callable:
        def watched(*args, **kwargs):
            calls.append(name)
            return collective(*args, **kwargs)

        return watched

    for name in ("all_to_all_single", "all_gather_into_tensor", "reduce_scatter_tensor", "all_reduce"):
        setattr(dist, name, watch(name, getattr(dist, name)))
    return calls


def compare(mesh: Mesh, cfg: ModelConfig, case: str, dtype: torch.dtype, calls: list[str]) -> None:
    bound = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    model = whole_model(cfg, case, dtype)
    parts = copy.deepcopy(model)
    placements = apply_expert(parts, mesh)
    whole, part = model.blocks["0"].moe, parts.blocks["0"].moe
    part.router.pool = StagePool(mesh)
    x, grad = draw_tokens(mesh.world_size, case, dtype)
    mine = slice(sum(map(len, x[: mesh.rank])), sum(map(len, x[: mesh.rank + 1])))
    expected = run_layer(whole, torch.cat(x), torch.cat(grad))
    del calls[:]
    actual = run_layer(part, x[mesh.rank], grad[mesh.rank])

    forward = backward = 3  # rows and weights one way, rows the other
    axes = (mesh.ep.size > 1) + (mesh.etp.size > 1)
    assert calls.count("all_to_all_single") == (mesh.ep.size > 1) + axes * (forward + backward)
    assert calls.count("all_gather_into_tensor") == (mesh.etp.size > 1)  # counts, as the 1 above
    assert calls.count("all_reduce") == 1  # the router's pool
    everywhere: list = [None] * mesh.world_size
    dist.all_gather_object(everywhere, list(calls), group=mesh.stage.group)
    assert all(other == calls for other in everywhere)

    for a, b in zip(actual, expected, strict=True):
        assert_near(a, b, mine, bound)
    gate = all_reduce_sum(part.router.gate.weight.grad, mesh.stage)
    assert_near(gate, whole.router.gate.weight.grad, slice(None), bound)
    for name in ("gate_up", "down"):
        weight, full = getattr(part.experts, name), getattr(whole.experts, name)
        placement = placements[f"blocks.0.moe.experts.{name}"]
        box = box_of(placement, weight)
        assert placement.shape == full.shape
        assert torch.equal(weight, full[box])
        summed = all_reduce_sum(weight.grad.to(torch.promote_types(dtype, torch.float32)), mesh.edp)
        assert_near(summed, full.grad, box, bound)
    loads = torch.stack([all_reduce_sum(part.router.load, mesh.stage), whole.router.load])
    assert loads[0].equal(loads[1])
    if case == ONE:
        assert loads[1, 2:].sum() == 0


def compare_all(rank: int, ep: int, etp: int, num_experts: int) -> None:
    mesh = init_mesh(ParallelConfig(ep=ep, etp=etp), "cpu")
    calls = count_collectives()
    for case in (FEW, ONE, NONE):
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            compare(mesh, model_config(num_experts), case, dtype, calls)


@pytest.mark.parametrize(
    ("ep", "etp", "edp", "num_experts"),
    [
        (2, 1, 1, 8),
        (1, 2, 1, 8),
        (2, 2, 1, 8),
        (4, 1, 1, 8),
        (2, 1, 2, 8),
        (1, 3, 1, 8),
        (3, 1, 1, 6),
        (2, 1, 1, 2),
        (2, 2, 2, 8),
    ],
)
def test_layer_against_one_process(ep: int, etp: int, edp: int, num_experts: int) -> None:
    run_distributed(compare_all, ep * etp * edp, ep, etp, num_experts)


def on_grid(ep: int, etp: int, rank: int) -> Mesh:
    """A mesh to cut weights with; it cannot communicate."""
    axes = {
        "ep": Axis("ep", rank // etp, tuple(range(ep))),
        "exchange": Axis("exchange", rank // etp, tuple(range(ep))),
        "etp": Axis("etp", rank % etp, tuple(range(etp))),
    }
    return replace(one_process(CPU), **axes)


def test_boxes_tile_the_experts_on_the_meta_device() -> None:
    seen = {"gate_up": torch.zeros(8, 2, 24, HIDDEN), "down": torch.zeros(8, HIDDEN, 24)}
    for rank in range(6):
        with torch.device("meta"):
            model = Transformer(model_config(8)).to(torch.bfloat16)
        placements = apply_expert(model, on_grid(2, 3, rank))
        names = {name for name, _ in model.named_parameters() if ".experts." in name}
        assert placements.keys() == names == {f"blocks.0.moe.experts.{name}" for name in seen}
        for name, whole in seen.items():
            parameter = model.get_parameter(f"blocks.0.moe.experts.{name}")
            assert (parameter.device.type, parameter.dtype) == ("meta", torch.bfloat16)
            placement = placements[f"blocks.0.moe.experts.{name}"]
            assert placement.shape == whole.shape
            whole[box_of(placement, parameter)] += 1
    assert all((whole == 1).all() for whole in seen.values())


def test_nothing_changes_without_expert_parallelism() -> None:
    model = Transformer(model_config(8))
    before = dict(model.named_parameters())
    dispatcher = model.blocks["0"].moe.dispatcher
    assert apply_expert(model, one_process(CPU)) == {}
    assert model.blocks["0"].moe.dispatcher is dispatcher
    assert not isinstance(dispatcher, AllToAllDispatcher)
    assert all(before[name] is parameter for name, parameter in model.named_parameters())


@pytest.mark.parametrize(
    ("ep", "etp", "message"),
    [
        (4, 1, "parallel.ep=4 must divide model.num_experts=6; use one of [1, 2, 3, 6]"),
        (1, 5, "parallel.etp=5 must divide model.expert_ffn_size=9; use one of [1, 3, 9]"),
    ],
)
def test_degrees_that_do_not_divide(ep: int, etp: int, message: str) -> None:
    model = Transformer(model_config(6, ffn=9))
    with pytest.raises(ValueError, match=rf"\A{re.escape(message)}\Z"):
        apply_expert(model, on_grid(ep, etp, 0))
