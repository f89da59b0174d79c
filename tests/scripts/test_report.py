"""The report page: its numbers, its tolerance of unfinished runs, its errors."""

import json
import math
import re
import subprocess
import sys
from html import unescape
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from scripts.report import main
from scripts.reporting.charts import MAX_POINTS, Scale, number, smooth, thin

ROOT = Path(__file__).resolve().parents[2]


def metrics_row(step: int, **changes: Any) -> dict[str, Any]:
    return {
        "step": step,
        "tokens": step * 4096,
        "loss": 10.0 / step,
        "aux_loss": 1.01,
        "grad_norm": 0.5,
        "lr": 3e-4,
        "row_tokens": 128,
        "global_tokens": 4096,
        "tokens_per_second": 1000.0 + step,
        "mfu": None,
        "max_memory_gib": None,
        "drop_rate": 0.0,
        "max_violation": 0.25,
        "skipped": 0,
        **changes,
    }


def experts_row(step: int, **changes: Any) -> dict[str, Any]:
    load = [[30, 10, 20, 20], [0, 40, 20, 20]]
    return {"step": step, "load": load, "dropped": [[0] * 4] * 2, "moved": [0, 0], **changes}


def write_run(
    folder: Path, metrics: list[dict[str, Any]], experts: list[dict[str, Any]] | None = None, tail: str = ""
) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics) + tail)
    if experts is not None:
        (folder / "experts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in experts))
    (folder / "config.yaml").write_text("model:\n  note: <a & b>\n")
    return folder


def page_of(run_dir: Path) -> str:
    assert main([str(run_dir)]) == 0
    return (run_dir / "report.html").read_text(encoding="utf-8")


def svgs(page: str) -> dict[str, ElementTree.Element]:
    """Every picture by its title; parsing fails on invalid XML."""
    found = [ElementTree.fromstring(text) for text in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]
    return {svg.attrib["aria-label"]: svg for svg in found}


def points(svg: ElementTree.Element, name: str) -> list[list[float]]:
    (curve,) = (s for s in json.loads(svg.attrib["data-series"]) if s["name"] == name)
    return curve["points"]


def test_every_value_reaches_its_chart(tmp_path: Path) -> None:
    rows = [metrics_row(step) for step in range(1, 31)]
    rows[19]["eval_loss"] = 0.75
    rows[3] |= {"mfu": 0.4, "max_memory_gib": 61.25, "drop_rate": 0.3, "skipped": 2}
    page = page_of(write_run(tmp_path, rows, [experts_row(30)]))
    charts = svgs(page)
    assert [p[1:] for p in points(charts["Loss"], "train")] == [
        [row["tokens"], row["step"], pytest.approx(row["loss"], rel=1e-4)] for row in rows
    ]
    assert [p[1:] for p in points(charts["Loss"], "held out")] == [[20 * 4096, 20, 0.75]]
    assert [p[3] for p in points(charts["Model FLOPs utilisation (%)"], "mfu")] == [40.0]
    assert max(p[3] for p in points(charts["Dropped choices (%)"], "drop_rate")) == 30.0
    assert {"Learning rate", "Gradient norm", "Throughput (tokens per second)"} <= set(charts)
    assert not {"Moved choices (%)", "Router entropy (nats)", "Router z-loss, before its coefficient"} & set(
        charts
    )
    tiles = dict(re.findall(r'<div class="tile">(.*?)<b>(.*?)</b>', page))
    assert tiles["Steps"] == "30"
    assert tiles["Tokens"] == "122.9k"
    assert tiles["Tokens/s"] == "1.016k"
    assert tiles["Training loss"] == "0.333"
    assert "<i>from 10.000</i>" in page
    assert tiles["Held-out loss"] == "0.750"
    assert "<i>step 20</i>" in page
    assert tiles["Drop rate"] == "1.00%"
    assert tiles["MFU"] == "40.0%"
    assert tiles["Peak memory"] == "61.2 GiB"
    assert tiles["Skipped steps"] == "2"


def test_curve_is_drawn_where_its_values_are(tmp_path: Path) -> None:
    rows = [metrics_row(step, loss=loss) for step, loss in enumerate([4.0, 3.0, 2.0], start=1)]
    loss = svgs(page_of(write_run(tmp_path, rows)))["Loss"]
    (curve,) = (e for e in loss.iter("path") if e.get("class") == "curve line")
    x, y = np.array(re.findall(r"[ML]([\d.]+) ([\d.]+)", curve.attrib["d"]), dtype=float).T
    assert x[1] - x[0] == pytest.approx(x[2] - x[1], abs=0.11)
    assert x[0] < x[1]
    assert y[1] - y[0] == pytest.approx(y[2] - y[1], abs=0.11)
    assert y[0] < y[1]


def test_expert_load_is_a_share_of_the_mean(tmp_path: Path) -> None:
    rows = [experts_row(1, load=[[20] * 4] * 2), experts_row(9)]
    page = page_of(write_run(tmp_path, [metrics_row(9)], rows))
    charts = svgs(page)
    cells = {
        e.attrib["data-tip"]: e
        for e in charts["Load / mean at step 9 (1 = balanced)"].iter("rect")
        if "data-tip" in e.attrib
    }
    assert len(cells) == 8
    for tip, colour, strength in [
        ("layer 0, expert 0: 1.5 (30 choices)", "hot", "0.50"),
        ("layer 0, expert 1: 0.5 (10 choices)", "cold", "0.50"),
        ("layer 0, expert 2: 1 (20 choices)", "hot", "0.00"),
        ("layer 1, expert 0: 0 (0 choices)", "cold", "1.00"),
        ("layer 1, expert 1: 2 (40 choices)", "hot", "1.00"),
    ]:
        assert (cells[tip].get("class"), cells[tip].get("fill-opacity")) == (colour, strength), tip
    over_time = [e.get("data-tip") for e in charts["Busiest expert / mean over time"].iter("rect")]
    assert [tip for tip in over_time if tip] == [
        "layer 0, step 1: 1", "layer 0, step 9: 1.5", "layer 1, step 1: 1", "layer 1, step 9: 2",
    ]  # fmt: skip
    assert re.search(
        r"Most loaded experts</caption>(<tr>)?(<th>[^<]*)+<tr><td>1<td>1<td>2.00<td>40<tr>", page
    )
    assert not [title for title in charts if title.startswith(("Dropped choices of", "Moved"))]


def test_drops_and_moves_appear_when_there_are_any(tmp_path: Path) -> None:
    rows = [experts_row(1), experts_row(2, dropped=[[15, 0, 0, 0], [0] * 4], moved=[0, 8])]
    charts = svgs(page_of(write_run(tmp_path, [metrics_row(2)], rows)))
    dropped = [e.get("data-tip") for e in charts["Dropped choices of the whole run (%)"].iter("rect")]
    moved = [e.get("data-tip") for e in charts["Moved choices over time (%)"].iter("rect")]
    assert "layer 0, expert 0: 25 (15 choices)" in dropped
    assert "layer 1, step 2: 10" in moved
    assert "layer 1, step 1: 0" in moved


def test_router_figures_have_charts(tmp_path: Path) -> None:
    changes = {"moved_rate": 0.25, "router_entropy": 1.5, "z_loss": 3.0}
    layers = {"max_violation": [0.5, 1.0], "entropy": [1.25, math.nan], "aux_loss": [1.0, 1.5]}
    rows = [experts_row(1), experts_row(2, **layers)]  # a run whose first lines are older
    charts = svgs(page_of(write_run(tmp_path, [metrics_row(1), metrics_row(2, **changes)], rows)))
    for title, key, value in [
        ("Moved choices (%)", "moved_rate", 25.0),
        ("Router entropy (nats)", "router_entropy", 1.5),
        ("Router z-loss, before its coefficient", "z_loss", 3.0),
    ]:
        assert [p[2:] for p in points(charts[title], key)] == [[2, value]]


def test_stages_memory_checkpoints_and_alerts_are_shown(tmp_path: Path) -> None:
    rows = [
        metrics_row(step, stage=step // 3, row_tokens=128 << step // 3, max_memory_gib=60.5,
                    checkpoint_age_steps=step % 2, spike_score=1.5)
        for step in range(1, 5)
    ]  # fmt: skip
    run_dir = write_run(tmp_path, rows, [experts_row(step) for step in range(1, 5)])
    assert "Dead experts" not in page_of(run_dir)
    (run_dir / "config.yaml").write_text("log: {dead_after: 3, max_drop_rate: null}\n")
    page = page_of(run_dir)
    charts = svgs(page)
    for title, key, values in [
        ("Stage of the curriculum", "stage", [0, 0, 1, 1]),
        ("Row length (tokens)", "row_tokens", [128, 128, 256, 256]),
        ("Peak memory of rank 0 (GiB)", "max_memory_gib", [60.5] * 4),
        ("Checkpoint age (steps that a crash would lose)", "checkpoint_age_steps", [1, 0, 1, 0]),
        ("Spike score (deviations)", "spike_score", [1.5] * 4),
    ]:
        assert [p[3] for p in points(charts[title], key)] == values, title
    unchanged = svgs(page_of(write_run(tmp_path / "one stage", rows[:2], [experts_row(1)])))
    assert "Stage of the curriculum" not in unchanged
    assert "Row length (tokens)" not in unchanged
    assert page.count("Dead experts: step 3: layer 1 expert 0: no choice in 3 intervals") == 1


def test_long_runs_are_thinned_but_keep_their_spikes(tmp_path: Path) -> None:
    rows = [metrics_row(step, loss=2.0 + 1e-4 * (step % 7)) for step in range(1, 10_001)]
    rows[4567]["loss"], rows[7001]["loss"] = 9.0, 0.5
    experts = [experts_row(step) for step in range(1, 1000)]
    experts[500]["load"] = [[80, 0, 0, 0], [0] * 4]
    charts = svgs(page_of(write_run(tmp_path, rows, experts)))
    values = [p[3] for p in points(charts["Loss"], "each step")]
    assert MAX_POINTS * 0.9 < len(values) <= MAX_POINTS
    assert max(values) == 9.0
    assert min(values) == 0.5
    assert max(p[3] for p in points(charts["Loss"], "smoothed")) < 2.1
    cells = [e for e in charts["Busiest expert / mean over time"].iter("rect") if "data-tip" in e.attrib]
    assert len(cells) == 2 * 120
    tips = [e.attrib["data-tip"].split(": ") for e in cells]
    assert [value for where, value in tips if where.startswith("layer 0")].count("4") == 1
    assert {value for where, value in tips if where.startswith("layer 1")} == {
        "2"
    }  # no choices: not a number


def test_page_is_self_contained_and_escaped(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "a<b", [metrics_row(1)], [experts_row(1)])
    page = page_of(run_dir)
    assert not re.search(r"http|//|@import|url\(|<link|\ssrc=", page)
    assert "<title>a&lt;b</title>" in page
    assert "note: &lt;a &amp; b&gt;" in page
    assert "<details><summary>" in page
    assert "prefers-color-scheme: dark" in page


def test_one_step_without_experts(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path, [metrics_row(1)]))
    loss = svgs(page)["Loss"]
    assert len([e for e in loss.iter("circle")]) == 1  # a path of one point would be invisible
    assert "No expert load was logged." in page
    (tmp_path / "experts.jsonl").write_text("")
    assert "No expert load was logged." in page_of(tmp_path)


def test_nan_and_null_leave_gaps(tmp_path: Path) -> None:
    rows = [metrics_row(step) for step in range(1, 8)]
    rows[2]["loss"], rows[3]["loss"], rows[5]["lr"] = math.nan, math.inf, None
    charts = svgs(page := page_of(write_run(tmp_path, rows, [experts_row(7, load=[[0] * 4] * 2)])))
    assert [p[2] for p in points(charts["Loss"], "train")] == [1, 2, 5, 6, 7]
    (curve,) = (e for e in charts["Loss"].iter("path") if e.get("class") == "curve line")
    assert re.sub(r"[^ML]", "", curve.attrib["d"]) == "MLMLL"
    assert "2 not finite" in page
    assert "nan" not in curve.attrib["d"]
    assert len(points(charts["Learning rate"], "lr")) == 6
    assert "Model FLOPs utilisation (%)" not in charts


def test_a_diverged_run_still_gets_a_page(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path, [metrics_row(s, loss=math.nan, grad_norm=math.nan) for s in (1, 2)]))
    assert points(svgs(page)["Loss"], "train") == []
    assert "2 not finite" in page
    assert ">nan</b>" in page


def test_torn_last_lines_are_left_out_and_mentioned(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path, [metrics_row(1), metrics_row(2)], [experts_row(1)], tail='{"step": 3, "tok')
    with (run_dir / "experts.jsonl").open("ab") as file:
        file.write(b'{"step": 2, "load": [[\xe2')
    page = page_of(run_dir)
    assert "metrics.jsonl: the last line is torn" in page
    assert "experts.jsonl: the last line is torn" in page
    assert len(points(svgs(page)["Loss"], "train")) == 2


@pytest.mark.parametrize(
    ("sentinel", "status"),
    [
        ("DONE", "finished"),
        ("REQUEUE", "wants to go on"),
        ("FAILED", "failed"),
        (None, "running or interrupted"),
    ],
)
def test_status_comes_from_the_sentinel(tmp_path: Path, sentinel: str | None, status: str) -> None:
    run_dir = write_run(tmp_path, [metrics_row(1)])
    if sentinel:
        (run_dir / sentinel).write_text(json.dumps({"code": 75, "step": 12, "reason": "SIGTERM & co"}))
    page = page_of(run_dir)
    assert re.search(rf'<span class="status {sentinel or ""}">[^<]*{status}', page)
    assert ("exit code 75 at step 12: SIGTERM &amp; co" in page) == bool(sentinel)


@pytest.mark.parametrize(
    ("file", "line", "message"),
    [
        ("metrics.jsonl", "{torn in the middle", "Expecting property name"),
        ("metrics.jsonl", '{"step": 2, "tokens": 9}', "misses loss"),
        ("metrics.jsonl", '{"step": 2, "tokens": 9, "loss": "x"}', "loss='x' must be of type"),
        ("metrics.jsonl", '{"step": 2, "tokens": null, "loss": 1}', "tokens=None must be of type int"),
        ("metrics.jsonl", "[]", "must be an object"),
        ("metrics.jsonl", "", "Expecting value"),
        ("experts.jsonl", '{"step": 2}', "must hold step, load, dropped and moved"),
        ("experts.jsonl", json.dumps(experts_row(2, moved=[0])), "have the shapes (2, 4), (2, 4), (1,)"),
        ("experts.jsonl", json.dumps(experts_row(2, load=[[1], [1, 2]])), "inhomogeneous shape"),
        (
            "experts.jsonl",
            json.dumps(experts_row(2, entropy=[1.0])),
            "entropy has the shape (1,); must be [layers]",
        ),
        ("experts.jsonl", json.dumps(experts_row(2, aux_loss={})), "TypeError"),
    ],
)
def test_bad_lines_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, line: str, message: str
) -> None:
    run_dir = write_run(tmp_path, [metrics_row(1)], [experts_row(1)])
    good = (run_dir / file).read_text()
    (run_dir / file).write_text(f"{good}{line}\n{good}")
    assert main([str(run_dir)]) == 2
    error = capsys.readouterr().err
    assert f"{run_dir / file}:2: " in error
    assert message in error
    assert not (run_dir / "report.html").exists()


def test_missing_and_empty_metrics(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    assert f"{tmp_path / 'metrics.jsonl'} does not exist" in capsys.readouterr().err
    (tmp_path / "metrics.jsonl").write_text('{"st')
    assert main([str(tmp_path)]) == 2
    assert "holds no complete line" in capsys.readouterr().err


def test_bad_sentinel_and_changing_shapes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    narrow = experts_row(2, load=[[1], [1]], dropped=[[0], [0]])
    assert main([str(write_run(tmp_path, [metrics_row(1)], [experts_row(1), narrow]))]) == 2
    assert "the shape of load changes" in capsys.readouterr().err
    (write_run(tmp_path, [metrics_row(1)], []) / "DONE").write_text("yes")
    assert main([str(tmp_path)]) == 2
    assert f"{tmp_path / 'DONE'}: " in capsys.readouterr().err


def test_command_runs_from_any_folder(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path, [metrics_row(1)])
    command = [sys.executable, str(ROOT / "scripts/report.py"), "."]
    said = subprocess.run(command, cwd=run_dir, check=True, capture_output=True, text=True).stdout
    loss = metrics_row(1)["loss"]
    assert said == f"loss {loss:.4f} at step 1, {loss:.4f} at step 1\nwrote report.html\n"
    shown = subprocess.run([*command, "--help"], check=True, capture_output=True, text=True).stdout
    assert "Write RUN_DIR/report.html: loss, speed, memory" in " ".join(shown.split())
    assert tmp_path.name in unescape((run_dir / "report.html").read_text())


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (1.5, "1.5"), (999, "999"), (12_500_000, "12.5M"), (4096, "4.096k"), (3e9, "3B"), (2e12, "2T"),
     (3e-4, "3e-4"), (2.5e-5, "2.5e-5"), (0.01, "0.01"), (-2000, "-2k"), (math.nan, "nan")],
)  # fmt: skip
def test_number(value: float, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0, 10, [0, 2, 4, 6, 8, 10]),
        (0, 1e6, [0, 2e5, 4e5, 6e5, 8e5, 1e6]),
        (2.9, 3.1, [2.9, 2.95, 3.0, 3.05, 3.1]),
    ],
)
def test_linear_ticks(low: float, high: float, ticks: list[float]) -> None:
    assert Scale(low, high, 0, 100).ticks(5) == pytest.approx(ticks)


def test_log_axis() -> None:
    axis = Scale(0.1, 1000, 100, 0, log=True)
    assert axis.ticks(5) == pytest.approx([0.1, 1, 10, 100, 1000])
    assert axis.place(np.array([0.1, 10, 1000])) == pytest.approx([100, 50, 0])
    assert len(Scale(1e-12, 1e12, 0, 1, log=True).ticks(5)) <= 6


def test_smooth_keeps_lines_and_ends() -> None:
    line = np.arange(20.0)
    assert smooth(line, 3) == pytest.approx(line)  # symmetric windows: no lag, also at the ends
    assert smooth(np.array([1.0, np.nan, 3.0]), 1) == pytest.approx([1.0, 2.0, 3.0])
    assert np.isnan(smooth(np.full(3, np.nan), 1)).all()


def test_thin_keeps_ends_and_extremes_of_each_bucket() -> None:
    values = np.random.default_rng(0).normal(size=5000)
    values[::3] = np.nan
    kept = thin(values, 100)
    assert len(kept) <= 100
    assert kept[0] == 0
    assert kept[-1] == 4999
    assert (np.diff(kept) > 0).all()
    for bucket in np.array_split(np.arange(5000), 49):
        inside = values[np.intersect1d(kept, bucket)]
        assert (np.nanmin(inside), np.nanmax(inside)) == (
            np.nanmin(values[bucket]),
            np.nanmax(values[bucket]),
        )
