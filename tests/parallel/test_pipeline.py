"""Stage split, placement of stages, and traps of torch's schedules that a comparison of layouts misses."""

import itertools
from dataclasses import replace

import pytest
import torch

from parallel.apply import build_parts, parallelize
from parallel.config import ParallelConfig, Schedule, num_stages, stage_owner, stages_of
from parallel.gradients import Gradients
from parallel.mesh import init_mesh, one_process
from parallel.pipeline import MicroBatch, Pipeline, SingleStage, split_layers
from tests.support.dist import run_distributed
from tests.support.layout_cases import TINY

MODEL = replace(TINY, num_heads=2)
MICRO = 4


@pytest.mark.parametrize("stages", [1, 2, 3, 5])
def test_the_dearest_stage_is_as_cheap_as_can_be(stages: int) -> None:
    """Against all cuts of nine layers of uneven cost."""
    costs = [1.0, 1.0, 5.0, 1.0, 1.0, 1.0, 5.0, 1.0, 9.0]
    split = split_layers(costs, stages)
    assert [layer for part in split for layer in part] == list(range(9))
    assert all(len(part) for part in split)
    dearest = max(sum(costs[layer] for layer in part) for part in split)
    best = min(
        max(sum(costs[a:b]) for a, b in itertools.pairwise([0, *cuts, 9]))
        for cuts in itertools.combinations(range(1, 9), stages - 1)
    )
    assert dearest == best


def test_more_stages_than_layers_are_refused() -> None:
    with pytest.raises(ValueError, match="2 layers cannot fill 3 pipeline stages"):
        split_layers([1.0, 1.0], 3)


@pytest.mark.parametrize("schedule", list(Schedule))
@pytest.mark.parametrize("pp", [2, 3, 4])
def test_every_stage_has_one_owner(schedule: Schedule, pp: int) -> None:
    count = num_stages(schedule, pp)
    owners = [stage_owner(stage, schedule, pp) for stage in range(count)]
    assert sorted(stage for rank in range(pp) for stage in stages_of(rank, schedule, pp)) == list(
        range(count)
    )
    assert owners[:pp] == list(range(pp))
    if schedule in (Schedule.zbv, Schedule.dualpipev):
        assert owners[pp:] == list(reversed(range(pp)))


def test_stages_hold_what_the_whole_model_holds() -> None:
    """Names are global; the ends belong to the first and the last stage."""
    mesh, cfg = one_process(torch.device("cpu")), ParallelConfig()
    whole = {
        name for part in build_parts(MODEL, cfg, mesh, row_tokens=16) for name, _ in part.named_parameters()
    }
    run_distributed(compare_names, 2, whole)
    assert "blocks.3.mixer.q.weight" in whole
    assert "head.weight" in whole


def compare_names(rank: int, whole: set[str]) -> None:
    mesh = init_mesh(ParallelConfig(pp=2, schedule=Schedule.zbv), "cpu")
    parts = build_parts(MODEL, ParallelConfig(pp=2, schedule=Schedule.zbv), mesh, row_tokens=16)
    mine = {name for part in parts for name, _ in part.named_parameters()}
    assert mine < whole
    assert ("embed.weight" in mine) is ("head.weight" in mine) is (rank == 0)  # the V comes back to rank 0


def gradients(engine: SingleStage | Pipeline, sums: Gradients, tokens: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(64, (MICRO, 1, tokens), generator=torch.Generator().manual_seed(tokens))
    offsets = torch.tensor([[0, 3, tokens]], dtype=torch.int32)
    engine.forward_backward(
        [MicroBatch(x, x, offsets, torch.tensor([m])) for m, x in enumerate(ids)],
        torch.tensor(float(MICRO * tokens)),
        10.0,
    )
    sums.collect()
    found = {shard.name: shard.master.grad.clone() for shard in sums.shards}
    sums.drop()
    return found


def rebuild_for_another_length(rank: int, schedule: Schedule) -> None:
    """Static shapes: a live schedule takes one row length; another one needs another schedule."""
    cfg = ParallelConfig(pp=2, schedule=schedule)
    mesh, alone = init_mesh(cfg, "cpu"), one_process(torch.device("cpu"))
    whole = build_parts(MODEL, ParallelConfig(), alone, row_tokens=16)
    _, whole_sums = parallelize(whole, alone, ParallelConfig(), dtype=torch.float32, seed=0)
    parts = build_parts(MODEL, cfg, mesh, row_tokens=16)
    _, sums = parallelize(parts, mesh, cfg, dtype=torch.float32, seed=0)
    for tokens in (16, 40, 8):
        sizes = {"num_micro": MICRO, "micro_rows": 1, "row_tokens": tokens}
        engine = Pipeline(parts, mesh, schedule, dtype=torch.float32, **sizes)
        expected = gradients(SingleStage(whole[0], zero_stage=1), whole_sums, tokens)
        for name, gradient in gradients(engine, sums, tokens).items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("schedule", [Schedule["1f1b"], Schedule.interleaved, Schedule.dualpipev])
def test_another_row_length_on_the_same_stages(schedule: Schedule) -> None:
    run_distributed(rebuild_for_another_length, 2, schedule)


def count_passes(rank: int, schedule: Schedule) -> None:
    """Each router sees each micro-batch once: no shape-inference pass, no second forward."""
    cfg = ParallelConfig(pp=2, schedule=schedule)
    mesh = init_mesh(cfg, "cpu")
    parts = build_parts(MODEL, cfg, mesh, row_tokens=16)
    _, sums = parallelize(parts, mesh, cfg, dtype=torch.float32, seed=0)
    engine = Pipeline(
        parts, mesh, schedule, num_micro=MICRO, micro_rows=1, row_tokens=16, dtype=torch.float32
    )
    assert all(g.isfinite().all() for g in gradients(engine, sums, 16).values())
    for part in parts:
        for router in part.routers():
            assert router.load.sum() == MICRO * 16 * MODEL.experts_per_token


@pytest.mark.parametrize("schedule", list(Schedule))
def test_each_micro_batch_is_counted_once(schedule: Schedule) -> None:
    run_distributed(count_passes, 2, schedule)
