"""Recomputation and offload: the same numbers, fewer collectives than twice, counted once."""

import pytest
import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from parallel.apply import build_parts, parallelize
from parallel.collectives import all_reduce_sum
from parallel.config import Offload, ParallelConfig, Recompute, Schedule
from parallel.context import zigzag
from parallel.gradients import Gradients
from parallel.mesh import Mesh, init_mesh, one_process
from parallel.optimizer import AdamW, OptimizerConfig
from parallel.pipeline import MicroBatch, SingleStage
from parallel.placement import Shard
from parallel.zero import copy_for_compute
from tests.support.dist import run_distributed
from tests.support.layout_cases import TINY

ROWS, TOKENS = 4, 24
OFFSETS = torch.tensor([[0, 5, 6, 20, TOKENS], [0, TOKENS, TOKENS, TOKENS, TOKENS]] * 2, dtype=torch.int32)
Trained = tuple[list[float], dict[str, torch.Tensor], list[list[int]]]


def train(
    mesh: Mesh,
    cfg: ParallelConfig,
    *,
    recompute: Recompute = Recompute.none,
    offload: Offload = Offload.none,
    dtype: torch.dtype = torch.float32,
    steps: int = 2,
) -> Trained:
    """Losses, the last gradients by name, and the experts' load of a few steps of two micro-batches."""
    parts = build_parts(TINY, cfg, mesh, row_tokens=TOKENS)
    options = {"dtype": dtype, "seed": 3, "recompute": recompute, "offload": offload}
    shards, gradient_sums = parallelize(parts, mesh, cfg, **options)
    engine = SingleStage(parts[0], zero_stage=cfg.zero_stage)
    optimizer = AdamW(gradient_sums, OptimizerConfig(lr=1e-2, eps=1e-6, offload=offload))
    losses, gradients = [], {}
    rows = slice(mesh.dp.rank * ROWS // mesh.dp.size, (mesh.dp.rank + 1) * ROWS // mesh.dp.size)
    for step in range(steps):
        ids = torch.randint(64, (2, ROWS, TOKENS), generator=torch.Generator().manual_seed(step))
        numbers = torch.zeros(len(OFFSETS[rows]), dtype=torch.int64)
        batches = [
            MicroBatch(zigzag(x[rows], mesh.cp), zigzag(x[rows].roll(-1, 1), mesh.cp), OFFSETS[rows], numbers)
            for x in ids
        ]
        loss = engine.forward_backward(batches, torch.tensor(2.0 * ROWS * TOKENS), 5.0)
        losses.append((all_reduce_sum(loss, mesh.world) / mesh.tp.size).item())
        gradient_sums.collect()
        gradients = {shard.name: shard.master.grad.clone() for shard in shards}
        optimizer.step()
        gradient_sums.drop()
    check_memory(shards, offload)
    return losses, gradients, [router.load.tolist() for router in parts[0].routers()]


def check_memory(shards: list[Shard], offload: Offload) -> None:
    if offload is Offload.cpu:
        assert all(shard.master.device.type == "cpu" for shard in shards)


def count_collectives(counts: dict[str, int]) -> None:
    """Count what goes out from here on; only in a process that ends soon."""
    for name in ("all_gather_into_tensor", "batch_isend_irecv", "all_to_all_single"):
        inner = getattr(dist, name)

        def counted(*args, _inner=inner, _name=name, **kwargs):
            if _name != "all_to_all_single":
                counts[_name] += 1
            elif not args[0].is_floating_point():
                counts["plans"] += 1
            return _inner(*args, **kwargs)

        setattr(dist, name, counted)


def compare_recompute(rank: int, layout: dict[str, int]) -> None:
    """Bit-equal under `full`; within the contract under `selective`, whose attention sums otherwise."""
    cfg = ParallelConfig(**layout)
    mesh = init_mesh(cfg, "cpu")
    plain = train(mesh, cfg)
    for mode in (Recompute.full, Recompute.selective):
        losses, gradients, load = train(mesh, cfg, recompute=mode)
        assert load == plain[2]
        if mode is Recompute.full:
            assert losses == plain[0]
            assert all(torch.equal(gradient, plain[1][name]) for name, gradient in gradients.items())
            continue
        assert losses == pytest.approx(plain[0], rel=1e-6)
        largest = max(gradient.abs().max() for gradient in plain[1].values() if gradient.numel())
        for name, expected in plain[1].items():
            if expected.numel():
                error = (gradients[name] - expected).abs().max() / max(expected.abs().max(), 1e-3 * largest)
                assert error < 1e-4, f"{name}: {error:.1e}"


@pytest.mark.parametrize(
    "layout",
    [{}, {"zero_stage": 3}, {"cp": 2}, {"tp": 2, "ep": 2}, {"cp": 2, "ep": 2, "zero_stage": 3}],
    ids=str,
)
def test_recompute_changes_no_number(layout: dict[str, int]) -> None:
    run_distributed(compare_recompute, 2, layout)


def test_rows_of_odd_length_are_recomputed() -> None:
    """One rank does not cut them in halves."""
    mesh, cfg, found = one_process(torch.device("cpu")), ParallelConfig(), []
    ids, offsets = torch.randint(64, (ROWS, 7)), torch.tensor([[0, 3, 7]] * ROWS, dtype=torch.int32)
    for mode in (Recompute.none, Recompute.selective):
        parts = build_parts(TINY, cfg, mesh, row_tokens=7)
        shards, _ = parallelize(parts, mesh, cfg, dtype=torch.float32, seed=3, recompute=mode)
        parts[0](ids, offsets, targets=ids).sum().backward()
        found.append(torch.cat([shard.parameter.grad.flatten() for shard in shards]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)


def count_under_recompute(rank: int) -> None:
    """Only context parallelism communicates in this layout, apart from reductions and ways to experts."""
    cfg = ParallelConfig(cp=2, ep=2)
    mesh = init_mesh(cfg, "cpu")
    counts = {"all_gather_into_tensor": 0, "batch_isend_irecv": 0, "plans": 0}
    count_collectives(counts)
    seen = {}
    for mode in Recompute:
        for name in counts:
            counts[name] = 0
        train(mesh, cfg, recompute=mode, steps=1)
        seen[mode] = dict(counts)
    assert seen[Recompute.selective] == seen[Recompute.none]  # nothing is gathered twice
    assert seen[Recompute.full]["plans"] == seen[Recompute.none]["plans"] > 0
    assert seen[Recompute.full]["all_gather_into_tensor"] > seen[Recompute.none]["all_gather_into_tensor"]
    assert seen[Recompute.full]["batch_isend_irecv"] > seen[Recompute.none]["batch_isend_irecv"]


def test_selective_recompute_gathers_nothing_twice() -> None:
    run_distributed(count_under_recompute, 2)


def count_by_zero_stage(rank: int) -> None:
    """Parameters are gathered once a step, or with stage 3 for each pass of each of two micro-batches."""
    mesh, seen = init_mesh(ParallelConfig(), "cpu"), []
    for stage in (1, 2, 3):
        with profile(activities=[ProfilerActivity.CPU]) as traced:
            train(mesh, ParallelConfig(zero_stage=stage), steps=1)
        seen.append(sum(event.name == "fsdp::all_gather_copy_in" for event in traced.events()))
    groups = 3 * TINY.num_layers + 1  # experts, gate and the rest of each layer; the model's own
    assert seen == [groups, groups, 4 * groups]


def test_parameters_are_gathered_once_a_step() -> None:
    run_distributed(count_by_zero_stage, 2)


@pytest.mark.parametrize(
    ("schedule", "dtype", "added"),
    [
        ("1f1b", torch.bfloat16, True),
        ("interleaved", torch.bfloat16, True),
        ("interleaved_zero_bubble", torch.bfloat16, False),  # runs the experts' backward twice
        ("1f1b", torch.float32, False),  # masters are the weights themselves
    ],
)
def test_whose_gemms_add_gradients_to_masters(schedule: str, dtype: torch.dtype, added: bool) -> None:
    mesh, cfg = one_process(torch.device("cpu")), ParallelConfig(schedule=Schedule[schedule])
    parts = build_parts(TINY, cfg, mesh, row_tokens=TOKENS)
    shards, _ = parallelize(parts, mesh, cfg, dtype=dtype, seed=3)
    masters = {shard.parameter: shard.master for shard in shards}
    for block in parts[0].blocks.values():
        experts = block.moe.experts
        if not added:
            assert experts.master_grads is None
            continue
        for weight, buffer in zip((experts.gate_up, experts.down), experts.master_grads, strict=True):
            (first, adds), (second, adds_again) = buffer(), buffer()
            assert first is second is masters[weight].grad
            assert first.dtype == torch.float32
            assert (adds, adds_again) == (False, True)


class AddsItsGradient(torch.autograd.Function):
    """What a GEMM does that adds to the master's gradient."""

    @staticmethod
    def forward(ctx, weight: torch.Tensor, master: torch.Tensor) -> torch.Tensor:
        ctx.master = master
        return weight.sum()

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[None, None]:
        buffer, _ = Gradients.buffer(ctx.master)
        buffer.fill_(0.5)
        return None, None


def test_masters_sum_gradients_in_fp32_however_they_come() -> None:
    """First one that was added without the hook, then rounded ones through it: nothing is lost or doubled."""
    parameter = torch.nn.Parameter(torch.ones(3))
    shard = Shard("w", (3,), (0,), 1, True, parameter, parameter.detach().clone())
    copy_for_compute([shard], torch.device("cpu"), torch.bfloat16)
    Gradients([shard], one_process(torch.device("cpu")).tp)
    AddsItsGradient.apply(parameter, shard.master).backward()
    assert parameter.grad is None
    assert shard.master.grad.tolist() == [0.5] * 3
    small = torch.tensor([2.0**-8, 3.0, 2.0**-20], dtype=torch.bfloat16)
    for _ in range(3):
        (parameter * small).sum().backward()
    assert parameter.grad is None
    assert shard.master.grad.dtype == torch.float32
    assert torch.equal(shard.master.grad, 0.5 + 3 * small.float())


def test_recompute_keeps_less() -> None:
    """Bytes that autograd keeps between forward and backward, in one process."""
    kept = {}
    for mode in Recompute:
        mesh, cfg = one_process(torch.device("cpu")), ParallelConfig()
        parts = build_parts(TINY, cfg, mesh, row_tokens=TOKENS)
        parallelize(parts, mesh, cfg, dtype=torch.float32, seed=3, recompute=mode)
        ids = torch.randint(64, (ROWS, TOKENS))
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, s=sizes: s.append(x.nbytes) or x, lambda x: x
        ):
            losses = parts[0](ids, OFFSETS, targets=ids)
        kept[mode] = sum(sizes)
        assert losses.requires_grad
    assert kept[Recompute.full] <= kept[Recompute.selective] < 0.3 * kept[Recompute.none]


def compare_offload(rank: int, layout: dict[str, int]) -> None:
    cfg = ParallelConfig(**layout)
    mesh = init_mesh(cfg, "cpu")
    plain, offloaded = train(mesh, cfg, steps=3), train(mesh, cfg, offload=Offload.cpu, steps=3)
    assert offloaded[0] == pytest.approx(plain[0], rel=1e-6)


@pytest.mark.parametrize(
    "layout", [{}, {"tp": 2, "zero_stage": 2}, {"cp": 2, "ep": 2, "zero_stage": 3}], ids=str
)
def test_offloaded_optimizer_gives_the_same_losses(layout: dict[str, int]) -> None:
    build_optimizer_extension()
    run_distributed(compare_offload, 2, layout)


def build_optimizer_extension() -> None:
    """Compile DeepSpeed's extension once, before several processes want it."""
    mesh = one_process(torch.device("cpu"))
    losses, _, _ = train(mesh, ParallelConfig(), offload=Offload.cpu, dtype=torch.bfloat16)
    assert losses[1] != losses[0]


def test_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be built is refused with the remedy, not replaced."""
    monkeypatch.setitem(__import__("sys").modules, "deepspeed.ops.adam", None)
    with pytest.raises(
        RuntimeError, match=r"optimizer\.offload=cpu needs deepspeed.*set optimizer\.offload=none"
    ):
        train(one_process(torch.device("cpu")), ParallelConfig(), offload=Offload.cpu)
