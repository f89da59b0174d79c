from itertools import pairwise

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from data.packing import NO_TARGET, Batch, Piece, Row, Window, pack_documents, pack_row, stack_rows

lengths_and_row = st.tuples(st.lists(st.integers(1, 30), min_size=1, max_size=40), st.integers(1, 40))


def pack(tokens: np.ndarray, starts: np.ndarray) -> Row:
    return pack_row(tokens, tokens, starts=starts)


def cut_rows(lengths: list[int], row_tokens: int) -> tuple[np.ndarray, list]:
    """The document of each stream token, whose id is its position, and all whole rows of the stream."""
    owner = np.repeat(np.arange(len(lengths)), lengths)
    rows = []
    for begin in range(0, len(owner) - row_tokens, row_tokens + 1):
        documents = owner[begin : begin + row_tokens + 1]
        starts = np.flatnonzero(np.diff(documents, prepend=-1))
        rows.append(pack(np.arange(begin, begin + row_tokens + 1), starts))
    return owner, rows


@given(lengths_and_row)
def test_inputs_are_every_stream_token_once_and_in_order(case: tuple[list[int], int]) -> None:
    lengths, row_tokens = case
    _, rows = cut_rows(lengths, row_tokens)
    for n, (tokens, *_) in enumerate(rows):
        begin = n * (row_tokens + 1)  # the stream token between two rows is a target only
        assert tokens.tolist() == list(range(begin, begin + row_tokens))


@given(lengths_and_row)
def test_target_is_the_next_token_of_the_same_document(case: tuple[list[int], int]) -> None:
    owner, rows = cut_rows(*case)
    for tokens, targets, *_ in rows:
        for token, target in zip(tokens, targets, strict=True):
            assert target == (token + 1 if owner[token] == owner[token + 1] else NO_TARGET)


@given(lengths_and_row)
def test_offsets_are_the_starts_of_the_documents_then_padding(case: tuple[list[int], int]) -> None:
    lengths, row_tokens = case
    owner, rows = cut_rows(lengths, row_tokens)
    if not rows:
        return
    batch = stack_rows(rows)
    assert batch.lengths.tolist() == [row_tokens] * len(rows)
    assert batch.offsets.dtype == batch.lengths.dtype == torch.int32
    assert batch.tokens.dtype == batch.targets.dtype == torch.int64
    for tokens, offsets in zip(batch.tokens.numpy(), batch.offsets.tolist(), strict=True):
        assert offsets[0] == 0
        assert offsets[-1] == row_tokens
        bounds = offsets[: offsets.index(row_tokens) + 1]
        assert set(offsets[len(bounds) :]) <= {row_tokens}
        for begin, end in pairwise(bounds):
            assert begin < end
            assert len(set(owner[tokens[begin:end]])) == 1
        assert len(bounds) - 1 == len(set(owner[tokens]))


def test_document_of_one_token_has_no_target() -> None:
    tokens, targets, offsets, _ = pack(np.array([7, 8, 9, 10]), np.array([0, 1, 2]))
    assert (tokens.tolist(), targets.tolist(), offsets.tolist()) == (
        [7, 8, 9],
        [-100, -100, 10],
        [0, 1, 2, 3],
    )


def test_document_that_starts_at_the_extra_token_is_no_target_and_no_offset() -> None:
    tokens, targets, offsets, _ = pack(np.array([7, 8, 9]), np.array([0, 2]))
    assert (tokens.tolist(), targets.tolist(), offsets.tolist()) == ([7, 8], [8, -100], [0, 2])


def test_batch_moves_as_a_whole() -> None:
    batch = stack_rows([pack(np.array([1, 2]), np.array([0]))]).to("meta")
    assert isinstance(batch, Batch)
    assert all(tensor.is_meta for tensor in batch)


@given(st.lists(st.integers(2, 9), min_size=1, max_size=8), st.integers(0, 5))
def test_whole_documents_then_padding(counts: list[int], padding: int) -> None:
    row_tokens = sum(counts) - len(counts) + padding
    tokens, labels = np.arange(sum(counts)), 1000 + np.arange(sum(counts))
    row = pack_documents(tokens, labels, lengths=np.array(counts), row_tokens=row_tokens)
    assert row.length == row_tokens - padding
    assert len(row.tokens) == len(row.targets) == row_tokens
    bounds = list(pairwise(row.offsets.tolist()))
    assert len(bounds) == len(counts) + (padding > 0)
    begin = 0
    for (low, high), count in zip(bounds, counts, strict=False):
        assert row.tokens[low:high].tolist() == list(range(begin, begin + count - 1))
        assert row.targets[low:high].tolist() == list(range(1001 + begin, 1000 + begin + count))
        begin += count
    assert not row.tokens[row.length :].any()
    assert (row.targets[row.length :] == NO_TARGET).all()
    assert row.offsets[-1] == row_tokens


def window_of(lengths: list[int], size: int) -> Window:
    pieces = (Piece(0, number, length) for number, length in enumerate(lengths))
    return Window(size, lambda: next(pieces))


def test_window_goes_by_age_until_one_does_not_fit() -> None:
    window = window_of([4, 9, 6, 5, 6, 3, 5, 5, 5, 5, 5, 5], 6)
    assert window.take(8) == Piece(0, 0, 4), "the oldest fits"
    assert window.take(8) == Piece(0, 2, 6), "the next oldest does not: the longest, of equals the oldest"
    assert window.take(8) == Piece(0, 4, 6)
    assert window.take(4) == Piece(0, 5, 3)
    assert window.take(4) is None
    assert window.take_oldest() == Piece(0, 1, 9)


def test_window_holds_as_many_documents_as_it_may() -> None:
    window = window_of([2, 3, 4, 5, 6, 7], 3)
    assert window.take_oldest() == Piece(0, 0, 2)
    assert [piece.length for piece in window.pieces()] == [3, 4]
    assert window.take(100) == Piece(0, 1, 3)
    window.put(Piece(1, 0, 50))
    assert [piece.position for piece in window.pieces()] == [2, 3, 0]
    assert [window.take(100) for _ in range(3)] == [Piece(0, 2, 4), Piece(0, 3, 5), Piece(1, 0, 50)]
