"""The benchmark of the router's scope: its figures against loops, its file, its errors, its timed layer."""

import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from model.hashing import draw
from scripts.bench import main
from scripts.benchmarks.moe import OWN, SAME, PoolSettings, count_drops, draw_choices, favourites, measure
from scripts.benchmarks.moe_time import FLOOR_TFLOPS, Clock, LayerSettings, draw_input, time_layer

ROOT = Path(__file__).resolve().parents[2]
SMALL = PoolSettings(
    skews=(0.0, 1.0),
    capacity_factor=1.0,
    edp=3,
    ep=2,
    experts=8,
    top_k=2,
    tokens=32,
    draws=3,
    hidden=16,
)
SMALL_ARGUMENTS = [
    *("moe", "--skews", "0,1", "--edp", "3", "--ep", "2", "--experts", "8"),
    *("--tokens", "32", "--draws", "3", "--hidden", "16"),
]
LAYER = LayerSettings(experts=8, top_k=2, tokens=64, hidden=16, ffn=24, repeats=3)


def relabel(settings: PoolSettings, experts: Tensor, kind: str, number: int) -> Tensor:
    """Popularities -> experts of each group."""
    order = favourites(settings, number)[kind]
    return torch.stack([order[rank // settings.ep][part] for rank, part in enumerate(experts)])


def fullest_over_mean(settings: PoolSettings, rows: Counter) -> float:
    """Rows by (group, expert) -> by EP rank."""
    by_rank = Counter({(g, r): 0 for g in range(settings.edp) for r in range(settings.ep)})
    for (group, expert), count in rows.items():
        by_rank[group, expert // (settings.experts // settings.ep)] += count
    return max(by_rank.values()) / (sum(by_rank.values()) / settings.ranks)


def by_loops(settings: PoolSettings, experts: Tensor, number: int) -> dict[str, float]:
    """The figures as the rule says them: choice by choice, each rank holding one row and one document."""
    s, row_tokens = settings, settings.tokens // settings.ep
    start = draw(0, number, 0) % (s.ranks * row_tokens)
    first_row = -(-start // row_tokens)  # a cut document goes to the end as a whole
    local, admitted, dropped = Counter(), Counter(), Counter()
    own: Counter = Counter()
    per_expert: Counter = Counter()
    for row in range(first_row, first_row + s.ranks):
        group = row % s.ranks // s.ep
        for token in experts[row % s.ranks].tolist():
            for expert in token:
                own[group, expert] += 1
                if local[group, expert] < s.limit:
                    local[group, expert] += 1
                else:
                    dropped["local"] += 1
                if per_expert[expert] < s.pool_limit:
                    per_expert[expert] += 1
                    admitted[group, expert] += 1
                else:
                    dropped["global"] += 1
    room = -(-s.pool_limit // s.edp)
    placed = Counter({place: min(count, room) for place, count in admitted.items()})
    left = {place: count - placed[place] for place, count in admitted.items()}
    moved = sum(left.values())
    for distance in range(1, s.edp):
        for (group, expert), count in left.items():
            other = (group + distance) % s.edp, expert
            flow = min(count, room - placed[other])
            placed[other] += flow
            left[group, expert] -= flow
    assert not any(left.values())
    return {
        "local_dropped": dropped["local"] / s.choices,
        "global_dropped": dropped["global"] / s.choices,
        "bound": sum(max(0, n - s.pool_limit) for n in sum_by_expert(own).values()) / s.choices,
        "dropless_level": fullest_over_mean(s, own),
        "local_level": fullest_over_mean(s, local),
        "global_level": fullest_over_mean(s, placed),
        "moved": moved / s.choices,
        "moved_bytes": moved * (2 * s.hidden + 4) / s.ranks,
    }


def sum_by_expert(counts: Counter) -> Counter:
    total: Counter = Counter()
    for (_, expert), count in counts.items():
        total[expert] += count
    return total


@pytest.mark.parametrize("kind", [SAME, OWN])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"edp": 4, "ep": 1, "tokens": 20, "capacity_factor": 0.8},
        {"edp": 2, "ep": 4, "top_k": 3, "tokens": 24, "capacity_factor": 1.25},
        {"edp": 5, "tokens": 30, "capacity_factor": 1.1},  # 8.25 choices an expert and group
        {"edp": 1},
    ],
)
def test_figures_against_loops(changes: dict, kind: str) -> None:
    settings = replace(SMALL, **changes)
    moved = 0.0
    for number, skew in enumerate((0.0, 0.6, 1.5, 0.6)):
        experts = relabel(settings, draw_choices(settings, skew, number), kind, number)
        figures = measure(settings, experts, number)
        assert figures == pytest.approx(by_loops(settings, experts, number))
        moved += figures["moved"]
    assert (moved > 0) == (settings.edp > 1)


def test_global_never_drops_more_than_local() -> None:
    less = 0
    for number in range(12):
        for factor in (0.5, 1.0, 1.25):
            settings = replace(SMALL, capacity_factor=factor, edp=4)
            assert not settings.is_rounded
            for kind in (SAME, OWN):
                experts = relabel(settings, draw_choices(settings, 0.6, number), kind, number)
                figures = measure(settings, experts, number)
                assert figures["global_dropped"] == figures["bound"] <= figures["local_dropped"]
                less += figures["global_dropped"] < figures["local_dropped"]
    assert less > 48  # of 72


def test_choices_follow_zipf() -> None:
    settings = replace(SMALL, tokens=4096)
    flat, skewed = (draw_choices(settings, skew, 0) for skew in (0.0, 1.0))
    assert skewed.shape == (6, 2048, 2)
    assert (skewed[..., 0] != skewed[..., 1]).all()
    weights = {0.0: torch.ones(8), 1.0: 1 / torch.arange(1, 9)}
    for skew, chosen in ((0.0, flat), (1.0, skewed)):
        share = chosen[..., 0].flatten().bincount(minlength=8) / chosen[..., 0].numel()
        assert torch.allclose(share, weights[skew] / weights[skew].sum(), atol=0.015)
    assert not draw_choices(settings, 1.0, 1).equal(skewed)
    assert draw_choices(settings, 1.0, 0).equal(skewed)


def test_favourites() -> None:
    orders = favourites(SMALL, 0)
    assert all(order.sort().values.equal(torch.arange(8).expand(3, 8)) for order in orders.values())
    assert all(row.equal(orders[SAME][0]) for row in orders[SAME])
    assert len({tuple(row.tolist()) for row in orders[OWN]}) == 3
    assert not orders[SAME].equal(favourites(SMALL, 1)[SAME])


def test_rows_are_means_and_extremes_of_the_draws() -> None:
    rows = count_drops(SMALL)
    assert list(rows) == [SAME, OWN]
    for kind, lines in rows.items():
        assert [line.skew for line in lines] == [0, 1]
        for line in lines:
            draws = [
                measure(SMALL, relabel(SMALL, draw_choices(SMALL, line.skew, n), kind, n), n)
                for n in range(SMALL.draws)
            ]
            for key, (mean, low, high) in line.figures.items():
                values = [one[key] for one in draws]
                assert mean == pytest.approx(sum(values) / 3)
                assert (low, high) == (min(values), max(values))


def test_printed_tables_and_file(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    target = tmp_path / "moe.json"
    assert main([*SMALL_ARGUMENTS, "--json", str(target)]) == 0
    out = capsys.readouterr().out
    numbers = json.loads(target.read_text())
    assert numbers["settings"] == {**asdict(SMALL), "skews": [0, 1]}
    assert numbers["capacity"] == {"local": 8, "global": 24, "is_rounded": False}
    assert numbers["gather_bytes"] == 6 * 4 * 9 * 8
    expected = count_drops(SMALL)
    assert numbers["kinds"].keys() == expected.keys()
    for kind, lines in numbers["kinds"].items():
        assert kind in out
        for line, row in zip(lines, expected[kind], strict=True):
            assert line == {"skew": row.skew, "figures": {k: list(v) for k, v in row.figures.items()}}
            local, moved = line["figures"]["local_dropped"], line["figures"]["moved"]
            printed = [text.split() for text in out.split(kind)[1].split("\n\n")[0].splitlines()]
            (cells,) = [cells for cells in printed if cells[:1] == [f"{row.skew:g}"]]
            assert cells[1] == f"{100 * local[0]:.2f}"
            assert f"{100 * local[2]:.2f})" in cells
            assert cells[-2] == f"{100 * moved[0]:.2f}"
    assert "buffer" not in out
    assert max(map(len, out.splitlines())) <= 115
    table = out.split(SAME)[1].split("\n\n")[0].strip("\n").splitlines()
    assert len({len(line) for line in table}) == 1


def test_rounding_is_said(capsys: pytest.CaptureFixture) -> None:
    assert main([*SMALL_ARGUMENTS, "--capacity-factor", "1.1"]) == 0
    out = capsys.readouterr().out  # 8.8 choices an expert and group: 9 each, 27 of ceil(26.4)
    assert "admits 9 choices an EP group (local) or 27 of all groups" in out
    assert "buffer" not in out
    assert main([*SMALL_ARGUMENTS, "--capacity-factor", "1.01"]) == 0
    out = capsys.readouterr().out
    assert "25 of all groups" in out
    assert "gives the local scope 27 in all, more than that" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--edp", "0"], "--edp=0 must be at least 1"),
        (["--top-k", "-1"], "--top-k=-1 must be at least 1"),
        (["--top-k", "9"], "--top-k=9 must be <= --experts=8"),
        (["--ep", "3"], "--ep=3 must divide --experts=8; use one of [1, 2, 4, 8]"),
        (["--ep", "8", "--tokens", "20"], "--ep=8 must divide --tokens=20; use one of [1, 2, 4, 5, 10, 20]"),
        (["--skews", "0,-1"], "--skews=0.0,-1.0 must be numbers >= 0"),
        (["--skews", "nan"], "--skews=nan must be numbers >= 0"),
        (["--skews", "0,high"], "--skews: '0,high' must be numbers with commas between them"),
        (["--capacity-factor", "0"], "--capacity-factor=0.0 must be above 0 and finite"),
        (["--capacity-factor", "inf"], "--capacity-factor=inf must be above 0 and finite"),
        (["--json", "/no/such/file"], "--json=/no/such/file must name a file in a folder that exists"),
        (["--time", "--layer-hidden", "4"], "--layer-hidden=4 must be >= --experts=8"),
        (["--time", "--repeats", "0"], "--repeats=0 must be at least 1"),
        (["--time"], "--time needs a CUDA device and finds none"),
    ],
)
def test_bad_arguments(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    try:
        code = main([*SMALL_ARGUMENTS, *arguments])
    except SystemExit as refused:  # by argparse itself
        code = int(refused.code or 0)
    said = capsys.readouterr()
    assert code == 2
    assert message in said.err
    assert not said.out


def test_runs_from_any_folder(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "bench.py"), "moe", "--edp", "0"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (2, "bench: --edp=0 must be at least 1\n")


def wall_ms(call: Callable[[], object], repeats: int) -> list[float]:
    """A clock that runs without a GPU."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(1000 * (time.perf_counter() - start))
    return times


def test_timed_layer() -> None:
    device = torch.device("cpu")
    rows = {
        (factor, skew): time_layer(LAYER, factor, skew, device, wall_ms)
        for factor in (None, 1.0, 1.25)
        for skew in (0.0, 1.5)
    }
    for (factor, skew), row in rows.items():
        assert (row.capacity_factor, row.skew) == (factor, skew)
        assert len(row.layer_ms) == len(row.dense_ms) == 3
        assert len(row.decision_ms) == (0 if factor is None else 3)
        flops = row.admitted * 18 * LAYER.hidden * LAYER.ffn
        assert row.floor_ms == pytest.approx(1000 * flops / (FLOOR_TFLOPS * 1e12))
        assert len(row.line()) == 8
        chosen = draw_input(LAYER, skew, device)[0, :, :8].topk(2).indices
        demand = chosen.flatten().bincount(minlength=8)
        assert row.admitted == demand.clamp(max=128 if factor is None else int(16 * factor)).sum()
    assert rows[1.0, 1.5].admitted < rows[1.25, 1.5].admitted < rows[None, 1.5].admitted == 128
    assert rows[1.0, 1.5].admitted < rows[1.0, 0.0].admitted
    assert rows[1.0, 0.0].line()[0] == "1"
    assert rows[None, 0.0].line()[0] == "null"
    assert rows[None, 0.0].line()[4] == "-"


def test_time_table(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def on_cpu(settings: LayerSettings, factor: float | None, skew: float, device: torch.device, _: Clock):
        asked.append((factor, skew, device.type))
        return time_layer(settings, factor, skew, torch.device("cpu"), wall_ms)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Some GPU")
    monkeypatch.setattr("scripts.benchmarks.tables.time_layer", on_cpu)
    sizes = ["--layer-tokens", "64", "--layer-hidden", "16", "--layer-ffn", "24", "--repeats", "3"]
    target = tmp_path / "time.json"
    assert main([*SMALL_ARGUMENTS, "--time", *sizes, "--json", str(target)]) == 0
    assert asked == [(factor, skew, "cuda") for factor in (None, 1.0, 1.25) for skew in (0, 1)]
    numbers, out = json.loads(target.read_text()), capsys.readouterr().out
    assert numbers["settings"] == {**asdict(LAYER), "skews": [0, 1]}
    assert numbers["device"] == "Some GPU"
    assert out.startswith("Some GPU, ")
    lines = out.splitlines()[-6:]
    assert [line.split()[0] for line in lines] == ["null", "null", "1", "1", "1.25", "1.25"]
    for line, t in zip(lines, numbers["times"], strict=True):
        assert line.split()[1:3] == [f"{t['skew']:g}", str(t["admitted"])]
        assert line.split()[3] == f"{sorted(t['layer_ms'])[1]:.3f}"
        assert line.split()[-2] == f"{sorted(t['dense_ms'])[1]:.3f}"
    assert max(map(len, out.splitlines())) <= 115
