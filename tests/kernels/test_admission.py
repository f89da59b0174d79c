"""The router's decision by kernels, against model/capacity.py's plain one, for ranks that a process plays."""

import random
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from kernels.admission import line_up_triton
from model.capacity import LocalPool, Places, decide_replicas, decide_replicas_triton, line_up, locate
from tests.kernels.harness import DEVICE


class PlayedPool(LocalPool):
    """One rank's pool; `tables` are all ranks', once they have all been asked for them."""

    def __init__(self, layout: "Layout", rank: int, tables: list[Tensor]) -> None:
        super().__init__()
        sharing = layout.groups * layout.group_size
        self.size, self.num_groups, self.group_size = layout.dp * layout.cp, layout.groups, layout.group_size
        self.rank, self.peers = rank % sharing, slice(rank - rank % sharing, rank - rank % sharing + sharing)
        self.tables = tables

    def gather(self, table: Tensor) -> Tensor:
        """[...] -> [ranks, ...]."""
        if len(self.tables) < self.size:
            self.tables.append(table)
            return table.expand(self.size, *table.shape).contiguous()
        return torch.stack(self.tables).to(table.device)


class Layout(NamedTuple):
    """dp x cp ranks with the rows of one pool; each has two pieces of its rows if cp > 1."""

    dp: int
    cp: int
    rows: int
    row_tokens: int
    groups: int
    """Of consecutive ranks, that share a capacity."""
    group_size: int


LAYOUTS = {
    "one rank": Layout(1, 1, 1, 130, 1, 1),
    "many rows": Layout(1, 1, 9, 8, 1, 1),
    "one token": Layout(1, 1, 1, 1, 1, 1),
    "groups": Layout(4, 1, 1, 24, 2, 2),
    "context parallel": Layout(1, 3, 2, 36, 3, 1),
    "more ranks than share": Layout(2, 3, 1, 24, 1, 3),
    "groups of two sets": Layout(4, 2, 1, 16, 2, 2),
    "five groups": Layout(5, 1, 1, 24, 5, 1),
}


def places_of(layout: Layout, rank: int) -> Places:
    """On the CPU."""
    d, c = divmod(rank, layout.cp)
    positions = torch.arange(layout.row_tokens)
    if layout.cp > 1:
        pieces = positions.chunk(2 * layout.cp)
        positions = torch.cat([pieces[c], pieces[2 * layout.cp - 1 - c]])
    rows = torch.arange(d * layout.rows, (d + 1) * layout.rows)
    return locate(rows, positions, layout.dp * layout.rows, layout.row_tokens)


def draw_offsets(rng: random.Random, layout: Layout) -> Tensor:
    """[rows, 3 + 1] of one to three documents a row."""
    tokens = layout.row_tokens
    cuts = [sorted(rng.choices(range(1, tokens + 1), k=2)) for _ in range(layout.rows)]
    return torch.tensor([[0, *row, tokens] for row in cuts], dtype=torch.int32)


def lined_up_by_kernel(places: Places, offsets: Tensor, start: int) -> tuple[Tensor, ...]:
    """On the CPU, wherever the kernel runs."""
    cells, keys = line_up_triton(
        places.rows.to(DEVICE), places.positions.to(DEVICE), places.split.to(DEVICE), offsets.to(DEVICE),
        num_rows=places.num_rows, row_tokens=places.row_tokens,
        start=start % (places.num_rows * places.row_tokens),
    )  # fmt: skip
    return cells.cpu(), keys.cpu()


def draw_experts(tokens: int, experts: int, top_k: int, *, seed: int, skew: float) -> Tensor:
    """[tokens, top_k] different experts, those from `seed` on more popular; the last eighth is padding."""
    generator = torch.Generator().manual_seed(seed)
    noise = -torch.log(-torch.log(torch.rand(tokens, experts, generator=generator, dtype=torch.float64)))
    found = (noise - skew * torch.log(torch.arange(1.0, experts + 1))).topk(top_k).indices
    found = (found + seed) % experts
    found[tokens - tokens // 8 :] = experts
    return found


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("seed", range(4))
def test_lines_up_as_the_plain_form(name: str, seed: int) -> None:
    rng, layout = random.Random(seed), LAYOUTS[name]
    start = rng.choice([rng.randrange(200), 2**61 + rng.randrange(200)])
    for rank in range(layout.dp * layout.cp):
        places, offsets = places_of(layout, rank), draw_offsets(rng, layout)
        expected = line_up(places, offsets, start)
        for mine, theirs in zip(lined_up_by_kernel(places, offsets, start), expected, strict=True):
            assert torch.equal(mine, theirs)
        tokens = layout.rows * len(places.positions)
        held = torch.cat([torch.arange(*cell) for cell in expected[0].tolist()])
        assert torch.equal(held.sort().values, torch.arange(tokens))


@pytest.mark.parametrize(
    ("name", "experts", "top_k", "factor"),
    [
        *((name, 5, 2, 1.0) for name in LAYOUTS),
        ("one rank", 1, 1, 0.7),
        ("one rank", 33, 8, 1.25),
        ("groups of two sets", 8, 1, 0.4),
        ("five groups", 6, 1, 1.0),
    ],
)
def test_decides_as_the_plain_form(name: str, experts: int, top_k: int, factor: float) -> None:
    compare_decisions(name, experts, top_k, factor)


def test_decides_in_several_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """More blocks and cells than a program takes at a time."""
    monkeypatch.setattr("kernels.admission.SCAN_BLOCKS", 2)
    monkeypatch.setattr("kernels.admission.CELL_BLOCK", 4)
    compare_decisions("one rank", 5, 4, 1.0)
    compare_decisions("five groups", 5, 2, 1.0)
    compare_decisions("context parallel", 5, 2, 1.0)


def compare_decisions(name: str, experts: int, top_k: int, factor: float) -> None:
    """Replicas of all choices, and all counts, on every rank."""
    layout, rng = LAYOUTS[name], random.Random(experts)
    ranks, wants = layout.dp * layout.cp, []
    for rank in range(ranks):
        cells, keys = line_up(places_of(layout, rank), draw_offsets(rng, layout), 23)
        tokens = layout.rows * layout.row_tokens // layout.cp
        wants.append((draw_experts(tokens, experts, top_k, seed=rank, skew=1.0), cells, keys))
    given = {"num_experts": experts, "factor": factor}
    for decide, device in ((decide_replicas, torch.device("cpu")), (decide_replicas_triton, DEVICE)):
        tables: list[Tensor] = []
        decided = []
        for rank in [*range(ranks), *range(ranks)]:  # once to fill the tables
            pool = PlayedPool(layout, rank, tables)
            decided.append(decide(*(x.to(device) for x in wants[rank]), pool, **given))
        found = decided[ranks:]
        if decide is decide_replicas:
            expected = found
    assert any(admission.dropped.any() for admission in expected) == (name != "one token")
    for mine, theirs in zip(found, expected, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            assert torch.equal(a.cpu(), b)
    if layout.groups > 1 and experts == 5:
        assert len(torch.cat([admission.replicas.flatten() for admission in expected]).unique()) > 2
