"""What the router's scope costs and saves on skewed loads: all ranks of a pool, simulated in one process.

Every decision is that of `model.capacity.decide_replicas`, made for each rank; nothing is estimated.
"""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from model.capacity import PIECES, capacity, decide_replicas, line_up
from model.config import ModelConfig, RouterConfig, require_divisor
from model.hashing import draw
from model.router import Micro, Router
from parallel.collectives import Axis
from parallel.mesh import one_process
from parallel.pool import StagePool

COLUMNS = (
    "skew", "dropped %\nlocal", "dropped %\nglobal", "level\ndropless", "level\nlocal", "level\nglobal",
    "moved\n%", "moved\nMiB a rank",
)  # fmt: skip
SAME, OWN = "Same skew everywhere", "Each EP group has its own favourite experts"


@dataclass(frozen=True, kw_only=True)
class PoolSettings:
    """Sizes of the simulated pool."""

    skews: tuple[float, ...]
    """Exponents of Zipf's law."""
    capacity_factor: float
    """Buffer relative to an equal share."""
    edp: int
    """EP groups, that is, replicas of each expert."""
    ep: int
    """Ranks of an EP group."""
    experts: int
    """Of the layer."""
    top_k: int
    """Choices of a token."""
    tokens: int
    """Of an EP group and micro-batch."""
    draws: int
    """Random micro-batches."""
    hidden: int
    """Width of a moved row."""

    def __post_init__(self) -> None:
        """Check each value, then what must fit together."""
        for name in ("edp", "ep", "experts", "top_k", "tokens", "draws", "hidden"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"--{name.replace('_', '-')}={value} must be at least 1")
        if any(not 0 <= skew < math.inf for skew in self.skews):
            raise ValueError(f"--skews={','.join(map(str, self.skews))} must be numbers >= 0")
        if not 0 < self.capacity_factor < math.inf:
            raise ValueError(f"--capacity-factor={self.capacity_factor} must be above 0 and finite")
        if self.top_k > self.experts:
            raise ValueError(f"--top-k={self.top_k} must be <= --experts={self.experts}")
        for name in ("experts", "tokens"):
            require_divisor("--ep", self.ep, f"--{name}", getattr(self, name), most=64)

    @property
    def ranks(self) -> int:
        """Of the pool."""
        return self.edp * self.ep

    @property
    def choices(self) -> int:
        """Of the pool."""
        return self.edp * self.tokens * self.top_k

    @property
    def limit(self) -> int:
        """Choices that an expert admits of an EP group under scope local."""
        return capacity(self.capacity_factor, self.tokens * self.top_k, self.experts)

    @property
    def pool_limit(self) -> int:
        """Choices that an expert admits of the pool under scope global: rounded up once, not once a group."""
        return capacity(self.capacity_factor, self.choices, self.experts)

    @property
    def is_rounded(self) -> bool:
        """Whether rounding gives scope local more total buffer than scope global takes."""
        return self.pool_limit != self.edp * self.limit

    @property
    def row_bytes(self) -> int:
        """Of a choice on its way: hidden state in bf16, gate weight in fp32."""
        return 2 * self.hidden + 4

    @property
    def gather_bytes(self) -> int:
        """Counts of all ranks that each of them receives before dispatch: int64 by cell, with its key."""
        return self.ranks * 2 * PIECES * (self.experts + 1) * 8  # cells: of a row and of the tail


class SkewFigures(NamedTuple):
    """A line of a table."""

    skew: float
    figures: dict[str, tuple[float, float, float]]
    """Mean, lowest and highest of the draws, as fractions of the choices, ratios, or bytes a rank."""


class SimulatedPool(StagePool):
    """One rank's pool in a process that takes the part of all ranks in turn.

    In the first round over the ranks it collects their tables; what is decided then is void.
    """

    def __init__(self, settings: PoolSettings, rank: int, num_groups: int, tables: list[Tensor]) -> None:
        every_rank = tuple(range(settings.ranks))
        mesh = replace(
            one_process(torch.device("cpu")), stage=Axis("stage", rank, every_rank),
            dp=Axis("dp", rank, every_rank), ep=Axis("ep", rank % settings.ep, every_rank[: settings.ep]),
            exchange=Axis("exchange", 0, every_rank[: num_groups * settings.ep]),
        )  # fmt: skip
        super().__init__(mesh)
        self.tables = tables

    def gather(self, table: Tensor) -> Tensor:
        """[...] -> [ranks, ...]: from the list. no gradient."""
        if len(self.tables) < self.size:
            self.tables.append(table)
            return table.expand(self.size, *table.shape)
        return torch.stack(self.tables)


def one_layer(experts: int, top_k: int, *, hidden: int, ffn: int) -> ModelConfig:
    """A model of which only the mixture of experts matters."""
    return ModelConfig(
        num_layers=1, hidden_size=hidden, num_heads=1, num_kv_heads=1, head_dim=2, rotary_dim=2, vocab_size=1,
        num_experts=experts, experts_per_token=top_k, expert_ffn_size=ffn,
    )  # fmt: skip


def draw_choices(settings: PoolSettings, skew: float, number: int) -> Tensor:
    """[ranks, tokens/ep, top_k] as the router draws them under force=skewed:SKEW in micro-batch `number`.

    Expert 0 is everybody's favourite; other skews have the same noise.
    """
    s = settings
    cfg = one_layer(s.experts, s.top_k, hidden=1, ffn=1)
    router = Router(cfg, RouterConfig(force=f"skewed:{skew}"), 0).eval()
    x = torch.zeros(s.ranks, s.tokens // s.ep, 1)
    with torch.no_grad():
        experts = router(x, Micro(torch.empty(0), number, 1.0)).experts
    return experts.view(s.ranks, -1, s.top_k)


def favourites(settings: PoolSettings, number: int) -> dict[str, Tensor]:
    """Of each kind of table: [edp, experts], the experts of each EP group by popularity."""
    generator = torch.Generator().manual_seed(number)
    orders = [torch.randperm(settings.experts, generator=generator) for _ in range(settings.edp)]
    return {SAME: torch.stack(orders[:1] * settings.edp), OWN: torch.stack(orders)}


def decide(settings: PoolSettings, experts: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """[ranks, tokens/ep, top_k] choices -> EP group of each, -1 where dropped, under local and global."""
    s, tables = settings, list[Tensor]()
    offsets = torch.tensor([[0, experts.shape[1]]])
    start = draw(0, number, 0)

    def simulate(num_groups: int) -> Tensor:
        decided = []
        for rank, chosen in enumerate(experts):
            pool = SimulatedPool(s, rank, num_groups, tables)
            cells, keys = line_up(pool.places(chosen[None]), offsets, start)
            replicas, *_ = decide_replicas(
                chosen, cells, keys, pool, num_experts=s.experts, factor=s.capacity_factor
            )
            first_group = pool.peers.start // s.ep
            decided.append(torch.where(replicas >= 0, replicas + first_group, -1))
        return torch.stack(decided)

    simulate(1)
    assert torch.stack(tables).nbytes == s.gather_bytes
    return simulate(1), simulate(s.edp)


def measure(settings: PoolSettings, experts: Tensor, number: int) -> dict[str, float]:
    """The figures of one micro-batch.

    Raises:
        AssertionError: global drops more than the lower bound, or, with as much buffer, than local.
    """
    s = settings
    own = (torch.arange(s.ranks) // s.ep)[:, None, None].expand_as(experts)
    decisions = dict(zip(("local", "global"), decide(s, experts, number), strict=True))
    demand = experts.flatten().bincount(minlength=s.experts)
    bound, with_equal_buffer = (
        int((demand - limit).clamp(min=0).sum()) for limit in (s.pool_limit, s.edp * s.limit)
    )
    drops = {name: int((groups < 0).sum()) for name, groups in decisions.items()}
    assert drops["global"] == bound and with_equal_buffer <= drops["local"]
    moved = int(((decisions["global"] >= 0) & (decisions["global"] != own)).sum())
    levels = {f"{name}_level": _level(s, experts, groups) for name, groups in decisions.items()}
    return {
        **{f"{name}_dropped": count / s.choices for name, count in drops.items()},
        "bound": bound / s.choices,
        "dropless_level": _level(s, experts, own),
        **levels,
        "moved": moved / s.choices,
        "moved_bytes": moved * s.row_bytes / s.ranks,
    }


def _level(settings: PoolSettings, experts: Tensor, groups: Tensor) -> float:
    """Rows of the fullest EP rank over the mean."""
    s, is_kept = settings, groups >= 0
    rows = (groups * s.experts + experts)[is_kept].bincount(minlength=s.edp * s.experts)
    by_rank = rows.view(s.ranks, s.experts // s.ep).sum(1)
    return float(by_rank.max() / by_rank.double().mean())


def count_drops(settings: PoolSettings) -> dict[str, list[SkewFigures]]:
    """Both kinds of table: a row for each skew."""
    rows: dict[str, list[SkewFigures]] = {SAME: [], OWN: []}
    group = (torch.arange(settings.ranks) // settings.ep)[:, None, None]
    for skew in settings.skews:
        draws: dict[str, list[dict[str, float]]] = {SAME: [], OWN: []}
        for number in range(settings.draws):
            popularity = draw_choices(settings, skew, number)
            for kind, order in favourites(settings, number).items():
                draws[kind].append(measure(settings, order[group, popularity], number))
        for kind, figures in draws.items():
            columns = {key: [one[key] for one in figures] for key in figures[0]}
            spread = {key: (sum(v) / len(v), min(v), max(v)) for key, v in columns.items()}
            rows[kind].append(SkewFigures(skew, spread))
    return rows
