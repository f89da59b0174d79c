"""The page of a run: tiles, charts over tokens, heat maps of experts."""

from html import escape

import numpy as np

from scripts.reporting.charts import (
    SCRIPT,
    STYLE,
    Series,
    draw_heat_map,
    line_chart,
    merge_columns,
    number,
    smooth,
)
from scripts.reporting.run_files import STATUS, ExpertRow, RunRecord
from train.monitor.heat_maps import LOAD_LIMIT, HeatMap, load_share, ratio


def render(run: RunRecord) -> str:
    """Return the page."""
    sentinel, note = run.ending
    torn = "".join(
        f'<p class="warn">{name}: the last line is torn and was left out.</p>' for name in run.torn
    )
    alerts = "".join(f'<p class="warn">{escape(f"{one.title}: {one.text}")}</p>' for one in run.alerts)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(run.name)}</title><style>{STYLE}</style></head><body>
<header><h1>{escape(run.name)}</h1><span class="status {sentinel}">{STATUS[sentinel]}</span>
<p>{escape(note)}</p>{torn}</header>
{tiles(run.metrics)}
<div class="grid">{metric_charts(run.metrics)}</div>
{alerts}<h2>Experts</h2>{expert_section(run.experts)}
<details><summary>Resolved configuration</summary><pre>{escape(run.config)}</pre></details>
<div id="tip"></div><script>{SCRIPT}</script></body></html>
"""


def tiles(rows: list[dict[str, float | None]]) -> str:
    """The summary line: progress, losses, speed, drops."""
    loss, speed, drops = (column(rows, key).y for key in ("loss", "tokens_per_second", "drop_rate"))
    held_out, mfu, memory = (column(rows, key) for key in ("eval_loss", "mfu", "max_memory_gib"))
    cells = [
        ("Steps", f"{rows[-1]['step']:,}", f"{len(rows):,} logged"),
        ("Tokens", number(rows[-1]["tokens"] or 0), ""),
    ]
    if len(loss):
        cells.append(("Training loss", f"{loss[-1]:.3f}", f"from {loss[0]:.3f}"))
    if len(held_out.y):
        cells.append(("Held-out loss", f"{held_out.y[-1]:.3f}", f"step {held_out.step[-1]:,.0f}"))
    if len(speed):
        cells.append(("Tokens/s", number(float(np.median(speed))), "median"))
    if len(drops):
        cells.append(("Drop rate", f"{100 * np.mean(drops):.2f}%", "mean"))
    if len(mfu.y):
        cells.append(("MFU", f"{100 * np.median(mfu.y):.1f}%", "median"))
    if len(memory.y):
        cells.append(("Peak memory", f"{memory.y.max():.1f} GiB", "highest"))
    if skipped := column(rows, "skipped").y.sum():
        cells.append(("Skipped steps", f"{skipped:.0f}", ""))
    parts = [
        f'<div class="tile">{name}<b>{escape(value)}</b><i>{note}</i></div>' for name, value, note in cells
    ]
    return f'<div class="tiles">{"".join(parts)}</div>'


def column(rows: list[dict[str, float | None]], key: str) -> Series:
    """The values of one key over tokens, without rows where it is null or missing."""
    kept = [row for row in rows if row.get(key) is not None]
    tokens, values, step = (np.array([row[k] for row in kept], dtype=float) for k in ("tokens", key, "step"))
    return Series(key, tokens, values, step)


def metric_charts(rows: list[dict[str, float | None]]) -> str:
    """All charts over tokens; a chart whose values are all null is left out."""
    loss, held_out = column(rows, "loss"), column(rows, "eval_loss")
    half = len(loss.y) // 60
    raw = Series("each step" if half else "train", loss.x, loss.y, loss.step, "faint" if half else "line")
    curves = [raw, Series("smoothed", loss.x, smooth(loss.y, half), loss.step)] if half else [raw]
    curves.append(Series("held out", held_out.x, held_out.y, held_out.step, "points"))
    charts = [f'<div class="wide">{line_chart("Loss", curves, width=1150, height=330)}</div>']

    def add(key: str, title: str, scale: float = 1.0, *, zero: bool = True, log: bool = False) -> None:
        one = column(rows, key)
        charts.append(line_chart(title, [Series(key, one.x, one.y * scale, one.step)], zero=zero, log=log))

    add("lr", "Learning rate")
    add("grad_norm", "Gradient norm", log=True)
    add("tokens_per_second", "Throughput (tokens per second)")
    add("mfu", "Model FLOPs utilisation (%)", 100)
    add("max_memory_gib", "Peak memory of rank 0 (GiB)")
    if len(set(column(rows, "stage").y)) > 1:
        add("stage", "Stage of the curriculum")
    if len(set(column(rows, "row_tokens").y)) > 1:
        add("row_tokens", "Row length (tokens)", log=True)
    add("checkpoint_age_steps", "Checkpoint age (steps that a crash would lose)")
    add("spike_score", "Spike score (deviations)", zero=False)
    add("aux_loss", "Load-balancing loss, before its coefficient", zero=False)
    add("z_loss", "Router z-loss, before its coefficient", zero=False)
    add("router_entropy", "Router entropy (nats)", zero=False)
    add("max_violation", "Max violation (worst layer: max / mean - 1)")
    add("drop_rate", "Dropped choices (%)", 100)
    if column(rows, "moved_rate").y.any():  # without ep nothing can move
        add("moved_rate", "Moved choices (%)", 100)
    return "".join(charts)


def expert_section(rows: list[ExpertRow]) -> str:
    """Heat maps of load, drops and moves, and the extreme experts of the last interval."""
    if not rows:
        return "<p>No expert load was logged.</p>"
    last, loads = rows[-1], np.stack([row.load for row in rows])
    total_load, total_dropped = loads.sum(0), np.sum([row.dropped for row in rows], axis=0)
    share, dropped = load_share(last.load), 100 * ratio(total_dropped, total_load)
    peak = ratio(loads.max(2), loads.mean(2)).T
    moved = 100 * ratio(np.stack([row.moved for row in rows]), loads.sum(2)).T
    steps = [row.step for row in rows]
    charts = [
        _expert_map(f"Load / mean at step {last.step} (1 = balanced)", share, last.load, 1, LOAD_LIMIT),
        _time_map("Busiest expert / mean over time", peak, steps, 1, max(LOAD_LIMIT, _top(peak, 0.95))),
        *_extremes(share, last.load),
    ]
    if total_dropped.any():
        title = "Dropped choices of the whole run (%)"
        charts.append(_expert_map(title, dropped, total_dropped, 0, _top(dropped)))
    if np.nan_to_num(moved).any():
        charts.append(_time_map("Moved choices over time (%)", moved, steps, 0, _top(moved)))
    return f'<div class="grid">{"".join(charts)}</div>'


def _top(values: np.ndarray, quantile: float = 1.0) -> float:
    finite = values[np.isfinite(values)]
    return float(np.quantile(finite, quantile)) if len(finite) else 1.0


def _expert_map(title: str, values: np.ndarray, counts: np.ndarray, centre: float, limit: float) -> str:
    layers, experts = map(range, values.shape)
    heat_map = HeatMap(values, ("layer", layers), ("expert", experts), centre, limit)

    def tip(r: int, c: int) -> str:
        return f"layer {r}, expert {c}: {values[r, c]:.3g} ({counts[r, c]:,.0f} choices)"

    return draw_heat_map(title, heat_map, tip)


def _time_map(title: str, values: np.ndarray, steps: list[int], centre: float, limit: float) -> str:
    spans, matrix = merge_columns(values)
    names = [str(steps[a]) if a == b else f"{steps[a]} to {steps[b]}" for a, b in spans]
    columns = ("step", [f"{steps[b]:,}" for _, b in spans])
    heat_map = HeatMap(matrix, ("layer", range(len(matrix))), columns, centre, limit)
    return draw_heat_map(title, heat_map, lambda r, c: f"layer {r}, step {names[c]}: {matrix[r, c]:.3g}")


def _extremes(share: np.ndarray, load: np.ndarray) -> list[str]:
    order = [i for i in np.argsort(share, axis=None, kind="stable") if np.isfinite(share.flat[i])]
    tables = []
    for caption, picked in (("Most loaded experts", order[::-1][:5]), ("Least loaded experts", order[:5])):
        cells = [(*divmod(int(i), share.shape[1]), share.flat[i], load.flat[i]) for i in picked]
        body = "".join(f"<tr><td>{r}<td>{c}<td>{s:.2f}<td>{n:,.0f}" for r, c, s, n in cells)
        head = "<tr><th>layer<th>expert<th>load / mean<th>choices"
        tables.append(f'<div class="table"><table><caption>{caption}</caption>{head}{body}</table></div>')
    return tables
