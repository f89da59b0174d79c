"""Data parallelism against one process: losses, every gradient, updates, checkpoints of another size."""

from pathlib import Path

import pytest
import torch

from model.config import ModelConfig
from model.transformer import Transformer
from parallel.apply import parallelize
from parallel.collectives import all_reduce_sum
from parallel.config import ParallelConfig
from parallel.grad import square_sum
from parallel.mesh import Mesh, init_mesh
from parallel.placement import Shard, collect_gradients, drop_gradients, publish
from parallel.zero import sync_gradients
from tests.dist import run_distributed
from train.checkpoint import load_checkpoint, save_checkpoint
from train.optimizer import OptimizerConfig, build_optimizer, moments

# Sizes that divide by neither 2, 3 nor 4: local parts are uneven, some empty.
MODEL = ModelConfig(
    num_layers=2,
    hidden_size=20,
    num_heads=3,
    num_kv_heads=1,
    head_dim=6,
    rotary_dim=4,
    vocab_size=53,
    num_experts=5,
    expert_ffn_size=12,
    softmax_every=2,
)
ROWS, TOKENS, MICRO_BATCHES = 12, 17, 2
ALONE = Mesh(rank=0, world_size=1, device=torch.device("cpu"), dp=None)


def build(mesh: Mesh, stage: int, dtype: torch.dtype = torch.float32) -> tuple[Transformer, list[Shard]]:
    with torch.device("meta"):
        model = Transformer(MODEL)
    cfg = ParallelConfig(zero_stage=stage)
    return model, parallelize(model, mesh, cfg, dtype=dtype, seed=7)


def backward(model: Transformer, mesh: Mesh, stage: int) -> float:
    """Losses and gradients of one step: 2 micro-batches of 12 rows, this rank's share of each."""
    generator = torch.Generator().manual_seed(0)
    total = 0.0
    for micro in range(MICRO_BATCHES):
        tokens, targets = torch.randint(53, (2, ROWS, TOKENS), generator=generator)
        targets[:, 4] = -100
        offsets = torch.tensor([[0, 5, 6, TOKENS]] * ROWS, dtype=torch.int32)
        mine = slice(mesh.dp_rank * ROWS // mesh.dp_size, (mesh.dp_rank + 1) * ROWS // mesh.dp_size)
        sync_gradients(model, stage > 1 or micro == MICRO_BATCHES - 1)
        losses = model(tokens[mine], offsets[mine], targets=targets[mine], aux_weight=0.1)
        loss = losses.sum() / (MICRO_BATCHES * ROWS * (TOKENS - 1))
        loss.backward()
        total += loss.item()
    return all_reduce_sum(torch.tensor(total, dtype=torch.float64), mesh).item()


def compare_with_one_process(rank: int, stage: int) -> None:
    mesh = init_mesh(ParallelConfig(zero_stage=stage), "cpu")
    whole, parts = build(ALONE, 1), build(mesh, stage)
    optimizers = [build_optimizer(shards, OptimizerConfig(lr=1e-2)) for _, shards in (whole, parts)]
    for _ in range(3):
        expected = backward(whole[0], ALONE, stage)
        actual = backward(parts[0], mesh, stage)
        assert abs(actual / expected - 1) < 1e-6
        collect_gradients(whole[1])
        collect_gradients(parts[1])
        squares = all_reduce_sum(square_sum(parts[1]), mesh)
        torch.testing.assert_close(squares, square_sum(whole[1]), rtol=1e-5, atol=0)
        largest = max(shard.master.grad.abs().max() for shard in whole[1])
        for full, part in zip(whole[1], parts[1], strict=True):
            box = tuple(slice(a, a + n) for a, n in zip(part.offset, part.master.shape, strict=True))
            for mine, theirs in ((part.master, full.master), (part.master.grad, full.master.grad)):
                if mine.numel():
                    error = (mine - theirs[box]).abs().max() / max(theirs.abs().max(), 1e-3 * largest)
                    assert error < 1e-4, f"{part.name}: {error:.1e}"
        for optimizer, shards in zip(optimizers, (whole[1], parts[1]), strict=True):
            optimizer.step()
            publish(shards)
            drop_gradients(shards)
    for a, b in zip(whole[0].routers(), parts[0].routers(), strict=True):
        assert torch.equal(a.load, b.load)
        torch.testing.assert_close(a.aux_loss, b.aux_loss, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("world_size", "stage"), [(2, 1), (2, 2), (3, 1), (4, 2), (4, 3)])
def test_losses_gradients_and_updates(world_size: int, stage: int) -> None:
    run_distributed(compare_with_one_process, world_size, stage)


def compare_bf16(rank: int) -> None:
    """Both forms keep fp32 masters, compute in bf16 and add up gradients in fp32."""
    mesh = init_mesh(ParallelConfig(), "cpu")
    whole, parts = build(ALONE, 1, torch.bfloat16), build(mesh, 1, torch.bfloat16)
    dtypes = {name: parameter.dtype for name, parameter in whole[0].named_parameters()}
    gates = {name for name, dtype in dtypes.items() if dtype == torch.float32}
    assert gates == {"blocks.0.moe.router.gate.weight", "blocks.1.moe.router.gate.weight"}
    expected, actual = backward(whole[0], ALONE, 1), backward(parts[0], mesh, 1)
    assert abs(actual / expected - 1) < 1e-3
    collect_gradients(whole[1])
    collect_gradients(parts[1])
    assert all(shard.master.grad.dtype == torch.float32 for shard in whole[1] + parts[1])
    squares = all_reduce_sum(square_sum(parts[1]), mesh)
    torch.testing.assert_close(squares, square_sum(whole[1]), rtol=3e-2, atol=0)
    optimizer = build_optimizer(whole[1], OptimizerConfig(lr=1e-5))
    before = [shard.master.clone() for shard in whole[1]]
    optimizer.step()
    publish(whole[1])
    for old, shard in zip(before, whole[1], strict=True):
        assert not torch.equal(old, shard.master)  # a step far below bf16's resolution is kept
        assert torch.equal(shard.parameter, shard.master.to(shard.parameter.dtype))


def test_bf16_with_fp32_masters() -> None:
    run_distributed(compare_bf16, 2)


def save_one_step(rank: int, folder: Path, stage: int) -> None:
    mesh = init_mesh(ParallelConfig(zero_stage=stage), "cpu")
    model, shards = build(mesh, stage)
    optimizer = build_optimizer(shards, OptimizerConfig(lr=1e-2))
    backward(model, mesh, stage)
    collect_gradients(shards)
    optimizer.step()
    facts = {"progress": {"optimizer_steps": 1}}
    save_checkpoint(folder, 1, shards=shards, optimizer=optimizer, mesh=mesh, facts=facts, keep=None)


def load_and_compare(rank: int, folder: Path, stage: int) -> None:
    """What one process reads from the same files is the truth for every rank's part."""
    mesh = init_mesh(ParallelConfig(zero_stage=stage), "cpu")
    loaded = []
    for place in (ALONE, mesh):
        model, shards = build(place, stage)
        optimizer = build_optimizer(shards, OptimizerConfig())
        manifest = load_checkpoint(folder / "checkpoints" / "step-1", shards=shards, optimizer=optimizer)
        assert manifest["step"] == 1
        loaded.append((model, shards, optimizer))
    (_, whole, whole_optimizer), (model, parts, part_optimizer) = loaded
    full, mine = moments(whole_optimizer, whole), moments(part_optimizer, parts)
    full |= {f"model.{shard.name}": shard.master for shard in whole}
    mine |= {f"model.{shard.name}": shard.master for shard in parts}
    offsets = {shard.name: shard.offset for shard in parts}
    for key, tensor in mine.items():
        offset = offsets[key.partition(".")[2]]
        box = tuple(slice(a, a + n) for a, n in zip(offset, tensor.shape, strict=True))
        assert torch.equal(tensor, full[key][box]), key
    assert any(tensor.any() for tensor in full.values())
    expected = backward(loaded[0][0], ALONE, stage)
    assert abs(backward(model, mesh, stage) / expected - 1) < 1e-6  # the model computes with what was loaded


@pytest.mark.parametrize(("saved_by", "loaded_by"), [(1, 4), (4, 3), (3, 1)])
def test_checkpoint_of_another_size(saved_by: int, loaded_by: int, tmp_path: Path) -> None:
    run_distributed(save_one_step, saved_by, tmp_path, 1)
    assert len(list((tmp_path / "checkpoints" / "step-1").glob("rank-*.safetensors"))) == saved_by
    run_distributed(load_and_compare, loaded_by, tmp_path, 3)


@pytest.mark.parametrize(
    ("degrees", "world_size", "message"),
    [
        ({"tp": 3}, 4, "pp * cp * tp = 3 must divide the world size 4; its divisors are [1, 2, 4]"),
        ({"ep": 2, "etp": 2}, 2, "pp * ep * etp = 4 must divide the world size 2"),
        ({"cp": 2}, 4, "parallel.cp=2 is not available yet; use 1"),
    ],
)
def test_layouts_that_do_not_fit(degrees: dict[str, int], world_size: int, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        ParallelConfig(**degrees).dp(world_size)
    assert message in str(caught.value)


@pytest.mark.parametrize(("key", "value"), [("tp", 0), ("zero_stage", 4)])
def test_degrees_out_of_range(key: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"parallel.{key}={value} must be"):
        ParallelConfig(**{key: value})
