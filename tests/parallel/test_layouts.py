"""The layout contract: losses, every gradient, updates and checkpoints of any layout against one process."""

import math
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from model.config import ModelConfig
from model.moe import Router
from model.transformer import Transformer
from parallel.apply import build_parts, parallelize
from parallel.collectives import all_reduce_sum
from parallel.config import ParallelConfig, Schedule
from parallel.context import zigzag
from parallel.grad import square_sum
from parallel.mesh import Mesh, init_mesh, one_process
from parallel.pipeline import MicroBatch, Pipeline, SingleStage
from parallel.placement import Shard, collect_gradients, drop_gradients, publish
from tests.dist import run_distributed
from train.checkpoint import load_checkpoint, save_checkpoint
from train.optimizer import OptimizerConfig, build_optimizer, moments

# Sizes that divide by few axes: local parts of FSDP2 are uneven, some empty.
MODEL = ModelConfig(
    num_layers=5,
    hidden_size=24,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    rotary_dim=4,
    vocab_size=60,
    num_experts=6,
    expert_ffn_size=16,
    softmax_every=2,
)
ROWS, TOKENS, MICRO_BATCHES = 4, 48, 4
DOCUMENTS = [
    [0, 5, 6, 40, TOKENS],
    [0, TOKENS, TOKENS, TOKENS, TOKENS],
    [0, 1, 24, 36, TOKENS],
    [0, 30, 31, 32, TOKENS],
]
LAYOUTS = [
    {"dp": 2},
    {"dp": 2, "zero_stage": 2},
    {"dp": 4, "zero_stage": 3},
    {"tp": 2},
    {"tp": 4},
    {"cp": 2},
    {"cp": 3},
    {"ep": 2, "dp": 2},
    {"ep": 3, "cp": 3},
    {"etp": 2, "tp": 2},
    {"ep": 2, "etp": 2, "tp": 4},
    {"tp": 2, "dp": 2, "zero_stage": 3},
    {"tp": 2, "cp": 2, "ep": 2, "zero_stage": 2},
    {"cp": 2, "dp": 2, "etp": 2, "ep": 2},
    {"tp": 2, "cp": 2, "dp": 2, "ep": 2, "etp": 2, "zero_stage": 3},
    {"tp": 2, "cp": 2, "dp": 2, "zero_stage": 2},
    {"pp": 2},
    {"pp": 2, "dp": 2, "zero_stage": 3},
    {"pp": 2, "schedule": "interleaved", "dp": 2, "zero_stage": 2},
    {"pp": 2, "tp": 2},
    {"pp": 2, "schedule": "interleaved_zero_bubble", "tp": 2, "ep": 2},
    {"pp": 2, "schedule": "interleaved_zero_bubble", "cp": 2, "zero_stage": 2},
    {"pp": 2, "schedule": "zbv", "dp": 2, "ep": 2},
    {"pp": 2, "schedule": "dualpipev", "dp": 2},
    {"pp": 2, "cp": 2, "tp": 2, "ep": 2, "etp": 2},
]


def describe(layout: dict[str, Any]) -> str:
    return " ".join(f"{key}{value}" for key, value in layout.items())


def parallel_config(layout: dict[str, Any]) -> ParallelConfig:
    keys = {key: value for key, value in layout.items() if key != "dp"}
    if "schedule" in keys:
        keys["schedule"] = Schedule(keys["schedule"])
    return ParallelConfig(**keys)


def world_size(layout: dict[str, Any]) -> int:
    return math.prod(layout.get(axis, 1) for axis in ("pp", "dp", "cp", "tp"))


def alone() -> Mesh:
    return one_process(torch.device("cpu"))


class Built(NamedTuple):
    parts: list[Transformer]
    engine: SingleStage | Pipeline
    shards: list[Shard]

    @property
    def routers(self) -> list[Router]:
        return [router for part in self.parts for router in part.routers()]


def build(mesh: Mesh, cfg: ParallelConfig, dtype: torch.dtype = torch.float32) -> Built:
    parts = build_parts(MODEL, cfg, mesh, row_tokens=TOKENS)
    shards = parallelize(parts, mesh, cfg, dtype=dtype, seed=7)
    if mesh.pp.size == 1:
        return Built(parts, SingleStage(parts[0], zero_stage=cfg.zero_stage), shards)
    sizes = {"num_micro": MICRO_BATCHES, "micro_rows": ROWS // mesh.dp.size, "row_tokens": TOKENS}
    return Built(parts, Pipeline(parts, mesh, cfg.schedule, dtype=dtype, **sizes), shards)


def micro_batches(mesh: Mesh, seed: int) -> list[MicroBatch]:
    """This rank's share of four micro-batches of four rows."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(MICRO_BATCHES):
        tokens, targets = torch.randint(MODEL.vocab_size, (2, ROWS, TOKENS), generator=generator)
        targets[:, 4] = -100
        offsets = torch.tensor(DOCUMENTS, dtype=torch.int32)
        mine = slice(mesh.dp.rank * ROWS // mesh.dp.size, (mesh.dp.rank + 1) * ROWS // mesh.dp.size)
        batches.append(
            MicroBatch(zigzag(tokens[mine], mesh.cp), zigzag(targets[mine], mesh.cp), offsets[mine])
        )
    return batches


def backward(built: Built, mesh: Mesh, seed: int = 0) -> float:
    """Gradients of one step; its loss."""
    targets = torch.tensor(MICRO_BATCHES * ROWS * (TOKENS - 1))
    loss = built.engine.forward_backward(micro_batches(mesh, seed), targets, 0.1)
    return all_reduce_sum(loss / mesh.tp.size, mesh.world).item()


def box_of(part: Shard) -> tuple[slice, ...]:
    return tuple(slice(a, a + n) for a, n in zip(part.offset, part.master.shape, strict=True))


def compare_with_one_process(rank: int, layout: dict[str, Any]) -> None:
    cfg = parallel_config(layout)
    mesh = init_mesh(cfg, "cpu")
    whole, parts = build(alone(), ParallelConfig()), build(mesh, cfg)
    optimizers = [build_optimizer(built.shards, OptimizerConfig(lr=1e-2)) for built in (whole, parts)]
    full_shards = {shard.name: shard for shard in whole.shards}
    for seed in range(2):
        expected, actual = backward(whole, alone(), seed), backward(parts, mesh, seed)
        assert abs(actual / expected - 1) < 1e-5, (actual, expected)
        collect_gradients(whole.shards, alone().tp)
        collect_gradients(parts.shards, mesh.tp)
        largest = max(shard.master.grad.abs().max() for shard in whole.shards)
        for part in parts.shards:
            full = full_shards[part.name]
            box = box_of(part)
            for kind in ("grad", "master"):
                mine, theirs = part.master, full.master
                if kind == "grad":
                    mine, theirs = part.master.grad, full.master.grad
                if mine.numel():
                    error = (mine - theirs[box]).abs().max() / max(theirs.abs().max(), 1e-3 * largest)
                    assert error < 1e-4, f"{kind} of {part.name}: {error:.1e}"
        squares = all_reduce_sum(square_sum(parts.shards), mesh.world)
        torch.testing.assert_close(squares, square_sum(whole.shards), rtol=1e-5, atol=0)
        for optimizer, built in zip(optimizers, (whole, parts), strict=True):
            optimizer.step()
            publish(built.shards)
            drop_gradients(built.shards)
    layers = [int(layer) for part in parts.parts for layer in part.blocks]
    for layer, router in zip(layers, parts.routers, strict=True):
        assert torch.equal(router.load, whole.routers[layer].load)
        torch.testing.assert_close(router.aux_loss, whole.routers[layer].aux_loss, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        sums = [
            all_reduce_sum(built.engine.loss_sum(micro_batches(place, 5)) / place.tp.size, place.world)
            for built, place in ((whole, alone()), (parts, mesh))
        ]
    torch.testing.assert_close(sums[1], sums[0], rtol=1e-5, atol=0)


@pytest.mark.parametrize("layout", LAYOUTS, ids=describe)
def test_losses_gradients_and_updates(layout: dict[str, Any]) -> None:
    run_distributed(compare_with_one_process, world_size(layout), layout)


def compare_bf16(rank: int, layout: dict[str, Any]) -> None:
    """All forms keep fp32 masters, compute in bf16 and add up gradients in fp32."""
    cfg = parallel_config(layout)
    mesh = init_mesh(cfg, "cpu")
    whole, parts = build(alone(), ParallelConfig(), torch.bfloat16), build(mesh, cfg, torch.bfloat16)
    gates = {shard.name for shard in whole.shards if shard.parameter.dtype == torch.float32}
    assert gates == {f"blocks.{layer}.moe.router.gate.weight" for layer in range(MODEL.num_layers)}
    expected, actual = backward(whole, alone()), backward(parts, mesh)
    assert abs(actual / expected - 1) < 2e-3
    collect_gradients(whole.shards, alone().tp)
    collect_gradients(parts.shards, mesh.tp)
    assert all(shard.master.grad.dtype == torch.float32 for shard in whole.shards + parts.shards)
    squares = all_reduce_sum(square_sum(parts.shards), mesh.world)
    torch.testing.assert_close(squares, square_sum(whole.shards), rtol=5e-2, atol=0)
    optimizer = build_optimizer(whole.shards, OptimizerConfig(lr=1e-5))
    before = [shard.master.clone() for shard in whole.shards]
    optimizer.step()
    publish(whole.shards)
    for old, shard in zip(before, whole.shards, strict=True):
        assert not torch.equal(old, shard.master)  # a step far below bf16's resolution is kept
        assert torch.equal(shard.parameter, shard.master.to(shard.parameter.dtype))


@pytest.mark.parametrize("layout", [{"dp": 2}, {"tp": 2}, {"dp": 2, "ep": 2}], ids=describe)
def test_bf16_with_fp32_masters(layout: dict[str, Any]) -> None:
    run_distributed(compare_bf16, 2, layout)


def save_one_step(rank: int, folder: Path, layout: dict[str, Any]) -> None:
    cfg = parallel_config(layout)
    mesh = init_mesh(cfg, "cpu")
    built = build(mesh, cfg)
    optimizer = build_optimizer(built.shards, OptimizerConfig(lr=1e-2))
    backward(built, mesh)
    collect_gradients(built.shards, mesh.tp)
    optimizer.step()
    facts = {"progress": {"optimizer_steps": 1}}
    save_checkpoint(folder, 1, shards=built.shards, optimizer=optimizer, mesh=mesh, facts=facts, keep=None)


def load_and_compare(rank: int, folder: Path, layout: dict[str, Any]) -> None:
    """What one process reads from the same files is the truth for every rank's part."""
    cfg = parallel_config(layout)
    mesh = init_mesh(cfg, "cpu")
    values = []
    for place, config in ((alone(), ParallelConfig()), (mesh, cfg)):
        built = build(place, config)
        optimizer = build_optimizer(built.shards, OptimizerConfig())
        path = folder / "checkpoints" / "step-1"
        manifest = load_checkpoint(path, shards=built.shards, optimizer=optimizer)
        assert manifest["step"] == 1
        weights = {f"model.{shard.name}": shard.master for shard in built.shards}
        values.append((built, weights | moments(optimizer, built.shards)))
    (whole, full), (parts, mine) = values
    boxes = {shard.name: box_of(shard) for shard in parts.shards}
    for key, tensor in mine.items():
        assert torch.equal(tensor, full[key][boxes[key.partition(".")[2]]]), key
    assert all(tensor.any() for key, tensor in full.items() if key.startswith("exp_avg."))
    # the model computes with what was loaded
    assert abs(backward(parts, mesh) / backward(whole, alone()) - 1) < 1e-5


@pytest.mark.parametrize(
    ("saved_by", "loaded_by"),
    [
        ({"dp": 1}, {"dp": 4, "zero_stage": 3}),
        ({"dp": 4}, {"dp": 3, "zero_stage": 2}),
        ({"tp": 4, "ep": 2}, {"dp": 2, "cp": 2, "etp": 2}),
        ({"tp": 2, "dp": 2, "ep": 2, "zero_stage": 3}, {"dp": 1}),
        ({"cp": 3, "ep": 3}, {"tp": 4, "etp": 2}),
    ],
    ids=describe,
)
def test_checkpoint_of_another_layout(
    saved_by: dict[str, Any], loaded_by: dict[str, Any], tmp_path: Path
) -> None:
    run_distributed(save_one_step, world_size(saved_by), tmp_path, saved_by)
    files = list((tmp_path / "checkpoints" / "step-1").glob("rank-*.safetensors"))
    assert len(files) == world_size(saved_by)
    run_distributed(load_and_compare, world_size(loaded_by), tmp_path, loaded_by)


@pytest.mark.parametrize(
    ("degrees", "world", "message"),
    [
        (
            {"tp": 3},
            4,
            "parallel.tp=3: their product 3 must divide the world size 4; choose a product among [1, 2, 4]",
        ),
        ({"ep": 2, "etp": 2}, 2, "their product 4 must divide the world size 2"),
    ],
)
def test_layouts_that_do_not_fit(degrees: dict[str, int], world: int, message: str) -> None:
    cfg = ParallelConfig(**degrees)
    with pytest.raises(ValueError) as caught:
        cfg.dp(world), cfg.edp(world)
    assert message in str(caught.value)


@pytest.mark.parametrize(("key", "value"), [("tp", 0), ("zero_stage", 4)])
def test_degrees_out_of_range(key: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"parallel.{key}={value} must be"):
        ParallelConfig(**{key: value})
