"""Drawn against configured shares, as a picture.

`python -m tests.support.programs.simulate_mixture OUT.svg conf=NAME [key=value ...]`

`--scale TOKENS` in all (1e9). Row lengths, length bounds, mixtures, packing and window are the run's. Of the
stages before the mixture first changes only the last is drawn; all stages get the same tokens, because in
proportion the short ones would be a row or two. A step is as long as the longest row.
"""

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.config import SourceConfig
from data.planner import Planner, build_units
from scripts.curriculum import read_config
from scripts.reporting.charts import LEFT, RIGHT, Series, line_chart
from train.config import ConfigError, RunConfig
from train.curriculum_stages import CurriculumStage, build_stages

TOLERANCE = 0.01
WEIGHTS = {"web": 0.6, "code": 0.3, "books": 0.1}  # if the run has no sources of its own
LONG_WEIGHTS = [0.4, 0.3, 0.3]  # then those of stages with length shares, and of their last fifth
FINAL_WEIGHTS, FINAL_FRACTION = [0.36, 0.27, 0.37], 0.2
DOCUMENTS = 30_000  # of each source
WIDTH, HEIGHT, HEAD = 560, 230, 44  # of a panel, and the room for its title
WINDOWS = 60  # along the token axis


class Draws(NamedTuple):
    """Tokens of each step: [steps, length buckets and then sources], and the stage [steps]."""

    wanted: np.ndarray
    drawn: np.ndarray
    stage: np.ndarray


def scale(cfg: RunConfig, tokens: float) -> list[CurriculumStage]:
    """Return the run's stages with the same tokens each; a part of a stage stays that part.

    Raises:
        ValueError: no curriculum, or a length that is none.
    """
    if not cfg.curriculum:
        raise ConfigError("the run has no curriculum, so there are no stages to draw")
    if not cfg.data.sources:
        sources = [SourceConfig(path=name, weight=weight) for name, weight in WEIGHTS.items()]
        curriculum = [
            replace(s, weights=LONG_WEIGHTS, final_weights=FINAL_WEIGHTS, final_fraction=FINAL_FRACTION)
            if s.length_shares
            else s
            for s in cfg.curriculum
        ]
        cfg = replace(cfg, data=replace(cfg.data, sources=sources), curriculum=curriculum)
    stages = build_stages(cfg)
    first = next((s.number for s in stages if s.own != stages[0].own), 1) - 1
    step = max(s.cfg.batch.row_tokens for s in stages)
    each = int(tokens / (len(stages) - first)) // step * step
    small = [
        replace(s, tokens=each, transition_tokens=s.transition_tokens * each // s.tokens, global_tokens=step)
        for s in cfg.curriculum[first:]
    ]
    return build_stages(replace(cfg, curriculum=small))


def document_lengths(bounds: Sequence[int], num_sources: int) -> list[np.ndarray]:
    """Log-normal, so that few long documents hold much of the tokens; sources differ in their medians."""
    rng = np.random.default_rng(0)
    logs = [rng.normal(np.log(bounds[0]) - 3.4 + 0.7 * (i % 3), 1.6, DOCUMENTS) for i in range(num_sources)]
    return [np.exp(values).clip(2, 8 * bounds[-1]).astype(np.int64) for values in logs]


def simulate(stages: list[CurriculumStage]) -> Draws:
    """Draw all rows with the planner that a run has; what is wanted comes from the configuration alone."""
    data = replace(stages[0].cfg.data, eval_fraction=0.0)
    lengths = document_lengths(data.length_bounds, len(data.sources))
    edges = [0, *data.length_bounds, max(n.max() for n in lengths) + 1]
    as_they_come = np.array([np.histogram(n, edges, weights=n)[0] / n.sum() for n in lengths])
    planner = Planner(build_units(lengths, data, split="train", seed=0, buckets=True), data)
    wanted, drawn, numbers = [], [], []
    for stage, tokens in _steps(stages):
        mixture, (row_tokens, step_tokens) = stage.mixture_at(tokens), stage.sizes
        counts = planner.plan(row_tokens, step_tokens // row_tokens, mixture).counts
        weights = np.array(mixture.weights) / sum(mixture.weights)
        own = mixture.length_shares
        shares = weights @ as_they_come if own is None else np.array(own) / sum(own)
        wanted.append(np.concatenate([shares, weights]) * sum(counts.source_tokens))
        drawn.append(counts.bucket_tokens + counts.source_tokens)
        numbers.append(stage.number)
    return Draws(np.array(wanted), np.array(drawn, float), np.array(numbers))


def _steps(stages: list[CurriculumStage]) -> Iterator[tuple[CurriculumStage, int]]:
    for stage in stages:
        end = stage.first_tokens + stage.tokens
        yield from ((stage, tokens) for tokens in range(stage.first_tokens, end, stage.sizes[1]))


def names(stages: list[CurriculumStage]) -> list[str]:
    """Of the length buckets, then of the sources."""
    data = stages[0].cfg.data
    edges = [f"{bound // 1024}Ki" if bound % 1024 == 0 else str(bound) for bound in data.length_bounds]
    between = [f"from {low} to {high}" for low, high in pairwise(edges)]
    buckets = [f"below {edges[0]}", *between, f"from {edges[-1]}"]
    return [f"documents {bucket}" for bucket in buckets] + [source.path for source in data.sources]


def table(stages: list[CurriculumStage], draws: Draws) -> tuple[list[str], float]:
    """Return lines of Markdown, and the largest error as a part of its stage's tokens."""
    lines = ["| stage | tokens | shares of | configured % | drawn % | error % |", "|---|---|---|---|---|---|"]
    num_buckets, worst = len(stages[0].cfg.data.length_bounds) + 1, 0.0
    for stage in stages:
        here = draws.stage == stage.number
        total = draws.drawn[here, :num_buckets].sum()
        wanted, drawn = (tokens[here].sum(axis=0) / total for tokens in (draws.wanted, draws.drawn))
        worst = max(worst, float(np.abs(drawn - wanted).max()))
        for what, part in (("lengths", slice(num_buckets)), ("sources", slice(num_buckets, None))):
            cells = (
                " / ".join(form.format(100 * value) for value in values[part])
                for values, form in ((wanted, "{:.2f}"), (drawn, "{:.2f}"), (drawn - wanted, "{:+.2f}"))
            )
            lines.append(f"| {stage.name} | {total / 1e6:.4g}M | {what} | {' | '.join(cells)} |")
    return lines, worst


PLAIN = """
text { font: 11px sans-serif; fill: #5d5d63; text-anchor: middle; }
text[text-anchor=end] { text-anchor: end; }
.title { font-weight: 600; fill: #17171a; text-anchor: start; } .cursor { display: none; }
.rule { stroke: #e2e2dd; } .axis { stroke: #5d5d63; } .curve { fill: none; } .faint { stroke: #c9c9cd; }
.line { stroke: #2a6fd6; stroke-width: 2; } .curve.points { stroke: none; } .dot { fill: #e0632b; r: 2px; }
"""
"""Fixed colours: a picture in a text has no page to take them from."""


def picture(stages: list[CurriculumStage], draws: Draws) -> str:
    """One SVG: a panel for each length bucket and each source, grey lines where stages end."""
    titles, num_buckets = names(stages), len(stages[0].cfg.data.length_bounds) + 1
    totals = draws.drawn[:, :num_buckets].sum(axis=1)
    windows = np.array_split(np.arange(len(totals)), min(WINDOWS, len(totals)))
    x = np.array([totals[: w[0]].sum() + totals[w].sum() / 2 for w in windows])
    curves = [
        np.array([tokens[w].sum(axis=0) / totals[w].sum() for w in windows])
        for tokens in (draws.wanted, draws.drawn)
    ]
    ends = [totals[draws.stage <= stage.number].sum() for stage in stages]
    panels = []
    for i, title in enumerate(titles):
        styles = ((curves[0], "line"), (curves[1], "points"))
        series = [Series(style, x, 100 * curve[:, i], x, style) for curve, style in styles]
        top = 100 * max(curve[:, i].max() for curve in curves)
        series += [
            Series("end", np.full(2, e), np.array([0, top]), np.zeros(2), "faint") for e in [0.0, *ends]
        ]
        drawing = re.search(r"<svg[^>]*>(.*)</svg>", line_chart("", series, zero=True))
        assert drawing is not None
        column, row = (0, i) if i < num_buckets else (1, i - num_buckets)
        body = f'<text class="title" x="{LEFT}" y="-22">{escape(title)}, % of tokens</text>{drawing[1]}'
        inner = WIDTH - LEFT - RIGHT
        for stage, left, right in zip(stages, [0.0, *ends], ends, strict=False):
            middle = LEFT + inner * (left + right) / 2 / ends[-1]
            body += f'<text x="{middle:.1f}" y="-4">{escape(stage.name)}</text>'
        place = f"translate({column * WIDTH} {HEAD + row * (HEIGHT + HEAD)})"
        panels.append(f'<g transform="{place}">{body}</g>')
    rows = max(num_buckets, len(titles) - num_buckets)
    key = (
        f'<text class="title" x="{LEFT}" y="16">line: configured; dots: drawn, in {len(windows)} parts</text>'
    )
    size = f"0 -20 {2 * WIDTH} {20 + rows * (HEIGHT + HEAD)}"
    body = f'<g transform="translate(0 -20)">{key}</g>{"".join(panels)}'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{size}"><style>{PLAIN}</style>'
        f'<rect y="-20" width="100%" height="100%" fill="#fff"/>{body}</svg>\n'
    )


def main(argv: list[str] | None = None) -> int:
    """Write the picture and print the table; 1 if a stage is off by over 1 %, 2 for a bad configuration."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--scale", type=float, default=1e9, metavar="TOKENS")
    parser.add_argument("settings", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args(argv)
    try:
        stages = scale(read_config(args.settings), args.scale)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    draws = simulate(stages)
    args.out.write_text(picture(stages, draws), encoding="utf-8")
    lines, worst = table(stages, draws)
    print("\n".join(lines))
    print(f"largest error: {worst:.2%} of the stage's tokens, allowed {TOLERANCE:.0%}")
    return int(worst > TOLERANCE)


if __name__ == "__main__":
    raise SystemExit(main())
