from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.dataset import TokenDataset
from data.stream import DocumentOrder, TokenStream, split_documents

MakeDataset = Callable[..., TokenDataset]
LENGTHS = [3, 0, 1, 7, 2, 0, 5, 40, 1, 1]


@pytest.fixture(scope="session")
def dataset(make_dataset: MakeDataset) -> TokenDataset:
    return make_dataset(LENGTHS)


def stream_of(
    dataset: TokenDataset, *, split: str = "train", eval_fraction: float = 0.3, seed: int = 1
) -> TokenStream:
    documents = split_documents(dataset.document_lengths, split=split, eval_fraction=eval_fraction)
    return TokenStream(dataset, DocumentOrder(dataset.document_lengths, documents, key=(seed, 0)))


@pytest.mark.parametrize("split", ["train", "eval"])
def test_each_epoch_has_each_document_once_and_whole(dataset: TokenDataset, split: str) -> None:
    documents = split_documents(dataset.document_lengths, split=split, eval_fraction=0.3)
    size = int(dataset.document_lengths[documents].sum())
    stream = stream_of(dataset, split=split)
    orders = []
    for epoch in range(4):
        span = stream.read(epoch * size, count=size)
        assert sorted(span.documents) == documents.tolist()
        for start, document in zip(span.starts, span.documents, strict=True):
            expected = np.empty(LENGTHS[document], np.int64)
            dataset.read(document, 0, expected)
            assert span.tokens[start : start + LENGTHS[document]].tolist() == expected.tolist()
        orders.append(tuple(span.documents))
    assert len(set(orders)) == len(orders) or split == "eval"


@given(st.integers(0, 500), st.integers(1, 200))
def test_any_span_equals_the_same_part_of_one_long_read(
    dataset: TokenDataset, position: int, count: int
) -> None:
    stream = stream_of(dataset)
    whole, part = stream.read(0, count=700), stream.read(position, count=count)
    assert part.tokens.tolist() == whole.tokens[position : position + count].tolist()
    inside = (whole.starts > position) & (whole.starts < position + count)
    assert part.starts.tolist() == [0, *(whole.starts[inside] - position)]
    assert part.documents.tolist()[1:] == whole.documents[inside].tolist()


def test_order_depends_on_seed_and_source_and_is_frozen(make_dataset: MakeDataset) -> None:
    dataset = make_dataset([1] * 12)

    def order(seed: int, source: int) -> list[int]:
        order = DocumentOrder(dataset.document_lengths, np.arange(12), key=(seed, source))
        return TokenStream(dataset, order).read(0, count=12).tokens.tolist()

    assert order(1, 0) == FROZEN_ORDER, "a saved run would not see the same data again"
    assert len({tuple(order(seed, source)) for seed in (1, 2) for source in (0, 1)}) == 4


FROZEN_ORDER = [2, 0, 1, 11, 4, 5, 6, 7, 8, 10, 3, 9]


def test_held_out_documents_are_frozen() -> None:
    held_out = split_documents(np.ones(100, np.int64), split="eval", eval_fraction=0.05)
    assert held_out.tolist() == FROZEN_EVAL, "documents that were held out would be trained on"


FROZEN_EVAL = [10, 21, 48, 68, 83]


@given(st.lists(st.integers(0, 3), min_size=0, max_size=60), st.floats(0, 1, exclude_max=True))
def test_splits_are_disjoint_and_complete(lengths: list[int], fraction: float) -> None:
    train, held_out = (
        split_documents(np.array(lengths, np.int64), split=split, eval_fraction=fraction)
        for split in ("train", "eval")
    )
    assert sorted([*train, *held_out]) == np.flatnonzero(lengths).tolist()
    if np.count_nonzero(lengths) >= 2 and fraction > 0:
        assert len(train)
        assert len(held_out)


def test_split_has_about_the_asked_fraction() -> None:
    held_out = split_documents(np.ones(100_000, np.int64), split="eval", eval_fraction=0.01)
    assert 900 < len(held_out) < 1100


def test_dataset_smaller_than_a_row_repeats_inside_it(make_dataset: MakeDataset) -> None:
    span = stream_of(make_dataset([2, 1]), eval_fraction=0).read(1, count=299)
    assert set(Counter(span.tokens.tolist()).values()) <= {99, 100}
    assert len(span.starts) >= 199


@given(st.integers(0, 700))
def test_places_in_the_order_agree_with_the_tokens(dataset: TokenDataset, position: int) -> None:
    stream = stream_of(dataset)
    document, rest = stream.order.find(position)
    span = stream.read(0, count=position + rest)
    assert span.documents[-1] == document
    assert span.ends[-1] == position + rest - 1
    assert stream.order.index(position) == (span.ends < position).sum()
    assert stream.order.index(position + rest) == len(span.ends)
    ends = np.append(span.starts[1:], len(span.tokens)) - 1
    assert span.ends.tolist() == ends.tolist()
