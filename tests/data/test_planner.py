"""Rows are planned from lengths alone, so a thousand million tokens take seconds here."""

import json
import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.config import DataConfig, LongDocuments, Packing, SourceConfig
from data.dataset import TokenDataset
from data.mixture import Mixture
from data.packing import Piece
from data.planner import Counts, Planner, build_units

ROOT = Path(__file__).resolve().parents[2]
MODES: list[dict[str, Any]] = [
    {"packing": Packing.concatenate},
    {"packing": Packing.best_fit},
    {"packing": Packing.best_fit, "long_documents": LongDocuments.truncate},
]
steps = st.tuples(
    st.integers(1, 60),  # row_tokens
    st.integers(1, 6),  # rows
    st.tuples(st.integers(0, 3), st.integers(1, 3)),  # weights of two sources
    st.none() | st.tuples(st.integers(1, 3), st.integers(0, 3)),  # length shares
)
cases = st.fixed_dictionaries(
    {
        "mode": st.sampled_from(MODES),
        "lengths": st.lists(st.integers(0, 90), max_size=30),
        "window": st.integers(1, 12),
        "steps": st.lists(steps, min_size=1, max_size=12),
        "seed": st.integers(0, 5),
    }
)


def planner_of(
    lengths: Sequence[Sequence[int]], *, seed: int = 0, buckets: bool = True, **settings: Any
) -> Planner:
    sources = settings.pop("sources", [SourceConfig(path="x")] * len(lengths))
    cfg = DataConfig(sources=sources, eval_fraction=0, **settings)
    arrays = [np.array(numbers, np.int64) for numbers in lengths]
    return Planner(build_units(arrays, cfg, split="train", seed=seed, buckets=buckets), cfg)


def planner_of_case(case: dict[str, Any]) -> Planner:
    lengths = [[*case["lengths"], 2, 30], [5, 25]]  # both sources have both buckets
    return planner_of(lengths, window=case["window"], length_bounds=[20], seed=case["seed"], **case["mode"])


def run(planner: Planner, plan: Sequence[tuple]) -> Iterator[tuple[int, list[list[Piece]], Counts]]:
    for row_tokens, num_rows, weights, shares in plan:
        yield row_tokens, *planner.plan(row_tokens, num_rows, Mixture(weights, shares))


@given(cases)
def test_no_token_is_lost_or_doubled_except_as_counted(case: dict[str, Any]) -> None:
    planner, total = planner_of_case(case), Counts()
    best_fit = case["mode"]["packing"] is Packing.best_fit
    places: dict[int, list[tuple[int, int]]] = {}
    for row_tokens, rows, counts in run(planner, case["steps"]):
        total.add(counts)
        assert counts.real_tokens + counts.padding_tokens == len(rows) * row_tokens
        filled = [sum(piece.length - 1 for piece in row) for row in rows]
        assert max(filled) <= row_tokens
        assert sum(filled) == counts.real_tokens
        assert best_fit or min(filled) == row_tokens
        for unit, position, length in (piece for row in rows for piece in row):
            assert length > 1
            assert not best_fit or planner._units[unit].order.find(position)[1] >= length
            places.setdefault(unit, []).append((position, position + length))
    state = planner.state_dict()
    taken = sum(end - begin for spans in places.values() for begin, end in spans)
    assert taken == sum(state["taken"]) == sum(total.source_tokens) == sum(total.bucket_tokens)
    for unit, position, length in state["window"]:
        places.setdefault(unit, []).append((position, position + length))
    left_out = 0
    for unit, spans in places.items():
        ends = [0, *(place for span in sorted(spans) for place in span), state["positions"][unit]]
        assert ends == sorted(ends), "no token is in two pieces"
        left_out += sum(high - low for low, high in zip(ends[::2], ends[1::2], strict=True))
    untouched = [n for unit, n in enumerate(state["positions"]) if unit not in places]
    assert left_out + sum(untouched) == total.truncated_tokens + total.one_token_documents
    assert best_fit or left_out == 0


@given(cases, st.integers(0, 11))
def test_resume_is_bitwise(case: dict[str, Any], cut: int) -> None:
    straight, before, after = (planner_of_case(case) for _ in range(3))
    whole = list(run(straight, case["steps"]))
    list(run(before, case["steps"][:cut]))
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    assert list(run(after, case["steps"][cut:])) == whole[cut:]
    assert after.state_dict() == straight.state_dict()


@given(cases)
def test_steps_may_be_cut_anywhere(case: dict[str, Any]) -> None:
    whole, by_row = planner_of_case(case), planner_of_case(case)
    single = [(tokens, 1, *rest) for tokens, rows, *rest in case["steps"] for _ in range(rows)]
    expected = [row for _, rows, _ in run(whole, case["steps"]) for row in rows]
    assert [row for _, rows, _ in run(by_row, single) for row in rows] == expected
    assert whole.state_dict() == by_row.state_dict()


def test_best_fit_waits_for_no_document_longer_than_the_window() -> None:
    lengths = np.random.default_rng(1).integers(2, 60, 400)
    planner = planner_of([lengths.tolist()], buckets=False, packing=Packing.best_fit, window=16)
    rows = planner.plan(64, 300, Mixture((1.0,))).rows
    order = {piece.position: n for n, row in enumerate(rows) for piece in row}
    positions = sorted(order)
    waits = [order[position] for position in positions]
    drawn_before = np.maximum.accumulate(waits)  # the latest row among documents drawn so far
    assert (drawn_before - waits).max() <= 16, "each row takes the oldest: after 16 rows none is left"


def test_a_unit_is_a_bucket_with_an_order_of_its_own() -> None:
    cfg = DataConfig(sources=[SourceConfig(path="x")] * 2, eval_fraction=0, length_bounds=[10, 20])
    lengths = [np.array([9] * 30 + [10] * 30 + [19, 20]), np.array([9, 0])]
    units = build_units(lengths, cfg, split="train", seed=1, buckets=True)
    documents = [(unit.source, unit.bucket, unit.order.documents.tolist()) for unit in units]
    expected = [(0, 0, [*range(30)]), (0, 1, [*range(30, 61)]), (0, 2, [61]), (1, 0, [0])]
    assert documents == expected, "a document as long as a bound is above it"
    equal = [np.array([9] * 30 + [10] * 30)]
    short, medium = (unit.order for unit in build_units(equal, cfg, split="train", seed=1, buckets=True))
    visits = [[order.find(length * n)[0] for n in range(30)] for order, length in ((short, 9), (medium, 10))]
    assert [document + 30 for document in visits[0]] != visits[1]


def test_shares_hold_from_the_first_rows_on() -> None:
    """Long documents, which only an empty row can hold, do not wait behind short ones."""
    rng = np.random.default_rng(0)
    lengths = np.concatenate([rng.integers(10, 1000, 5000), rng.integers(5000, 100_000, 300)])
    planner = planner_of([lengths.tolist()], length_bounds=[4096], packing=Packing.best_fit)
    counts = planner.plan(4096, 100, Mixture((1.0,), (0.6, 0.4))).counts
    assert abs(counts.bucket_tokens[1] / sum(counts.bucket_tokens) - 0.4) < 0.05


def test_documents_longer_than_a_row_are_split_or_truncated() -> None:
    mixture = Mixture((1.0,))
    split = planner_of([[25]], buckets=False, packing=Packing.best_fit, window=1)
    rows, counts = split.plan(9, 3, mixture)
    assert rows == [[(0, 0, 10)], [(0, 10, 10)], [(0, 20, 5)]]
    assert (counts.real_tokens, counts.padding_tokens) == (22, 5)
    assert (counts.splits, counts.documents) == (3, 1), "the window has begun with the document again"
    truncate = planner_of([[25]], buckets=False, window=1, **MODES[2])
    rows, counts = truncate.plan(9, 2, mixture)
    assert rows == [[(0, 0, 10)], [(0, 25, 10)]]
    assert (counts.splits, counts.documents, counts.truncated_tokens) == (0, 2, 30)


def test_counts_of_concatenation() -> None:
    planner = planner_of([[10] * 4], buckets=False)
    counts = planner.plan(14, 2, Mixture((1.0,))).counts  # rows end inside the second and at the third's end
    assert (counts.documents, counts.splits, counts.real_tokens) == (3, 1, 28)


def log_uniform(rng: np.random.Generator, number: int, low: int, high: int) -> np.ndarray:
    return np.exp(rng.uniform(np.log(low), np.log(high), number)).astype(np.int64)


# Table 6 of arXiv 2501.08313, its 358 B tokens scaled to 1e9: row_tokens, tokens, weights of four sources,
# shares of lengths. The fifth source is long QA, which takes 10 % of the last fifth of each stage.
STAGES = [
    (131_072, 838_000_000, (0.4, 0.3, 0.2, 0.1), (0.3, 0.7, 0.0)),
    (524_288, 89_000_000, (0.3, 0.3, 0.1, 0.3), (0.35, 0.35, 0.3)),
    (1_048_576, 73_000_000, (0.25, 0.15, 0.2, 0.4), (0.3, 0.3, 0.4)),
]


def recipe(step_tokens: int, transition: float = 0.1) -> Iterator[tuple[int, int, Mixture]]:
    """Row tokens, rows and mixture of each step; weights go linearly over the first part of each stage."""
    weights = shares = None
    for row_tokens, tokens, to_weights, to_shares in STAGES:
        from_weights, from_shares = weights or to_weights, shares or to_shares
        num_steps = tokens // step_tokens
        for step in range(num_steps):
            part = min(1.0, step / (transition * num_steps))
            qa = 0.1 if step >= 0.8 * num_steps else 0.0
            mixed = [(1 - part) * a + part * b for a, b in zip(from_weights, to_weights, strict=True)]
            lengths = tuple((1 - part) * a + part * b for a, b in zip(from_shares, to_shares, strict=True))
            mixture = Mixture((*((1 - qa) * weight for weight in mixed), qa), lengths)
            yield row_tokens, max(1, step_tokens // row_tokens), mixture
        weights, shares = to_weights, to_shares


@pytest.mark.parametrize("packing", list(Packing))
def test_shares_of_the_paper_within_one_percent(packing: Packing) -> None:
    rng = np.random.default_rng(0)
    bounds = [(100, 32_768), (32_768, 131_072), (131_072, 1_000_000)]
    lengths = [
        np.concatenate(
            [log_uniform(rng, n, *bound) for n, bound in zip((20_000, 900, 80), bounds, strict=True)]
        )
        for _ in range(5)
    ]
    planner = planner_of([numbers.tolist() for numbers in lengths], packing=packing)
    began, drift = time.perf_counter(), 0.0
    expected, found = np.zeros(8), np.zeros(8)
    for row_tokens, num_rows, mixture in recipe(4_194_304):
        counts = planner.plan(row_tokens, num_rows, mixture).counts
        assert mixture.length_shares is not None
        wanted = np.array([*mixture.weights, *mixture.length_shares])
        got = np.array(counts.source_tokens + counts.bucket_tokens)
        expected += wanted * got[5:].sum()
        found += got
        drift = max(drift, np.abs(found - expected).max() / 1e9)
    total = found[:5].sum()
    assert total == found[5:].sum() > 0.98e9
    off, seconds = np.abs(found - expected).max() / total, time.perf_counter() - began
    print(f"{packing}: shares off by {off:.3%} of all tokens, on the way by {drift:.3%}; {seconds:.1f} s")
    assert off < 0.01
    assert drift < 0.01


def test_exhausted_units_leave_the_bucket_shares_alone(caplog: pytest.LogCaptureFixture) -> None:
    rng = np.random.default_rng(0)
    lengths = [rng.integers(2, 200, 500).tolist() for _ in range(2)]
    sources = [SourceConfig(path="small", max_epochs=2.0), SourceConfig(path="endless")]
    planner = planner_of(lengths, sources=sources, length_bounds=[100], window=8, **MODES[1])
    mixture, total = Mixture((0.5, 0.5), (0.25, 0.75)), Counts()
    with caplog.at_level(logging.WARNING):
        for _ in range(50):
            total.add(planner.plan(512, 16, mixture).counts)
    epoch = sum(lengths[0])
    assert 1.9 * epoch < total.source_tokens[0] <= 2 * epoch < total.source_tokens[1]
    shares = np.array(total.bucket_tokens) / sum(total.bucket_tokens)
    assert abs(shares - [0.25, 0.75]).max() < 0.01
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == 2
    assert all("data.sources[0] (small)" in text for text in warnings)


def test_an_exhausted_bucket_leaves_its_share_to_all_and_then_the_run_ends() -> None:
    sources = [SourceConfig(path="a", max_epochs=1.0)]
    planner = planner_of([[50] * 10 + [5] * 1000], sources=sources, length_bounds=[20], window=1, **MODES[1])
    mixture, total = Mixture((1.0,), (0.5, 0.5)), Counts()

    def plan_all() -> None:
        for _ in range(1000):
            total.add(planner.plan(64, 1, mixture).counts)

    with pytest.raises(
        ValueError, match=r"given all of its max_epochs; raise data\.sources\[\*\]\.max_epochs"
    ):
        plan_all()
    assert total.bucket_tokens[1] == 500, "all but a row"
    assert 4920 <= total.bucket_tokens[0] < 5000, "all but a row"


@pytest.mark.parametrize("packing", list(Packing))
def test_resume_after_exhaustion_is_bitwise(packing: Packing) -> None:
    lengths = [[30] * 8, [7] * 50, [3] * 90]
    sources = [SourceConfig(path="a", max_epochs=1.5), SourceConfig(path="b"), SourceConfig(path="c")]
    settings: dict[str, Any] = {"sources": sources, "packing": packing, "window": 3, "buckets": False}
    straight = planner_of(lengths, **settings)
    mixture = Mixture((0.5, 0.3, 0.2))
    for _ in range(30):
        resumed = planner_of(lengths, **settings)
        resumed.load_state_dict(straight.state_dict())
        assert resumed.plan(20, 2, mixture) == straight.plan(20, 2, mixture)
        assert resumed.state_dict() == straight.state_dict()
    assert straight.state_dict()["taken"][0] <= 1.5 * 240


def test_lengths_as_they_come_in_a_bucketed_planner() -> None:
    planner = planner_of([[10] * 300 + [50] * 20, [40] * 10], length_bounds=[20], window=8, **MODES[1])
    counts = planner.plan(256, 200, Mixture((0.75, 0.25))).counts
    total = sum(counts.source_tokens)
    assert abs(counts.source_tokens[0] / total - 0.75) < 0.01
    assert abs(counts.bucket_tokens[1] / total - (0.75 * 0.25 + 0.25)) < 0.01


def test_padding_is_under_one_percent(license_corpus: Path) -> None:
    embedded = ROOT / "corpus" / "python"
    prefix, row_tokens = (embedded, 8192) if embedded.with_suffix(".idx").exists() else (license_corpus, 1024)
    lengths = TokenDataset(prefix).document_lengths
    planner = planner_of([lengths.tolist()], buckets=False, packing=Packing.best_fit)
    counts = planner.plan(row_tokens, 2 * int(lengths.sum()) // row_tokens, Mixture((1.0,))).counts
    print(f"{prefix.name}: padding {counts.padding_fraction:.3%} of rows of {row_tokens} tokens")
    assert 0 < counts.padding_fraction < 0.01


def test_planning_takes_little_time() -> None:
    lengths = log_uniform(np.random.default_rng(0), 100_000, 50, 4000)
    planner = planner_of([lengths.tolist()], packing=Packing.best_fit)
    milliseconds = {}
    for row_tokens, num_rows in ((8192, 4096), (1_048_576, 32)):
        began = time.process_time()
        planner.plan(row_tokens, num_rows, Mixture((1.0,)))
        milliseconds[row_tokens] = round(1000 * (time.process_time() - began) / num_rows, 2)
    print(f"milliseconds to plan a row: {milliseconds}")
    assert milliseconds[8192] < 5, "ten times what it should take"
    assert milliseconds[1_048_576] < 250, "ten times what it should take"
