"""What a job records of its routers, against what hooks on every rank saw of the routing itself."""

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from model.capacity import capacity
from model.config import AuxScope, RouterConfig, Scope
from model.router import Micro, Router, Routing
from parallel.config import ParallelConfig, Recompute, Schedule
from parallel.mesh import Mesh, init_mesh
from tests.support.layout_cases import TINY, Built, Case, build, explain_failures, run_cases
from train.monitor.expert_counts import ExpertCounts, read_counts

GLOBAL = RouterConfig(capacity_factor=0.9, z_loss_coefficient=0.01)
WHOLE_STEP = replace(GLOBAL, aux_scope=AuxScope.global_batch)
LOCAL = replace(GLOBAL, scope=Scope["local"])


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A job of two or four processes."""

    dp: int = 1
    parallel: dict[str, Any]
    router: RouterConfig = field(default_factory=lambda: GLOBAL)
    recompute: Recompute = Recompute.none
    overlap_groups: int = 1

    @property
    def case(self) -> Case:
        """Four rows a micro-batch, three micro-batches and two layers; four of both for a pipeline."""
        cfg = ParallelConfig(**self.parallel)
        model = replace(TINY, num_layers=4 if cfg.pp > 1 else 2)
        return Case(
            parallel=cfg, dp=self.dp, model=model, row_tokens=24, micro_rows=4 // self.dp,
            num_micro=4 if cfg.pp > 1 else 3, router=self.router, overlap_groups=self.overlap_groups,
        )  # fmt: skip


EP = {"ep": 2}
LAYOUTS = {
    "dp2 dropless": Layout(dp=2, parallel={}, router=RouterConfig()),
    "dp2 ep2": Layout(dp=2, parallel=EP, recompute=Recompute.full),
    "dp2": Layout(dp=2, parallel={}, router=WHOLE_STEP, recompute=Recompute.selective),
    "pp2 1f1b": Layout(parallel={"pp": 2}, recompute=Recompute.full, router=WHOLE_STEP),
    "pp2 zbv": Layout(parallel={"pp": 2, "schedule": Schedule.zbv}, router=WHOLE_STEP),
    "edp2 ep2 selective": Layout(dp=4, parallel=EP, recompute=Recompute.selective, router=WHOLE_STEP),
    "edp2 ep2 full": Layout(dp=4, parallel={**EP, "zero_stage": 3}, recompute=Recompute.full),
    "edp2 ep2 local": Layout(dp=4, parallel=EP, recompute=Recompute.full, router=LOCAL),
    "edp4": Layout(dp=4, parallel={}, overlap_groups=2),
    "edp4, pools of 2": Layout(dp=4, parallel={}, router=replace(GLOBAL, pool_groups=2)),
    "cp2 tp2 ep2": Layout(parallel={"cp": 2, "tp": 2, **EP}, recompute=Recompute.selective),
    "pp2 dp2 1f1b": Layout(dp=2, parallel={"pp": 2}, recompute=Recompute.selective),
    "pp2 dp2 zbv": Layout(dp=2, parallel={"pp": 2, "schedule": Schedule.zbv}),
}
STEPS = 3


@dataclass
class Seen:
    """What one rank's router of one layer did in one micro-batch."""

    experts: Tensor
    replicas: Tensor | None
    load: Tensor
    dropped: Tensor
    moved: int
    sums: Tensor
    """[experts + 2]: probabilities by expert, squared log-sum-exp, entropy, each summed over tokens."""


@dataclass
class Watch:
    """Fills while a model trains: by layer and number of the micro-batch."""

    own_group: int
    seen: dict[tuple[int, int], Seen] = field(default_factory=dict)
    calls: int = 0
    findings: list[str] = field(default_factory=list)

    def on(self, built: Built) -> None:
        """Hook the routers."""
        for router in built.routers.values():
            logits: list[Tensor] = []
            router.gate.register_forward_hook(lambda module, inputs, out, to=logits: to.append(out.detach()))
            router.register_forward_hook(
                lambda module, inputs, out, of=logits: self.note(module, inputs[1], out, of.pop())
            )

    def note(self, router: Router, micro: Micro, routing: Routing, logits: Tensor) -> None:
        """One call; the second of a micro-batch must have decided the same."""
        if not router.training:
            return
        self.calls += 1
        key, (_, experts, replicas) = (router.layer, int(micro.number)), routing
        if key in self.seen:
            first = self.seen[key]
            if not torch.equal(experts, first.experts) or (
                replicas is not None and not torch.equal(replicas, first.replicas)
            ):
                self.findings.append(f"layer, micro-batch {key}: recomputed with another decision")
            return
        kept = torch.ones_like(experts, dtype=torch.bool) if replicas is None else replicas >= 0
        moved = 0 if replicas is None else int((kept & (replicas != self.own_group)).sum())
        logits = logits.flatten(0, 1).double()
        probs = logits.softmax(-1)
        means = [logits.logsumexp(-1).square().sum(), -(probs * probs.log()).sum()]
        sums = torch.cat([probs.sum(0), torch.stack(means)])
        self.seen[key] = Seen(experts, replicas, count(experts), count(experts[~kept]), moved, sums)


def count(experts: Tensor) -> Tensor:
    return torch.bincount(experts.flatten(), minlength=TINY.num_experts)


def own_group(case: Case, mesh: Mesh) -> int:
    """Number of this rank's EP group among those that share its capacity."""
    stage_rank = mesh.rank % (mesh.world_size // case.parallel.pp)
    return stage_rank // (case.parallel.ep * case.parallel.etp) % case.pool_groups


def on_all_ranks(seen: dict[tuple[int, int], Seen]) -> dict[tuple[int, int], list[Seen]]:
    """By layer and micro-batch, what each rank of the stage did."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, seen)
    joined: dict[tuple[int, int], list[Seen]] = {}
    for part in found:
        for key, value in part.items():
            joined.setdefault(key, []).append(value)
    return joined


def expected_counts(case: Case, seen: dict[tuple[int, int], list[Seen]], steps: range) -> ExpertCounts:
    """Of an interval of steps; losses of the last one."""
    layers, experts = case.model.num_layers, TINY.num_experts
    load, dropped = torch.zeros(2, layers, experts, dtype=torch.int64)
    moved, losses = torch.zeros(layers, dtype=torch.int64), torch.zeros(layers, 3, dtype=torch.float64)
    tokens = case.rows * case.row_tokens
    for layer in range(layers):
        for step in steps:
            so_far = torch.zeros(experts)
            for number in range(step * case.num_micro, (step + 1) * case.num_micro):
                ranks = seen[layer, number]
                choices = sum(rank.load for rank in ranks)
                load[layer] += choices
                dropped[layer] += sum(rank.dropped for rank in ranks)
                moved[layer] += sum(rank.moved for rank in ranks)
                is_whole = case.router.aux_scope is AuxScope.global_batch
                so_far = so_far + choices if is_whole else choices
                *probs, z, entropy = sum(rank.sums for rank in ranks) / tokens
                aux = experts * (so_far.double() / so_far.sum() * torch.stack(probs)).sum()
                if step == steps[-1]:
                    losses[layer] += torch.stack([aux, z, entropy]) / case.num_micro
    return ExpertCounts(load, dropped, moved, losses)


def unlike(counts: ExpertCounts, expected: ExpertCounts) -> list[str]:
    found = [
        f"{name}: {getattr(counts, name).tolist()} recorded, {getattr(expected, name).tolist()} seen"
        for name in ("load", "dropped", "moved")
        if not torch.equal(getattr(counts, name), getattr(expected, name))
    ]
    if not torch.allclose(counts.losses.double(), expected.losses, rtol=1e-5):
        found.append(f"losses: {counts.losses.tolist()} recorded, {expected.losses.tolist()} seen")
    load, choices = expected.load.double(), expected.load.sum()
    rates = {
        "drop_rate": expected.dropped.sum() / choices,
        "moved_rate": expected.moved.sum() / choices,
        "max_violation": (load.amax(1) / load.mean(1) - 1).max(),
    }
    summary = counts.summary()
    return found + [
        f"{key}: {summary[key]} recorded, {value} seen"
        for key, value in rates.items()
        if summary[key] != pytest.approx(value.item(), rel=1e-6)
    ]


def unlike_the_rule(case: Case, seen: dict[tuple[int, int], list[Seen]]) -> list[str]:
    """All choices are counted, and where one capacity is shared by all, only the surplus is dropped."""
    tokens, factor = case.rows * case.row_tokens, case.router.capacity_factor
    found = []
    for key, ranks in seen.items():
        load, dropped = sum(rank.load for rank in ranks), sum(rank.dropped for rank in ranks)
        if load.sum() != tokens * TINY.experts_per_token:
            found.append(f"layer, micro-batch {key}: {load.sum()} choices of {tokens} tokens")
        edp = case.parallel.edp(case.world_size)
        if factor is not None and case.pool_groups == edp:
            limit = capacity(factor, tokens * TINY.experts_per_token, TINY.num_experts)
            if not torch.equal(dropped, (load - limit).clamp(min=0)):
                found.append(f"layer, micro-batch {key}: dropped {dropped} of {load} at {limit} an expert")
    return found


def compare(layout: Layout) -> list[str]:
    """An interval of two steps and one of the third; findings of this rank."""
    case = layout.case
    overlaps = layout.overlap_groups > 1
    mesh = init_mesh(case.parallel, "cpu", pool_groups=case.pool_groups, overlaps=overlaps)
    built = build(case, mesh, recompute=layout.recompute)
    watch = Watch(own_group(case, mesh))
    watch.on(built)
    intervals, counted = (range(2), range(2, STEPS)), []
    for interval in intervals:
        for step in interval:
            built.backward(case, step)
            built.update()
        built.forward(case)  # evaluation counts nothing
        for part in built.parts:
            part.train()
        routers = built.routers
        sizes = case.model.num_layers, case.num_micro
        counted.append(read_counts(list(routers.values()), list(routers), *sizes, mesh.world))
    seen = on_all_ranks(watch.seen)
    found = watch.findings + unlike_the_rule(case, seen)
    for counts, interval in zip(counted, intervals, strict=True):
        found += unlike(counts, expected_counts(case, seen, interval))
    again = watch.calls - len(watch.seen)
    if again != (0 if layout.recompute is Recompute.none else len(watch.seen)):
        found.append(f"{again} calls in recomputation, {len(watch.seen)} in forward passes")
    totals = [sum(int(part.sum()) for part in parts) for parts in zip(*counted, strict=True)]
    drops, moves = case.router.capacity_factor is not None, case.pool_groups > 1
    if (totals[1] > 0, totals[2] > 0) != (drops, moves):
        found.append(f"the case tests nothing: {totals[1]} dropped, {totals[2]} moved")
    return found


@pytest.mark.timeout(0)  # the harness ends cases that hang
@pytest.mark.parametrize("world", [2, 4])
def test_record_equals_the_routing(world: int) -> None:
    mine = {name: layout for name, layout in LAYOUTS.items() if layout.case.world_size == world}
    for layout in mine.values():
        layout.case.run_config().validate(world)
    layouts = list(mine.values())
    outcome = run_cases(world, list(mine), lambda number: compare(layouts[number]))
    assert not outcome.failures, explain_failures(outcome)
