from itertools import pairwise

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from data.packing import NO_TARGET, Batch, pack_row, stack_rows

lengths_and_row = st.tuples(st.lists(st.integers(1, 30), min_size=1, max_size=40), st.integers(1, 40))


def cut_rows(lengths: list[int], row_tokens: int) -> tuple[np.ndarray, list]:
    """The document of each stream token, whose id is its position, and all whole rows of the stream."""
    owner = np.repeat(np.arange(len(lengths)), lengths)
    rows = []
    for begin in range(0, len(owner) - row_tokens, row_tokens + 1):
        documents = owner[begin : begin + row_tokens + 1]
        starts = np.flatnonzero(np.diff(documents, prepend=-1))
        rows.append(pack_row(np.arange(begin, begin + row_tokens + 1), starts=starts))
    return owner, rows


@given(lengths_and_row)
def test_inputs_are_every_stream_token_once_and_in_order(case: tuple[list[int], int]) -> None:
    lengths, row_tokens = case
    _, rows = cut_rows(lengths, row_tokens)
    for n, (tokens, _, _) in enumerate(rows):
        begin = n * (row_tokens + 1)  # the stream token between two rows is a target only
        assert tokens.tolist() == list(range(begin, begin + row_tokens))


@given(lengths_and_row)
def test_target_is_the_next_token_of_the_same_document(case: tuple[list[int], int]) -> None:
    owner, rows = cut_rows(*case)
    for tokens, targets, _ in rows:
        for token, target in zip(tokens, targets, strict=True):
            assert target == (token + 1 if owner[token] == owner[token + 1] else NO_TARGET)


@given(lengths_and_row)
def test_offsets_are_the_starts_of_the_documents_then_padding(case: tuple[list[int], int]) -> None:
    lengths, row_tokens = case
    owner, rows = cut_rows(lengths, row_tokens)
    if not rows:
        return
    batch = stack_rows(rows)
    assert batch.offsets.dtype == torch.int32 and batch.tokens.dtype == batch.targets.dtype == torch.int64
    for tokens, offsets in zip(batch.tokens.numpy(), batch.offsets.tolist(), strict=True):
        assert offsets[0] == 0 and offsets[-1] == row_tokens
        bounds = offsets[: offsets.index(row_tokens) + 1]
        assert set(offsets[len(bounds) :]) <= {row_tokens}
        for begin, end in pairwise(bounds):
            assert begin < end and len(set(owner[tokens[begin:end]])) == 1
        assert len(bounds) - 1 == len(set(owner[tokens]))


def test_document_of_one_token_has_no_target() -> None:
    tokens, targets, offsets = pack_row(np.array([7, 8, 9, 10]), starts=np.array([0, 1, 2]))
    assert (tokens.tolist(), targets.tolist(), offsets.tolist()) == (
        [7, 8, 9],
        [-100, -100, 10],
        [0, 1, 2, 3],
    )


def test_document_that_starts_at_the_extra_token_is_no_target_and_no_offset() -> None:
    tokens, targets, offsets = pack_row(np.array([7, 8, 9]), starts=np.array([0, 2]))
    assert (tokens.tolist(), targets.tolist(), offsets.tolist()) == ([7, 8], [8, -100], [0, 2])


def test_batch_moves_as_a_whole() -> None:
    batch = stack_rows([pack_row(np.array([1, 2]), starts=np.array([0]))]).to("meta")
    assert isinstance(batch, Batch) and all(tensor.is_meta for tensor in batch)
