"""The router's decision by kernels, against model/capacity.py's plain one, for ranks that a process plays."""

import random
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from kernels.admission import (
    Admitted,
    Sharing,
    _admit_kernel,
    _order_kernel,
    admit_choices,
    line_up_triton,
    order_cells,
)
from model.capacity import (
    LocalPool,
    Places,
    admit,
    decide_replicas,
    decide_replicas_triton,
    line_up,
    locate,
    spread,
)
from tests.support.kernel_checks import DEVICE


class PlayedPool(LocalPool):
    """One rank's pool; `tables` are all ranks'."""

    def __init__(self, layout: "Layout", rank: int, tables: Tensor) -> None:
        super().__init__()
        sharing = layout.groups * layout.group_size
        self.size, self.num_groups, self.group_size = layout.dp * layout.cp, layout.groups, layout.group_size
        self.rank, self.peers = rank % sharing, slice(rank - rank % sharing, rank - rank % sharing + sharing)
        self.tables, self.table = tables, tables[rank]

    def gather(self, table: Tensor) -> Tensor:
        """[...] -> [ranks, ...]."""
        assert torch.equal(table.cpu(), self.table)
        return self.tables.to(table.device)


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
    compare_decisions(LAYOUTS[name], experts, top_k, factor)


def test_decides_in_several_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """More blocks and cells than a program takes at a time."""
    monkeypatch.setattr("kernels.admission.SCAN_BLOCKS", 2)
    monkeypatch.setattr("kernels.admission.CELL_BLOCK", 4)
    compare_decisions(LAYOUTS["one rank"], 5, 4, 1.0)
    compare_decisions(LAYOUTS["five groups"], 5, 2, 1.0)
    compare_decisions(LAYOUTS["context parallel"], 5, 2, 1.0)


def compare_decisions(
    layout: Layout, experts: int, top_k: int, factor: float, *, num_ranks: int | None = None
) -> None:
    """Replicas of all choices, and all counts, on every rank or on so many of them."""
    rng, wants, tables = random.Random(experts), [], []
    ranks = range(layout.dp * layout.cp)
    for rank in ranks:
        cells, keys = line_up(places_of(layout, rank), draw_offsets(rng, layout), 23)
        tokens = layout.rows * layout.row_tokens // layout.cp
        chosen = draw_experts(tokens, experts, top_k, seed=rank, skew=1.0)
        wants.append((chosen, cells, keys))
        held = [chosen[slice(*cell)].flatten().bincount(minlength=experts + 1) for cell in cells.tolist()]
        tables.append(torch.cat([keys[:, None], torch.stack(held)[:, :experts]], 1))
    pools = [PlayedPool(layout, rank, torch.stack(tables)) for rank in ranks]
    given = {"num_experts": experts, "factor": factor}
    expected = [decide_replicas(*wants[rank], pools[rank], **given) for rank in ranks]
    for rank in ranks if num_ranks is None else rng.sample(ranks, min(num_ranks, len(ranks))):
        found = decide_replicas_triton(*(x.to(DEVICE) for x in wants[rank]), pools[rank], **given)
        for mine, theirs in zip(found, expected[rank], strict=True):
            assert torch.equal(mine.cpu(), theirs), rank
    if layout.row_tokens == 1:
        return
    assert any(admission.dropped.any() for admission in expected)
    if layout.groups > 1 and experts == 5:
        assert len(torch.cat([admission.replicas.flatten() for admission in expected]).unique()) > 2


POOLS = {
    "1 rank": Layout(1, 1, 9, 8, 1, 1),
    "2 ranks, one token each": Layout(2, 1, 1, 1, 2, 1),
    "2 ranks": Layout(2, 1, 3, 10, 2, 1),
    "3 ranks": Layout(1, 3, 2, 36, 3, 1),
    "8 ranks": Layout(2, 4, 3, 24, 4, 2),
    "16 ranks, 288 cells": Layout(16, 1, 8, 7, 4, 4),
    "16 ranks of one group": Layout(16, 1, 8, 7, 1, 16),
    "44 ranks, two sets of 264 cells": Layout(44, 1, 5, 9, 11, 2),
    "64 ranks, 384 cells": Layout(32, 2, 2, 12, 16, 4),
}


@pytest.mark.parametrize("compared_cells", [0, 10**6])
@pytest.mark.parametrize(
    ("name", "experts", "top_k", "factor"),
    [
        ("1 rank", 6, 3, 0.6),
        ("2 ranks, one token each", 5, 2, 1.0),
        ("2 ranks", 1, 1, 0.7),
        ("3 ranks", 7, 3, 1.0),
        ("8 ranks", 17, 1, 1.25),
        ("16 ranks, 288 cells", 3, 2, 0.9),
        ("16 ranks of one group", 3, 1, 0.5),
        ("44 ranks, two sets of 264 cells", 2, 1, 0.7),
        ("64 ranks, 384 cells", 5, 2, 1.0),
    ],
)
def test_decides_in_pools_of_all_sizes(
    name: str, experts: int, top_k: int, factor: float, compared_cells: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In both forms of the decision, whichever the pool's size would choose."""
    monkeypatch.setattr("kernels.admission.COMPARED_CELLS", compared_cells)
    compare_decisions(POOLS[name], experts, top_k, factor, num_ranks=2)


@pytest.mark.parametrize(("first", "ranks", "num_cells"), [(0, 1, 1), (1, 3, 5), (2, 16, 16), (9, 37, 14)])
@pytest.mark.parametrize("largest", [1, 30, 2**62])
def test_puts_cells_in_order(first: int, ranks: int, num_cells: int, largest: int) -> None:
    """Equal keys by number; other ranks' tables before and behind do not count."""
    tables = torch.randint(largest, (first + ranks + 2, num_cells, 4))
    order = order_cells(tables.to(DEVICE), Sharing(first, 0, ranks, 1, 1, 1))
    keys = tables[first : first + ranks, :, 0].flatten()
    assert torch.equal(order.cpu().long(), keys.argsort(stable=True))


def admit_plainly(tables: Tensor, starts: Tensor, sharing: Sharing) -> Admitted:
    """The twin of `admit_choices` out of the plain decision's parts."""
    num_peers = sharing.num_groups * sharing.group_size
    peers = tables[sharing.first : sharing.first + num_peers]
    shared = -(-peers[..., 1:].sum() * sharing.numerator // (sharing.denominator * starts.shape[1]))
    admitted = admit(peers[..., 1:], peers[..., 0], shared)
    mine, choices = admitted[sharing.rank], peers[sharing.rank, :, 1:].sum(0)
    by_group = admitted.sum(1).unflatten(0, (sharing.num_groups, sharing.group_size))
    group, member = divmod(sharing.rank, sharing.group_size)
    shifts = mine.cumsum(0) - mine - starts
    if sharing.num_groups > 1:  # nothing reads the shifts of a single one
        shifts += by_group[group, :member].sum(0)
    ends = spread(by_group.sum(1), -(-shared // sharing.num_groups))[group].cumsum(0)[:-1]
    return Admitted(starts + mine, shifts, ends, choices, choices - mine.sum(0), tables[..., 1:].sum((0, 1)))


class Launches:
    """A kernel that notes its launches."""

    def __init__(self, name: str, kernel: Any, seen: list[str]) -> None:
        self.name, self.kernel, self.seen = name, kernel, seen

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        self.seen.append(self.name)
        return self.kernel[grid]


@pytest.mark.parametrize(
    ("groups", "group_size", "num_cells", "launches"),
    [
        (1, 1, 302, ["_admit_kernel"]),
        (1, 64, 6, ["_admit_kernel"]),
        (8, 4, 4, ["_admit_kernel"]),
        (8, 2, 9, ["_order_kernel", "_admit_kernel"]),
        (3, 1, 128, ["_order_kernel", "_admit_kernel"]),
    ],
)
def test_only_groups_that_share_many_cells_take_a_second_launch(
    groups: int, group_size: int, num_cells: int, launches: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Experts whose choices are many, all in one cell and fewer than admitted, and none on some ranks."""
    seen: list[str] = []
    for name, kernel in (("_order_kernel", _order_kernel), ("_admit_kernel", _admit_kernel)):
        monkeypatch.setattr(f"kernels.admission.{name}", Launches(name, kernel, seen))
    ranks, generator = groups * group_size, torch.Generator().manual_seed(groups)
    tables = torch.randint(9, (ranks + 2, num_cells, 4), generator=generator)
    tables[1::3, :, 3] = 0
    tables[..., 2] = 0
    tables[1, 0, 2] = tables[..., 1].sum() // 4
    starts = torch.randint(99, (num_cells, 3), generator=generator)
    for rank in {0, ranks // 2, ranks - 1}:
        sharing = Sharing(1, rank, groups, group_size, 7, 8)
        seen.clear()
        found = admit_choices(tables.to(DEVICE), starts.to(DEVICE), sharing)
        assert seen == launches
        for mine, theirs in zip(found, admit_plainly(tables, starts, sharing), strict=True):
            assert torch.equal(mine.cpu(), theirs)
