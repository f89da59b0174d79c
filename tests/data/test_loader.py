import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data.dataset import DatasetWriter, TokenDataset
from data.loader import Loader, integer_shares
from data.packing import NO_TARGET, Batch

MakeDataset = Callable[..., TokenDataset]
Sources = list[tuple[TokenDataset, float]]
LENGTHS = [5, 1, 17, 3, 90, 2, 8, 8, 1, 30]


@pytest.fixture(scope="session")
def sources(make_dataset: MakeDataset) -> Sources:
    return [(make_dataset(LENGTHS), 0.7), (make_dataset(LENGTHS, first_token=1000), 0.3)]


def build(sources: Sources, **changes: Any) -> Loader:
    settings: dict[str, Any] = {
        "split": "train",
        "row_tokens": 16,
        "global_rows": 8,
        "micro_rows": 1,
        "rank": 0,
        "size": 1,
    }
    settings |= {"seed": 3, "vocab_size": 60_000, "eval_fraction": 0.2}
    return Loader(sources, **(settings | changes))


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
    assert state["tokens"] == state["rows"] == [0, 0]
    other = build(sources)
    other.load_state_dict(state)
    other.next_step()
    assert state["tokens"] == state["rows"] == [0, 0]


def test_row_length_may_change_without_losing_or_repeating_tokens(make_dataset: MakeDataset) -> None:
    source = [(make_dataset([50] * 20), 1.0)]
    long, short = build(source, row_tokens=49, eval_fraction=0), build(source, row_tokens=24, eval_fraction=0)
    seen = [row[:49] for row in rows_of(long, 1)]
    short.load_state_dict(long.state_dict())
    seen += [row[:24] for row in rows_of(short, 3)]
    counts = Counter(token for row in seen for token in row)
    assert len(counts) == 8 * 49 + 24 * 24 and set(counts.values()) == {1}


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
        rows = loader.state_dict()["rows"]
        assert sum(rows) == n
        for weight, count in zip(weights, rows, strict=True):
            assert abs(count - n * weight / sum(weights)) < 1


def test_changed_weights_start_a_new_mixture(sources: Sources) -> None:
    loader = build(sources)
    for _ in range(5):
        loader.next_step()
    changed = build([(sources[0][0], 1.0), (sources[1][0], 3.0)])
    changed.load_state_dict(loader.state_dict())
    assert changed.state_dict()["tokens"] == loader.state_dict()["tokens"]
    changed.next_step()
    assert changed.state_dict()["rows"] == [2, 6]


def test_shares_are_the_weights_as_written() -> None:
    assert integer_shares([0.7, 0.3]) == integer_shares([7, 3]) == [7, 3]
    assert integer_shares([1e-3, 1]) == [1, 1000]


def test_micro_batches_of_a_step_have_offsets_of_one_width(sources: Sources) -> None:
    batches = build(sources).next_step()
    assert len(batches) == 8 and all(isinstance(batch, Batch) for batch in batches)
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
    for change in ({"seed": 4}, {"eval_fraction": 0.5}, {"split": "eval"}):
        with pytest.raises(ValueError, match=f"saved data order has {next(iter(change))}="):
            build(sources, **change).load_state_dict(state)
