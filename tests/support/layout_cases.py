"""One tiny training run on any layout, and the same run on one process as its truth."""

import faulthandler
import gc
import json
import math
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from data.config import DataConfig, SourceConfig
from model.capacity import Admission
from model.config import Balancing, ModelConfig, RouterConfig
from model.router import Micro, Router, Routing
from model.transformer import Transformer
from parallel.apply import build_parts, parallelize
from parallel.collectives import all_reduce_sum
from parallel.config import MoEConfig, ParallelConfig, Recompute, Schedule
from parallel.context import zigzag
from parallel.gradients import Gradients
from parallel.mesh import Mesh, init_mesh, one_process
from parallel.optimizer import AdamW, OptimizerConfig
from parallel.pipeline import MicroBatch, Pipeline, SingleStage
from parallel.placement import Shard
from tests.support.dist import run_distributed
from train.config import BatchConfig, Precision, RunConfig, TrainConfig

STEPS = 3
TINY = ModelConfig(
    num_layers=4, hidden_size=16, num_heads=4, num_kv_heads=2, head_dim=4, rotary_dim=2, vocab_size=64,
    num_experts=4, expert_ffn_size=8, softmax_every=2,
)  # fmt: skip
NEAR_TIE = 1e-5
"""Router logits closer than this may swap places between two orders of summation."""
OPTIMIZER = OptimizerConfig(lr=3e-3, eps=1e-5)
"""eps far above round-off: else Adam makes full steps of it, and one process differs from itself by 1e-4."""
HANGS_AFTER = 120.0
"""Seconds after which a case's processes show their stacks and end."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A run: its layout, its sizes and, by seed, its tokens."""

    parallel: ParallelConfig
    dp: int
    model: ModelConfig
    row_tokens: int
    micro_rows: int
    num_micro: int
    pieces: int = 0
    """Documents like to end where a row is cut into so many; 0: into 2 cp, as context parallelism does."""
    seed: int = 0
    router: RouterConfig = field(default_factory=lambda: RouterConfig(aux_loss_coefficient=0.1))
    overlap_groups: int = 1
    is_padded: bool = False

    @property
    def pool_groups(self) -> int:
        """EP groups that share their experts' capacity."""
        return self.router.groups_in_pool(self.parallel.edp(self.world_size))

    @property
    def world_size(self) -> int:
        """Processes of the case."""
        return self.parallel.pp * self.dp * self.parallel.cp * self.parallel.tp

    @property
    def rows(self) -> int:
        """Rows of a micro-batch over all dp ranks."""
        return self.micro_rows * self.dp

    @property
    def layout(self) -> str:
        """For people: the degrees above 1, schedule and ZeRO stage."""
        return describe(self.parallel, self.dp)

    def run_config(self) -> RunConfig:
        """What a user would have to configure."""
        tokens = self.row_tokens * self.rows * self.num_micro
        return RunConfig(
            name="case",
            run_dir="nowhere",
            model=self.model,
            router=self.router,
            moe=MoEConfig(overlap_groups=self.overlap_groups),
            data=DataConfig(sources=[SourceConfig(path="nowhere")]),
            batch=BatchConfig(row_tokens=self.row_tokens, micro_rows=self.micro_rows, global_tokens=tokens),
            parallel=self.parallel,
            train=TrainConfig(steps=STEPS, dtype=Precision.fp32),
        )

    def batches(self, step: int) -> list[MicroBatch]:
        """All micro-batches of a step: random tokens, targets and documents."""
        return list(_batches(self.model.vocab_size, self.row_tokens, self.rows, self.num_micro,
                             self.pieces or 2 * self.parallel.cp, self.seed, step,
                             self.is_padded))  # fmt: skip


def describe(cfg: ParallelConfig, dp: int) -> str:
    """`pp2 dp2 ep4 zero3 zbv`."""
    degrees = {"pp": cfg.pp, "dp": dp, "cp": cfg.cp, "tp": cfg.tp, "ep": cfg.ep, "etp": cfg.etp}
    words = [f"{axis}{degree}" for axis, degree in degrees.items() if degree > 1]
    words += [f"zero{cfg.zero_stage}"] if cfg.zero_stage > 1 else []
    words += [str(cfg.schedule)] if cfg.schedule is not Schedule["1f1b"] else []
    return " ".join(words) or "alone"


def alone() -> Mesh:
    """The mesh of one process."""
    return one_process(torch.device("cpu"))


@cache
def _batches(
    vocab: int, tokens: int, rows: int, num_micro: int, pieces: int, seed: int, step: int, is_padded: bool
) -> tuple[MicroBatch, ...]:
    generator = torch.Generator().manual_seed(1000 * seed + step)

    def below(limit: int) -> int:
        return int(torch.randint(limit, (), generator=generator))

    def documents() -> list[int]:
        """Starts after the first: random ones, chunk borders, documents of one token."""
        starts = {1 + below(max(1, tokens - 1)) for _ in range(below(4))}
        if tokens % pieces == 0:
            starts |= {tokens // pieces * below(pieces) for _ in range(below(3))}
        if below(2):
            at = below(tokens)
            starts |= {at, at + 1}
        return sorted(start for start in starts if 0 < start < tokens)

    cuts = [[documents() for _ in range(rows)] for _ in range(num_micro)]
    width = max(len(row) for batch in cuts for row in batch) + 2
    found = []
    for batch in cuts:
        ids, targets = torch.randint(vocab, (2, rows, tokens), generator=generator)
        ignored = torch.rand(rows, tokens, generator=generator) < 0.1 + 0.8 * (below(4) == 0)
        ignored[below(rows)] |= below(5) == 0
        ignored[0, 0] = False
        offsets = torch.tensor(
            [[0, *row] + [tokens] * (width - 1 - len(row)) for row in batch], dtype=torch.int32
        )
        number = torch.full((rows,), step * num_micro + len(found))
        lengths = None
        if is_padded:  # the last document of each row that has several
            lengths = torch.tensor([row[-1] if row else tokens for row in batch], dtype=torch.int32)
            ignored |= torch.arange(tokens) >= lengths[:, None]
        found.append(MicroBatch(ids, targets.masked_fill(ignored, -100), offsets, number, lengths))
    return tuple(found)


def share(batches: Sequence[MicroBatch], mesh: Mesh) -> list[MicroBatch]:
    """This rank's rows and tokens."""

    def cut(batch: MicroBatch) -> MicroBatch:
        mine = [None if part is None else part.chunk(mesh.dp.size)[mesh.dp.rank] for part in batch]
        tokens, targets, *rest = mine
        return MicroBatch(zigzag(tokens, mesh.cp), zigzag(targets, mesh.cp), *rest)

    return [cut(batch) for batch in batches]


@dataclass
class Built:
    """A case's model on one mesh."""

    mesh: Mesh
    parts: list[Transformer]
    engine: SingleStage | Pipeline
    shards: list[Shard]
    gradients: Gradients
    optimizer: AdamW = field(init=False)

    def __post_init__(self) -> None:
        """An optimizer for its shards."""
        self.optimizer = AdamW(self.gradients, OPTIMIZER)

    @property
    def routers(self) -> dict[int, Router]:
        """By global layer number."""
        return {router.layer: router for part in self.parts for router in part.routers()}

    def backward(self, case: Case, step: int) -> tuple[float, float]:
        """Gradients of one step into the masters; (loss, square of the gradient norm)."""
        batches = case.batches(step)
        targets = sum((batch.targets >= 0).sum() for batch in batches)
        weight = 1 / (case.num_micro * case.model.num_layers)
        for router in self.routers.values():
            router.begin_step()
        loss = self.engine.forward_backward(share(batches, self.mesh), torch.as_tensor(targets), weight)
        self.gradients.collect()
        sums = torch.stack([loss / self.mesh.tp.size, self.gradients.square_sum()])
        loss_sum, squares = all_reduce_sum(sums, self.mesh.world).tolist()
        return loss_sum, squares

    @torch.no_grad()
    def forward(self, case: Case) -> float:
        """Sum of the losses of one more step's tokens, in the form that evaluation uses."""
        for part in self.parts:
            part.eval()
        loss_sum = self.engine.loss_sum(share(case.batches(STEPS), self.mesh)) / self.mesh.tp.size
        return all_reduce_sum(loss_sum, self.mesh.world).item()

    def update(self) -> None:
        """One optimizer step; gradients are gone after it."""
        self.optimizer.step()
        self.gradients.drop()
        for router in self.routers.values():
            router.end_step()


def build(
    case: Case, mesh: Mesh, *, dtype: torch.dtype = torch.float32, recompute: Recompute = Recompute.none
) -> Built:
    """The case's model on its own layout, or on one process."""
    cfg = case.parallel if mesh.world_size > 1 else ParallelConfig()
    parts = build_parts(case.model, cfg, mesh, row_tokens=case.row_tokens, router=case.router)
    options = {"dtype": dtype, "seed": case.seed, "recompute": recompute}
    shards, gradients = parallelize(parts, mesh, cfg, overlap_groups=case.overlap_groups, **options)
    engine: SingleStage | Pipeline
    if mesh.pp.size == 1:
        engine = SingleStage(parts[0], zero_stage=cfg.zero_stage)
    else:
        sizes = {"num_micro": case.num_micro, "micro_rows": case.micro_rows, "row_tokens": case.row_tokens}
        engine = Pipeline(parts, mesh, cfg.schedule, dtype=dtype, **sizes)
    return Built(mesh, parts, engine, shards, gradients)


def box_of(part: Shard) -> tuple[slice, ...]:
    """Where a part lies in its parameter."""
    return tuple(slice(a, a + n) for a, n in zip(part.offset, part.master.shape, strict=True))


class Reference(NamedTuple):
    """What one process finds in the steps of a case."""

    losses: list[float]
    squares: list[float]
    gradients: list[dict[str, Tensor]]
    load: dict[int, Tensor]
    router_losses: dict[int, Tensor]
    decisions: dict[int, list["Decided"]]
    dropped: int
    """Choices in all layers and steps."""
    last_sum: float
    """Sum of the losses after all steps, forward only."""
    gap: float
    """Smallest distance of a chosen router logit to the best that was not."""


class Decided(NamedTuple):
    """What a router decided in one call, for the tokens of one rank."""

    numbers: Tensor
    """[tokens] in the pool."""
    experts: Tensor
    """[tokens, top_k]."""
    kept: Tensor
    """[tokens, top_k]."""


def watch_decisions(built: Built) -> dict[int, list[Decided]]:
    """Fills while the model trains, by layer and in the order of the micro-batches."""
    found: dict[int, list[Decided]] = {layer: [] for layer in built.routers}

    def watch(router: Router, inputs: Any, routing: Routing) -> None:
        if router.training:
            numbers = router.pool.places(inputs[0]).numbers.flatten()
            replicas = torch.zeros_like(routing.experts) if routing.replicas is None else routing.replicas
            found[router.layer].append(Decided(numbers, routing.experts, replicas >= 0))

    for router in built.routers.values():
        router.register_forward_hook(watch)
    return found


def closest_tie(router: Router, x: Tensor, micro: Micro) -> Tensor:
    """Smallest distance of a chosen score to the best that was not, infinite if all experts are chosen."""
    wide = x.detach().to(router.gate.weight.dtype)
    if router.cfg.jitter:
        wide = wide * router._jitter(x, micro)
    scores = F.linear(wide, router.gate.weight.detach())
    if router.cfg.balancing is Balancing.bias:
        scores = scores.softmax(-1) + router.bias
    best = scores.topk(min(router.top_k + 1, scores.shape[-1]), -1).values
    if best.shape[-1] == router.top_k:
        return torch.tensor(math.inf)
    return (best[..., -2] - best[..., -1]).min()


def sharing_ranks(case: Case) -> list[int]:
    """For each token of the pool, which set of ranks shares the capacity that it counts against."""
    cfg, half = case.parallel, case.row_tokens // (2 * case.parallel.cp)
    found = [0] * (case.rows * case.row_tokens)
    for rank in range(case.dp * cfg.cp * cfg.tp):
        d, c, t = rank // (cfg.cp * cfg.tp), rank // cfg.tp % cfg.cp, rank % cfg.tp
        positions = list(range(case.row_tokens))
        if cfg.cp > 1:
            last = 2 * cfg.cp - 1 - c
            positions = positions[c * half : (c + 1) * half] + positions[last * half : (last + 1) * half]
        size = len(positions) // cfg.tp
        for row in range(d * case.micro_rows, (d + 1) * case.micro_rows):
            for position in positions[t * size : (t + 1) * size]:
                found[row * case.row_tokens + position] = rank // (case.pool_groups * cfg.ep * cfg.etp)
    return found


def drop_by_hand(case: Case) -> Callable[..., Admission]:
    """`decide_replicas` of one process that plays all ranks, one choice after the other."""
    sharing = sharing_ranks(case)

    def decide(
        experts: Tensor, cells: Tensor, keys: Tensor, pool: Any, *, num_experts: int, factor: float
    ) -> Admission:
        key_of = {
            token: int(key) for cell, key in zip(cells.tolist(), keys, strict=True) for token in range(*cell)
        }
        order = sorted(range(len(experts)), key=lambda token: (key_of[token], token))
        is_real = experts[:, 0] < num_experts
        wanted = Counter(sharing[token] for token in order if is_real[token])
        admitted: Counter[tuple[int, int]] = Counter()
        replicas = torch.full_like(experts, -1)
        for token in filter(lambda token: is_real[token], order):
            most = math.ceil(Fraction(str(factor)) * wanted[sharing[token]] * experts.shape[1] / num_experts)
            for slot, expert in enumerate(experts[token].tolist()):
                if admitted[sharing[token], expert] < most:
                    admitted[sharing[token], expert] += 1
                    replicas[token, slot] = 0
        every, dropped = (
            torch.bincount(part.flatten(), minlength=num_experts)
            for part in (experts[is_real], experts[is_real][replicas[is_real] < 0])
        )
        return Admission(replicas, every, dropped, every)

    return decide


def reference(case: Case, *, jolt: float = 0.0) -> Reference:
    """The case on one process; jolt: relative noise on its initial weights."""
    built = build(case, alone())
    generator = torch.Generator().manual_seed(0)
    for shard in built.shards if jolt else []:
        shard.master.mul_(1 + jolt * torch.randn(shard.shape, generator=generator))
    gaps: list[Tensor] = []

    def watch(router: Router, inputs: Any, routing: Routing) -> None:
        if router.training and router.cfg.force == "none":
            gaps.append(closest_tie(router, inputs[0], inputs[1]))

    for router in built.routers.values():
        router.register_forward_hook(watch)
    decisions = watch_decisions(built)
    losses, squares, gradients = [], [], []
    with mock.patch("model.router.decide_replicas", drop_by_hand(case)):
        for step in range(STEPS):
            loss, square = built.backward(case, step)
            losses.append(loss)
            squares.append(square)
            gradients.append({shard.name: shard.master.grad.clone() for shard in built.shards})
            built.update()
    routers = built.routers
    return Reference(
        losses,
        squares,
        gradients,
        {layer: router.load.clone() for layer, router in routers.items()},
        {layer: router.losses.clone() for layer, router in routers.items()},
        decisions,
        sum(int(router.dropped.sum()) for router in routers.values()),
        built.forward(case),
        torch.stack(gaps).min().item() if gaps else math.inf,
    )


def differences(case: Case, truth: Reference) -> list[str]:
    """What this rank of the case's layout finds other than one process did."""
    overlaps = case.overlap_groups > 1
    mesh = init_mesh(case.parallel, "cpu", pool_groups=case.pool_groups, overlaps=overlaps)
    built = build(case, mesh)
    decisions = watch_decisions(built)
    found = []

    def near(what: str, mine: float, theirs: float, tolerance: float) -> None:
        error = abs(mine - theirs) / max(abs(theirs), 1e-30)
        if not error < tolerance:
            found.append(f"{what} {mine:.9g}, one process has {theirs:.9g}: off by {error:.1e}")

    for step in range(STEPS):
        loss, squares = built.backward(case, step)
        near(f"step {step}: loss", loss, truth.losses[step], 1e-5)
        near(f"step {step}: gradient norm", math.sqrt(squares), math.sqrt(truth.squares[step]), 1e-5)
        full = truth.gradients[step]
        largest = max(grad.abs().max().item() for grad in full.values())
        for part in built.shards:
            theirs = full[part.name]
            if part.master.numel():
                error = (part.master.grad - theirs[box_of(part)]).abs().max().item()
                error /= max(theirs.abs().max().item(), 1e-3 * largest)
                if not error < 1e-4:
                    found.append(f"step {step}: gradient of {part.name} off by {error:.1e}")
        built.update()
    near("sum of the last losses", built.forward(case), truth.last_sum, 1e-5)
    for layer, router in built.routers.items():
        load = all_reduce_sum(router.load, mesh.stage)
        if not torch.equal(load, truth.load[layer]):
            found.append(f"load of layer {layer}: {load.tolist()} not {truth.load[layer].tolist()}")
        means = all_reduce_sum(router.losses, mesh.stage)
        for name, mine, theirs in zip(
            ("aux", "z", "entropy"), means, truth.router_losses[layer], strict=True
        ):
            near(f"{name} of layer {layer}:", mine.item(), theirs.item(), 1e-4)
        for call, (mine, whole) in enumerate(zip(decisions[layer], truth.decisions[layer], strict=True)):
            if not torch.equal(mine.experts, whole.experts[mine.numbers]):
                found.append(f"layer {layer}, micro-batch {call}: other experts")
            if not torch.equal(mine.kept, whole.kept[mine.numbers]):
                found.append(f"layer {layer}, micro-batch {call}: other choices dropped")
    return found


def settled(case: Case) -> tuple[Case, Reference]:
    """The case, with the first seed that leaves no near tie, and its truth."""
    truth = reference(case)
    return (case, truth) if truth.gap >= NEAR_TIE else settled(replace(case, seed=case.seed + 1))


class Outcome(NamedTuple):
    """What became of the cases of one world size."""

    failures: dict[str, list[str]]
    """Findings by case name."""
    seconds: dict[str, float]
    """Wall time by case name."""


def explain_failures(outcome: Outcome) -> str:
    """For people."""
    return "\n".join(f"{name}:\n  " + "\n  ".join(found[:12]) for name, found in outcome.failures.items())


def run_cases(world_size: int, names: Sequence[str], check: Callable[[int], list[str]]) -> Outcome:
    """check(i) on every rank for the i-th name, all in one set of processes, until one of them breaks."""
    broken = ""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            run_distributed(_work_through, world_size, names, check, folder)
        except Exception as error:
            broken = str(error).strip().splitlines()[-1]
        current = folder / "current"
        culprit = current.read_text() if current.exists() else names[0]
        reports = [path.read_text().splitlines() for path in sorted(folder.glob("rank-*.jsonl"))]
    failures: dict[str, list[str]] = {}
    seconds: dict[str, float] = {}
    for rank, lines in enumerate(reports):
        for name, findings, duration in map(json.loads, lines):
            if findings:
                failures.setdefault(name, []).extend(f"rank {rank}: {text}" for text in findings)
            seconds[name] = max(seconds.get(name, 0.0), duration)
    missing = [name for name in names if name not in seconds or (name == culprit and broken)]
    if missing:
        failures.setdefault(culprit, []).append(f"processes ended ({broken}); not run: {', '.join(missing)}")
    return Outcome(failures, seconds)


def _work_through(rank: int, names: Sequence[str], check: Callable[[int], list[str]], folder: Path) -> None:
    """Findings go to files: one rank's must not leave the others waiting in a collective."""
    share_groups()
    for number, name in enumerate(names):
        if rank == 0:
            (folder / "current").write_text(name)
        faulthandler.dump_traceback_later(HANGS_AFTER, exit=True)
        start, findings, error = time.monotonic(), [], None
        try:
            findings = check(number)
        except Exception as caught:
            error = caught
            findings = [traceback.format_exc()]
        with (folder / f"rank-{rank}.jsonl").open("a") as file:
            file.write(json.dumps([name, findings, time.monotonic() - start]) + "\n")
        if error is not None:
            raise error
        faulthandler.cancel_dump_traceback_later()
        gc.collect()
        dist.barrier()


def share_groups() -> None:
    """Let the meshes of one process reuse each other's process groups: making them takes long."""
    make = dist.new_subgroups_by_enumeration
    made: dict[str, Any] = {}

    def reuse(lines: list[list[int]], *, group_desc: str, **options: Any) -> Any:
        key = str((lines, options))
        if key not in made:
            made[key] = make(lines, group_desc=group_desc, **options)
        return made[key]

    dist.new_subgroups_by_enumeration = reuse
