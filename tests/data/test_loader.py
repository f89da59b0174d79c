import json
import time
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data.config import DataConfig, Packing, SourceConfig
from data.dataset import DatasetWriter, TokenDataset
from data.loader import Loader, Shape
from data.mixture import Mixture
from data.packing import NO_TARGET, Batch
from data.planner import Counts

MakeDataset = Callable[..., TokenDataset]
Sources = list[tuple[TokenDataset, float]]
LENGTHS = [5, 1, 17, 3, 90, 2, 8, 8, 1, 30]


@pytest.fixture(scope="session")
def sources(make_dataset: MakeDataset) -> Sources:
    return [(make_dataset(LENGTHS), 0.7), (make_dataset(LENGTHS, first_token=1000), 0.3)]


def build(sources: Sources, /, **changes: Any) -> Loader:
    """A loader of small steps; a change may concern the shape, the configuration or the loader."""

    def take(**defaults: Any) -> dict[str, Any]:
        return {name: changes.pop(name, value) for name, value in defaults.items()}

    shape = Shape(**take(row_tokens=16, global_rows=8, micro_rows=1))
    arguments = take(split="train", rank=0, size=1, seed=3, vocab_size=60_000, buckets=False)
    configs = [SourceConfig(path=dataset.prefix, weight=weight) for dataset, weight in sources]
    cfg = DataConfig(**({"sources": configs, "eval_fraction": 0.2} | changes))
    return Loader([dataset for dataset, _ in sources], cfg, shape=shape, **arguments)


def rows_of(loader: Loader, steps: int) -> list[list[int]]:
    """Tokens and targets of a one-rank loader's rows, in global order."""
    batches = [batch for _ in range(steps) for batch in loader.next_step()]
    return [
        torch.cat(row).tolist() for batch in batches for row in zip(batch.tokens, batch.targets, strict=True)
    ]


@pytest.mark.parametrize(("size", "micro_rows"), [(1, 8), (2, 1), (2, 4), (4, 2), (8, 1)])
def test_rows_do_not_depend_on_the_layout(sources: Sources, size: int, micro_rows: int) -> None:
    loaders = [build(sources, rank=rank, size=size, micro_rows=micro_rows) for rank in range(size)]
    rows = []
    for _ in range(5):
        for micro_batch in zip(*(loader.next_step() for loader in loaders), strict=True):
            for (
                batch
            ) in micro_batch:  # micro-batch by micro-batch, rank by rank, row by row: the global order
                assert batch.tokens.shape == (micro_rows, 16)
                rows += [torch.cat(row).tolist() for row in zip(batch.tokens, batch.targets, strict=True)]
    assert rows == rows_of(build(sources), 5)
    states = [loader.state_dict() for loader in loaders]
    assert all(state == states[0] for state in states)


@pytest.mark.parametrize("changes", [{}, {"size": 2, "micro_rows": 2}])
def test_resume_goes_on_bitwise(sources: Sources, changes: dict[str, int]) -> None:
    straight = build(sources, **changes)
    before = build(sources)
    for _ in range(4):
        straight.next_step()
        before.next_step()
    state = json.loads(json.dumps(before.state_dict()))
    resumed = build(sources, **changes)
    resumed.load_state_dict(state)
    for _ in range(30):  # more than an epoch
        for here, there in zip(straight.next_step(), resumed.next_step(), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True))
    assert straight.state_dict() == resumed.state_dict() != state


def test_state_is_not_touched_by_later_steps(sources: Sources) -> None:
    loader = build(sources)
    state = loader.state_dict()
    loader.next_step()
    assert state == build(sources).state_dict()
    assert state["positions"] == [0, 0]
    other = build(sources)
    other.load_state_dict(state)
    other.next_step()
    assert state == build(sources).state_dict()


def test_row_length_may_change_without_losing_or_repeating_tokens(make_dataset: MakeDataset) -> None:
    source = [(make_dataset([50] * 20), 1.0)]
    long, short = build(source, row_tokens=49, eval_fraction=0), build(source, row_tokens=24, eval_fraction=0)
    seen = [row[:49] for row in rows_of(long, 1)]
    short.load_state_dict(long.state_dict())
    seen += [row[:24] for row in rows_of(short, 3)]
    counts = Counter(token for row in seen for token in row)
    assert len(counts) == 8 * 49 + 24 * 24
    assert set(counts.values()) == {1}


def test_epoch_trains_on_each_document_once_and_eval_on_the_rest(make_dataset: MakeDataset) -> None:
    dataset = make_dataset([16] * 40)  # with rows of 15 + 1 tokens: one document a row
    firsts = {}
    for split in ("train", "eval"):
        loader = build([(dataset, 1.0)], split=split, row_tokens=15, global_rows=1)
        firsts[split] = [loader.next_step()[0].tokens[0, 0].item() for _ in range(80)]
    num_eval = len(set(firsts["eval"]))
    assert set(firsts["train"]).isdisjoint(firsts["eval"])
    assert sorted(firsts["train"][: 40 - num_eval] + firsts["eval"][:num_eval]) == list(range(0, 640, 16))


@given(st.lists(st.integers(1, 20), min_size=1, max_size=3), st.integers(1, 60))
def test_mixture_stays_within_one_row_of_the_weights(
    sources: Sources, weights: list[int], num_rows: int
) -> None:
    loader = build([(sources[0][0], weight) for weight in weights], row_tokens=1, global_rows=1)
    for n in range(1, num_rows + 1):
        loader.next_step()
        rows = [tokens // 2 for tokens in loader.state_dict()["source_tokens"]]
        assert sum(rows) == n
        for weight, count in zip(weights, rows, strict=True):
            assert abs(count - n * weight / sum(weights)) < 1


def test_changed_weights_hold_from_the_next_row_on(sources: Sources) -> None:
    loader = build(sources)
    for _ in range(5):
        loader.next_step()
    changed = build([(sources[0][0], 1.0), (sources[1][0], 3.0)])
    changed.load_state_dict(loader.state_dict())
    changed.next_step()
    before, after = loader.state_dict()["source_tokens"], changed.state_dict()["source_tokens"]
    assert before == [28 * 17, 12 * 17]
    assert after == [30 * 17, 18 * 17]


def test_micro_batches_of_a_step_have_offsets_of_one_width(sources: Sources) -> None:
    batches = build(sources).next_step()
    assert len(batches) == 8
    assert all(isinstance(batch, Batch) for batch in batches)
    assert len({batch.offsets.shape for batch in batches}) == 1
    assert all(batch.offsets[0, -1] == 16 for batch in batches)


def test_a_document_longer_than_rows_goes_on_as_a_new_document(make_dataset: MakeDataset) -> None:
    rows = build([(make_dataset([100]), 1.0)], eval_fraction=0, global_rows=5).next_step()
    for n, batch in enumerate(rows):
        assert batch.offsets.tolist() == [[0, 16, 16] if batch.offsets.shape[1] == 3 else [0, 16]]
        assert batch.tokens[0].tolist() == list(range(17 * n, 17 * n + 16))
        assert NO_TARGET not in batch.targets


@pytest.mark.parametrize(("size", "micro_rows"), [(3, 1), (2, 8), (1, 5)])
def test_rows_that_do_not_divide_are_refused(sources: Sources, size: int, micro_rows: int) -> None:
    with pytest.raises(
        ValueError, match=rf"8 rows .*batch.micro_rows={micro_rows} x data-parallel size={size}"
    ):
        build(sources, size=size, micro_rows=micro_rows)


def test_unknown_split_and_missing_sources_are_refused(sources: Sources) -> None:
    with pytest.raises(ValueError, match="split='test' must be 'train' or 'eval'"):
        build(sources, split="test")
    with pytest.raises(ValueError, match=r"data\.sources is empty"):
        build([])


def test_manifest_with_too_large_ids_is_refused_at_once(sources: Sources) -> None:
    with pytest.raises(ValueError, match=r"token id 164, outside model\.vocab_size=164"):
        build(sources[:1], vocab_size=164)


@pytest.mark.parametrize("bad", [[99, 0], [0, 0, 99]])
def test_token_outside_the_vocabulary_is_named(tmp_path: Path, bad: list[int]) -> None:
    with DatasetWriter(tmp_path / "d", vocab_size=100) as writer:
        for document in ([0, 0, 1], bad):
            writer.add(np.array(document))
    (tmp_path / "d.json").unlink()  # Megatron's own files have no manifest
    loader = build([(TokenDataset(tmp_path / "d"), 1.0)], vocab_size=50, eval_fraction=0)
    with pytest.raises(ValueError, match=r"/d: document 1 has token id 99, outside model\.vocab_size=50"):
        loader.next_step()


def test_state_of_other_data_is_refused(sources: Sources, make_dataset: MakeDataset) -> None:
    state = build(sources).state_dict()
    other = make_dataset([3, 4])
    for changed in (sources[:1], [sources[0], (other, 0.3)]):
        with pytest.raises(ValueError, match=rf"fingerprints=.*{changed[-1][0].prefix}"):
            build(changed).load_state_dict(state)
    with pytest.raises(ValueError, match=rf"; changed: {other.prefix}\)"):
        build([sources[0], (other, 0.3)]).load_state_dict(state)
    for change in ({"seed": 4}, {"eval_fraction": 0.5}, {"split": "eval"}):
        with pytest.raises(ValueError, match=f"saved data order has {next(iter(change))}="):
            build(sources, **change).load_state_dict(state)
    for change in ({"packing": Packing.best_fit}, {"buckets": True}):
        with pytest.raises(ValueError, match=r"saved data order has (packing|length_bounds)="):
            build(sources, **change).load_state_dict(state)
    del state["packing"]
    with pytest.raises(ValueError, match="saved data order has packing=None"):
        build(sources).load_state_dict(state)


@pytest.mark.parametrize(
    ("lengths", "changes"),
    [
        ([4], {"split": "eval", "eval_fraction": 0.5}),
        ([4, 4], {"split": "eval", "eval_fraction": 0}),
        ([0], {"eval_fraction": 0.1}),
        ([1, 1, 0], {"packing": Packing.best_fit, "eval_fraction": 0}),
    ],
)
def test_empty_split_is_refused(
    make_dataset: MakeDataset, lengths: list[int], changes: dict[str, Any]
) -> None:
    dataset = make_dataset(lengths)
    split = changes.get("split", "train")
    with pytest.raises(
        ValueError, match=rf"{dataset.prefix}: the {split} split is empty .*data.eval_fraction"
    ):
        build([(dataset, 1.0)], **changes)


BEST_FIT = {"packing": Packing.best_fit, "window": 4, "length_bounds": [3, 20], "length_shares": [1, 2, 3]}
GROWING = [
    (Shape(16, 8, 1), Mixture((0.7, 0.3), (1, 2, 3))),
    (Shape(16, 8, 1), Mixture((0.7, 0.3))),
    (Shape(40, 4, 1), Mixture((0.61, 0.39), (1, 1.5, 0))),
    (Shape(7, 16, 2), Mixture((0, 1), (0.25, 0.5, 0.25))),
    (Shape(100, 4, 1), Mixture((0.123, 0.877), (3, 1, 3))),
] * 4


def steps_of(loader: Loader, plan: list[tuple[Shape, Mixture]]) -> list[list[list[list[int]]]]:
    return [[[t.tolist() for t in batch] for batch in loader.next_step(*sizes)] for sizes in plan]


@pytest.mark.parametrize("packing", list(Packing))
@pytest.mark.parametrize("cut", [1, 2, 3, 7, 14])
def test_resume_inside_a_changing_mixture(sources: Sources, packing: Packing, cut: int) -> None:
    changes = BEST_FIT | {"packing": packing}
    straight, before, after = (build(sources, **changes) for _ in range(3))
    whole = steps_of(straight, GROWING)
    steps_of(before, GROWING[:cut])
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    assert steps_of(after, GROWING[cut:]) == whole[cut:]
    assert after.state_dict() == straight.state_dict()


@pytest.mark.parametrize("packing", list(Packing))
def test_rows_of_a_changing_mixture_do_not_depend_on_the_layout(sources: Sources, packing: Packing) -> None:
    changes = BEST_FIT | {"packing": packing}
    alone = build(sources, **changes)
    ranks = [build(sources, rank=rank, size=2, **changes) for rank in range(2)]
    for shape, mixture in GROWING:
        expected = [row for batch in alone.next_step(shape, mixture) for row in rows_in(batch)]
        steps = [loader.next_step(shape, mixture) for loader in ranks]
        found = [row for micro in zip(*steps, strict=True) for batch in micro for row in rows_in(batch)]
        assert found == expected
        assert ranks[0].state_dict() == ranks[1].state_dict() == alone.state_dict()


def rows_in(batch: Batch) -> list[tuple[list[int], ...]]:
    """Rows of a batch, their offsets without what pads them to the width of a rank's step."""
    return [
        (tokens, targets, sorted(set(offsets)), [length])
        for tokens, targets, offsets, length in zip(*(t.tolist() for t in batch), strict=True)
    ]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=20), st.lists(st.integers(1, 30), max_size=12))
def test_best_fit_gives_every_token_once(
    make_dataset: MakeDataset, lengths: list[int], rows: list[int]
) -> None:
    dataset = make_dataset([*lengths, 2])
    loader = build([(dataset, 1.0)], eval_fraction=0, packing=Packing.best_fit, window=1)
    seen: Counter[int] = Counter()
    for row_tokens in rows:
        for tokens, targets, offsets, (length,) in rows_in(loader.next_step(Shape(row_tokens, 1, 1))[0]):
            for low, high in pairwise(offset for offset in offsets if offset <= length):
                assert targets[low:high] == [token + 1 for token in tokens[low:high]]
                seen.update([*tokens[low:high], targets[high - 1]])
            assert set(tokens[length:]) <= {0}
            assert set(targets[length:]) <= {NO_TARGET}
    epochs = -(-loader.state_dict()["positions"][0] // dataset.num_tokens)
    assert max(seen.values(), default=0) <= epochs
    assert sum(seen.values()) == loader.state_dict()["taken"][0]


@pytest.mark.parametrize("packing", list(Packing))
def test_tokens_that_are_no_targets(make_dataset: MakeDataset, packing: Packing) -> None:
    source = [(make_dataset([5, 9, 12, 3]), 1.0)]  # ends: 4, 13, 25, 28
    plain = build(source, eval_fraction=0, packing=packing).next_step()
    masked = build(
        source, eval_fraction=0, packing=packing, no_loss_tokens=[6, 7], predict_end=False
    ).next_step()
    ends_seen = 0
    for a, b in zip(plain, masked, strict=True):
        hidden = torch.isin(a.targets, torch.tensor([4, 13, 25, 28, 6, 7]))
        ends_seen += int(hidden.sum())
        assert torch.equal(b.targets, a.targets.masked_fill(hidden, NO_TARGET))
        assert torch.equal(a.tokens, b.tokens)
        assert torch.equal(a.offsets, b.offsets)
    assert ends_seen > 10


def test_counts_are_since_the_last_read(sources: Sources) -> None:
    loader = build(sources, packing=Packing.best_fit, window=4)
    batches = loader.next_step() + loader.next_step()
    counts = loader.read_counts()
    assert counts.real_tokens == sum(int(batch.lengths.sum()) for batch in batches)
    assert counts.real_tokens + counts.padding_tokens == 16 * 16
    assert counts.padding_fraction > 0
    assert sum(counts.source_tokens) == sum(counts.bucket_tokens) == sum(loader.state_dict()["taken"])
    assert loader.read_counts() == Counts()
    loader.next_step()
    assert 0 < loader.read_counts().real_tokens <= 8 * 16


def test_a_mixture_that_does_not_fit_the_data_is_refused(sources: Sources) -> None:
    with pytest.raises(ValueError, match=r"weights \(1,\); it must have 2, one for each of data\.sources"):
        build(sources).next_step(None, Mixture((1,)))
    with pytest.raises(
        ValueError, match=r"it must have 2, one for each of data\.sources, all >= 0 and not all 0"
    ):
        build(sources).next_step(None, Mixture((0, 0)))
    with pytest.raises(ValueError, match="all >= 0 and not all 0"):
        build(sources).next_step(None, Mixture((2, -1)))
    with pytest.raises(ValueError, match="all >= 0 and not all 0"):
        build(sources, buckets=True).next_step(None, Mixture((1, 1), (1, float("nan"), 1)))
    with pytest.raises(ValueError, match=r"need length buckets; set data\.length_shares"):
        build(sources).next_step(None, Mixture((1, 1), (1, 1, 1)))
    with pytest.raises(ValueError, match=r"must have 3 values, one more than data\.length_bounds"):
        build(sources, buckets=True).next_step(None, Mixture((1, 1), (1, 1)))
    with pytest.raises(
        ValueError, match=r"data\.length_shares\[2\]=0\.5, but no source .* set the share to 0"
    ):
        build(sources, length_shares=[0.5, 0, 0.5])


def test_eval_knows_no_buckets_and_no_epochs(make_dataset: MakeDataset) -> None:
    dataset = make_dataset([3] * 20)
    cfg = [SourceConfig(path=dataset.prefix, max_epochs=0.5)]
    loader = build(
        [(dataset, 1.0)], split="eval", sources=cfg, length_bounds=[9], length_shares=[0, 1], row_tokens=50
    )
    assert len(loader.next_step()) == 8


@pytest.mark.parametrize("num_sources", [0, 1, 3])
def test_row_of_a_million_tokens_takes_little_time(tmp_path: Path, num_sources: int) -> None:
    """Less than 50 ms of one core; more documents take longer: here 500 tokens each, 5,300 in the corpus."""
    embedded = Path(__file__).resolve().parents[2] / "corpus/python"
    if not num_sources and not embedded.with_suffix(".idx").exists():
        pytest.skip("make test prepares corpus/python")
    sources = [] if num_sources else [(TokenDataset(embedded), 1.0)]
    for n in range(num_sources):
        with DatasetWriter(tmp_path / str(n), vocab_size=60_000) as writer:
            for length in np.random.default_rng(n).integers(100, 900, 2500):
                writer.add(np.zeros(length, np.int64))
        sources.append((TokenDataset(tmp_path / str(n)), n + 1.0))
    buckets = {"length_bounds": [300, 600], "length_shares": [0.3, 0.3, 0.4]} if num_sources > 1 else {}
    milliseconds = {}
    for packing in Packing:
        changes = {"packing": packing, "row_tokens": 2**20, "global_rows": 1, "eval_fraction": 0, **buckets}
        loader = build(sources, **changes)
        loader.next_step()
        seconds = []
        for _ in range(5):
            begin = time.process_time()
            loader.next_step()
            seconds.append(time.process_time() - begin)
        milliseconds[packing.value] = round(1000 * min(seconds), 1)
    print(f"milliseconds for a row of 2**20 tokens from {num_sources or 'embedded'} sources: {milliseconds}")
    assert max(milliseconds.values()) < 100, "twice what it should take, for slower machines"
