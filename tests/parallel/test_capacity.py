"""The global router on real process groups: what is dropped, where the rest is computed, and when."""

import itertools
import math
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from model.capacity import LocalPool, capacity, decide_replicas, line_up, spread
from model.config import ModelConfig, RouterConfig, Scope
from model.hashing import draw
from model.router import Micro, Router, Routing
from parallel.config import ParallelConfig
from parallel.expert import AllToAllDispatcher
from parallel.mesh import init_mesh
from parallel.overlap import interleave
from parallel.pool import StagePool
from tests.support.dist import run_distributed
from tests.support.layout_cases import (
    Case,
    differences,
    explain_failures,
    reference,
    run_cases,
    settled,
    share_groups,
)


def random_offsets(rng: random.Random, rows: int, tokens: int) -> Tensor:
    """[rows, 4 + 1] offsets of one to four documents."""
    cuts = [sorted(rng.choices(range(1, tokens + 1), k=3)) for _ in range(rows)]
    return torch.tensor([[0, *row, tokens] for row in cuts], dtype=torch.int32)


def zipf(generator: torch.Generator, tokens: int, experts: int, top_k: int, alpha: float) -> Tensor:
    """[tokens, top_k] distinct experts, the first ones more popular."""
    noise = -torch.log(-torch.log(torch.rand(tokens, experts, generator=generator, dtype=torch.float64)))
    return (noise - alpha * torch.log(torch.arange(1.0, experts + 1))).topk(top_k).indices


# Layouts that share pools of 4 rows: (world, cp, tp, ep, etp).
LAYOUTS = {
    2: [(1, 1, 1, 1), (2, 1, 1, 1), (1, 2, 1, 1), (1, 1, 2, 1), (1, 2, 1, 2)],
    4: [(1, 1, 1, 1), (2, 2, 2, 1), (1, 1, 2, 1), (2, 1, 1, 2), (1, 4, 2, 2), (4, 1, 4, 1)],
    6: [(3, 1, 2, 1), (3, 2, 2, 3), (3, 2, 1, 2), (3, 1, 1, 1)],
    8: [(2, 2, 2, 1), (2, 1, 4, 1), (1, 2, 2, 2), (2, 2, 1, 1), (4, 2, 2, 2)],
}
TOKENS, ROWS, EXPERTS = 48, 4, 8


class Drawn(NamedTuple):
    """A pool and what its tokens want."""

    experts: Tensor
    """[tokens, top_k]."""
    offsets: Tensor
    """[rows, documents + 1]."""
    place: int
    """Where its order may begin."""
    factor: float
    """Capacity."""

    @property
    def limit(self) -> int:
        """Choices that an expert admits."""
        return math.ceil(Fraction(str(self.factor)) * self.experts.numel() / EXPERTS)


def draw_pool(seed: int) -> Drawn:
    rng = random.Random(seed)
    factor, alpha = rng.choice([0.4, 0.9, 1.0, 1.3]), rng.choice([0.0, 0.5, 1.0, 3.0])
    top_k, offsets = rng.randint(1, 3), random_offsets(rng, ROWS, TOKENS)
    experts = zipf(torch.Generator().manual_seed(seed), ROWS * TOKENS, EXPERTS, top_k, alpha)
    return Drawn(experts, offsets, 7919 * seed, factor)


def decide_on(layout: tuple[int, ...], world: int, drawn: Drawn) -> Tensor:
    """[tokens, top_k] replicas of the whole pool, decided and checked by the ranks of a layout."""
    cp, tp, ep, etp = layout
    cfg = ParallelConfig(cp=cp, tp=tp, ep=ep, etp=etp)
    edp = cfg.edp(world)
    mesh = init_mesh(cfg, "cpu", pool_groups=edp)
    pool = StagePool(mesh)
    mine = pool.places(torch.empty(ROWS // mesh.dp.size, TOKENS // (cp * tp)))
    cells, keys = line_up(mine, drawn.offsets.chunk(mesh.dp.size)[mesh.dp.rank], drawn.place)
    numbers = mine.numbers.flatten()
    experts, common = drawn.experts[numbers], {"num_experts": EXPERTS, "factor": drawn.factor}
    replicas, _, _, pooled = decide_replicas(experts, cells, keys, pool, **common)
    assert torch.equal(pooled, torch.bincount(drawn.experts.flatten(), minlength=EXPERTS))
    found: list[Any] = [None] * world
    dist.all_gather_object(found, (numbers, replicas, received_rows(mesh, experts, replicas)))
    whole = torch.full_like(drawn.experts, -9)
    for where, part, _ in found:
        whole[where] = part
    check(drawn, whole, [rows for _, _, rows in found], cfg, edp)
    return whole


def received_rows(mesh: Any, experts: Tensor, replicas: Tensor) -> Tensor:
    """[experts/ep]: rows that reach this rank's experts, over all groups of tokens."""
    dispatcher = AllToAllDispatcher(EXPERTS, mesh, 2)
    counted = torch.zeros(EXPERTS // mesh.ep.size, dtype=torch.int64)

    def count(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
        counted.add_(ends.long().diff(prepend=torch.zeros(1, dtype=torch.int64)))
        return x

    if mesh.exchange.size * mesh.etp.size > 1:
        weights = torch.ones(experts.shape)
        y = dispatcher(torch.ones(len(experts), 3), Routing(weights, experts, replicas), count)
        # Each etp rank adds its part: here all of them the same.
        assert torch.equal(y[:, 0], mesh.etp.size * (replicas >= 0).sum(-1).float())
    return counted


def check(drawn: Drawn, replicas: Tensor, rows: list[Tensor], cfg: ParallelConfig, edp: int) -> None:
    """What the design promises of any decision."""
    experts = drawn.experts
    demand = torch.bincount(experts.flatten(), minlength=EXPERTS)
    dropped = torch.bincount(experts[replicas < 0], minlength=EXPERTS)
    assert torch.equal(dropped, (demand - drawn.limit).clamp(min=0))
    assert replicas.min() >= -1
    assert replicas.max() < edp
    for group in range(edp):
        held = torch.bincount(experts[replicas == group], minlength=EXPERTS)
        assert held.max() <= math.ceil(drawn.limit / edp)
        for place in range(cfg.ep * cfg.etp if cfg.ep * cfg.etp * edp > 1 else 0):
            counted, first = rows[group * cfg.ep * cfg.etp + place], place // cfg.etp * (EXPERTS // cfg.ep)
            assert torch.equal(counted, held[first : first + len(counted)])


def same_drops_everywhere(rank: int, world: int) -> None:
    share_groups()
    pool = LocalPool()
    for seed in range(12):
        drawn = draw_pool(seed)
        cells, keys = line_up(pool.places(torch.empty(ROWS, TOKENS)), drawn.offsets, drawn.place)
        common = {"num_experts": EXPERTS, "factor": drawn.factor}
        alone = decide_replicas(drawn.experts, cells, keys, pool, **common).replicas
        for layout in LAYOUTS[world]:
            assert torch.equal(alone >= 0, decide_on(layout, world, drawn) >= 0), (layout, seed)


@pytest.mark.parametrize("world", sorted(LAYOUTS))
def test_drops_are_the_lower_bound_and_the_same_on_every_layout(world: int) -> None:
    run_distributed(same_drops_everywhere, world, world)


def test_admission_order_by_hand() -> None:
    """From the first document start at or after the drawn place, round the pool, a document never cut."""
    pool, rng = LocalPool(), random.Random(0)
    for _ in range(300):
        rows, tokens, experts = rng.randint(1, 3), rng.randint(1, 8), rng.randint(1, 5)
        top_k, start = rng.randint(1, min(2, experts)), rng.randrange(1000)
        factor = rng.choice([0.1, 0.5, 0.9, 1.0, 1.5])
        offsets, total = random_offsets(rng, rows, tokens), rows * tokens
        chosen = torch.stack([torch.randperm(experts)[:top_k] for _ in range(total)])
        cells, keys = line_up(pool.places(torch.empty(rows, tokens)), offsets, start)
        replicas = decide_replicas(chosen, cells, keys, pool, num_experts=experts, factor=factor).replicas
        starts = sorted({r * tokens + int(o) for r in range(rows) for o in offsets[r] if o < tokens})
        first = next((s for s in starts if s >= start % total), 0)
        limit = math.ceil(Fraction(str(factor)) * chosen.numel() / experts)
        admitted: Counter[int] = Counter()
        expected = torch.full_like(chosen, -1)
        for step in range(total):
            for slot, expert in enumerate(chosen[(first + step) % total].tolist()):
                if admitted[expert] < limit:
                    expected[(first + step) % total, slot] = 0
                    admitted[expert] += 1
        assert torch.equal(replicas, expected)


def test_capacity_is_exact() -> None:
    """0.1 * 30 is 3.0000000000000004 in floating point: a fourth choice would be admitted."""
    assert capacity(0.1, 30, 1) == 3
    assert capacity(1.25, 32, 8) == 5
    assert capacity(1e-6, 8, 8) == 1
    assert capacity(0.1, torch.tensor(30), 1).item() == 3
    assert capacity(1.25, torch.tensor(33), 8).item() == 6


def test_surplus_goes_to_the_nearest_group_with_room() -> None:
    flow = spread(torch.tensor([[9], [4], [1], [0]]), 4)  # [from, distance, expert]
    assert flow[0, :, 0].tolist() == [4, 0, 3, 2]
    assert flow[1:, 0, 0].tolist() == [4, 1, 0]
    assert not flow[1:, 1:].any()
    wrapped = spread(torch.tensor([[0], [0], [6]]), 2)
    assert wrapped[2, :, 0].tolist() == [2, 2, 2]


def extreme(layout: ParallelConfig, dp: int, *, experts: int = 4, top_k: int = 2, **router: Any) -> Case:
    model = ModelConfig(
        num_layers=2, hidden_size=8, num_heads=4, num_kv_heads=2, head_dim=4, rotary_dim=2, vocab_size=16,
        num_experts=experts, experts_per_token=top_k, expert_ffn_size=8, softmax_every=2,
    )  # fmt: skip
    cfg = RouterConfig(aux_loss_coefficient=0.1, **{"capacity_factor": 1.0, **router})
    sizes = {"row_tokens": 8, "micro_rows": 4 // dp, "num_micro": 2, "overlap_groups": 3}
    return Case(parallel=layout, dp=dp, model=model, router=cfg, **sizes)


EXTREMES = {
    "all to one expert, others idle": extreme(ParallelConfig(ep=2), 4, top_k=1, force="skewed:60"),
    "all to one expert, local": extreme(
        ParallelConfig(ep=2), 4, top_k=1, force="skewed:60", scope=Scope["local"]
    ),
    "capacity below one token": extreme(ParallelConfig(ep=2), 4, capacity_factor=1e-6),
    "no expert parallelism": extreme(ParallelConfig(), 4, force="skewed:2"),
    "edp 1": extreme(ParallelConfig(ep=4), 4, force="skewed:2"),
    "edp 1, etp": extreme(ParallelConfig(ep=2, etp=2, tp=2), 2, force="skewed:2"),
    "ep = experts": extreme(ParallelConfig(ep=4, cp=2), 2, capacity_factor=0.5),
    "top-k = experts": extreme(ParallelConfig(ep=2, tp=2), 2, top_k=4, capacity_factor=0.4),
    "one expert": extreme(ParallelConfig(), 4, experts=1, top_k=1, capacity_factor=0.3),
    "one token a rank": replace(
        extreme(ParallelConfig(ep=2), 4, capacity_factor=0.7), row_tokens=1, overlap_groups=4
    ),
}


def test_extremes() -> None:
    """Losses, gradients, decisions and drops of three steps against one process."""
    drawn = {name: settled(case) for name, case in EXTREMES.items()}
    for case, _ in drawn.values():
        case.run_config().validate(case.world_size)
    assert all(truth.dropped for _, truth in drawn.values())
    cases = list(drawn.values())
    outcome = run_cases(4, list(drawn), lambda number: differences(*cases[number]))
    assert not outcome.failures, explain_failures(outcome)


def test_one_token_in_all() -> None:
    case = replace(
        extreme(ParallelConfig(), 1, capacity_factor=1e-3), row_tokens=1, micro_rows=1, num_micro=1
    )
    truth = reference(case)
    assert truth.dropped == 0
    assert torch.isfinite(torch.tensor(truth.losses)).all()


def drop_rates_by_quarter(is_rotating: bool) -> tuple[Tensor, Tensor]:
    """Mean and standard error of the share of dropped choices in each quarter of the rows, 200 steps."""
    model = ModelConfig(
        num_layers=1, hidden_size=4, num_heads=1, num_kv_heads=1, head_dim=4, rotary_dim=2, vocab_size=8,
        num_experts=8, expert_ffn_size=4,
    )  # fmt: skip
    router = Router(model, RouterConfig(capacity_factor=1.0, force="skewed:1"), layer=0)
    rng, rates = random.Random(0), []
    for step in range(200):
        cuts = [sorted(rng.sample(range(1, 64), 12)) for _ in range(4)]
        offsets = torch.tensor([[0, *row, 64] for row in cuts], dtype=torch.int32)
        micro = Micro(offsets, step, 1.0)
        with mock.patch("model.router.draw", wraps_draw(is_rotating)):
            routing = router(torch.randn(4, 64, 4), micro)
        assert routing.replicas is not None
        dropped = (routing.replicas < 0).double().view(4, 4, 16, 2)
        rates.append(dropped.mean((0, 2, 3)))
    by_step = torch.stack(rates)
    return by_step.mean(0), by_step.std(0) / len(rates) ** 0.5


def wraps_draw(is_rotating: bool) -> Callable[..., int]:
    def drawn(*parts: int) -> int:
        is_place = len(parts) == 3  # the other draws have a purpose as a fourth part
        return draw(*parts) if is_rotating or not is_place else 0

    return drawn


def test_no_place_in_a_row_is_always_last() -> None:
    rates, errors = drop_rates_by_quarter(is_rotating=True)
    assert rates.mean() > 0.1
    assert ((rates - rates.mean()).abs() < 4 * errors).all(), (rates, errors)
    still, errors = drop_rates_by_quarter(is_rotating=False)
    assert not ((still - still.mean()).abs() < 4 * errors).all(), "the test would not notice"


class _Mark(torch.autograd.Function):
    """Notes when backward passes here."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, note: Callable[[], None]) -> Tensor:
        ctx.note = note
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.note()
        return grads[0], None


def check_order(rank: int, etp: int) -> None:
    """Events: P/W post and wait, d/c on the process group of dispatch or combine, E experts."""
    mesh = init_mesh(ParallelConfig(ep=2, etp=etp), "cpu", overlaps=True)
    assert mesh.exchange.group is not mesh.exchange_back.group
    events: list[str] = []
    names = {mesh.exchange.group: "d", mesh.exchange_back.group: "c"}
    names |= {mesh.etp.group: "g", mesh.etp_back.group: "s"} if etp > 1 else {}
    exchange = dist.all_to_all_single

    def posted(out: Tensor, x: Tensor, *args: Any, group: Any, async_op: bool = False) -> Any:
        work = exchange(out, x, *args, group=group, async_op=async_op)
        if not async_op:
            return work
        events.append("P" + names[group])

        def wait() -> None:
            events.append("W" + names[group])
            work.wait()

        return SimpleNamespace(wait=wait)

    def compute(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
        events.append("E")
        return _Mark.apply(x * weights[:, None], lambda: events.append("E"))

    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(12, 4, generator=generator, requires_grad=True)
    weights = torch.rand(12, 2, generator=generator, requires_grad=True)
    routing = Routing(weights, zipf(generator, 12, 4, 2, 0.0), None)
    with mock.patch.object(dist, "all_to_all_single", posted):
        y = AllToAllDispatcher(4, mesh, 3)(x, routing, compute)
        forward, events[:] = by_transfer(events), []
        y.sum().backward()
        backward = by_transfer(events)
    if etp == 1:
        assert forward == [
            "Pd",
            "Pd",
            "Wd",
            "E",
            "Pc",
            "Pd",
            "Wd",
            "E",
            "Pc",
            "Wc",
            "Wd",
            "E",
            "Pc",
            "Wc",
            "Wc",
        ]
        assert backward == [
            "Pc",
            "Pc",
            "Wc",
            "E",
            "Pd",
            "Pc",
            "Wc",
            "E",
            "Pd",
            "Wd",
            "Wc",
            "E",
            "Pd",
            "Wd",
            "Wd",
        ]
        return
    for steps, there, back in ((forward, "dg", "sc"), (backward, "cs", "gd")):
        experts = [i for i, step in enumerate(steps) if step == "E"]
        for first in there:  # both ways in are posted for the next group before this one computes
            posts = [i for i, step in enumerate(steps) if step == "P" + first]
            assert all(posts[group + 1] < experts[group] for group in range(2)), steps
        for last in back:  # and the ways out are waited for after the next one computed
            waits = [i for i, step in enumerate(steps) if step == "W" + last]
            assert all(waits[group] > experts[group + 1] for group in range(2)), steps


def by_transfer(events: list[str]) -> list[str]:
    """On the way to the experts a transfer is two tensors, rows and weights: two equal events in a row."""
    kept: list[str] = []
    runs = [(event, len(list(run))) for event, run in itertools.groupby(events)]
    for event, length in runs:
        kept += [event] * (length // 2 if event[-1] in "dg" else length)
    return kept


@pytest.mark.parametrize("etp", [1, 2])
def test_transfers_overlap_experts_forward_and_backward(etp: int) -> None:
    run_distributed(check_order, 2 * etp, etp)


def test_interleave_advances_the_latest_first() -> None:
    seen = []

    def walk(name: str) -> Any:
        for step in range(3):
            seen.append(f"{name}{step}")
            if step < 2:
                yield
        return name

    assert interleave([walk(name) for name in "abc"]) == ["a", "b", "c"]
    assert seen == ["a0", "b0", "a1", "c0", "b1", "a2", "c1", "b2", "c2"]
