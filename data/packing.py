"""Rows and batches of packed documents.

Invariant: a target is the next token of the same document, or NO_TARGET. Which documents a row holds is
decided from their lengths alone, so that every rank can plan all rows and read only its own.
"""

from bisect import bisect_right, insort
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch

NO_TARGET = -100


class Batch(NamedTuple):
    """Rows of packed documents.

    Attributes:
        tokens: [rows, row_tokens] int64, 0 in padding.
        targets: [rows, row_tokens] int64, NO_TARGET in padding and at the last token of a document.
        offsets: [rows, max_documents + 1] int32, where each document starts, padded with row_tokens; so
            the first entry is 0 and the last always row_tokens. A row's padding is its last document.
        lengths: [rows] int32, tokens of each row before its padding.
    """

    tokens: torch.Tensor
    targets: torch.Tensor
    offsets: torch.Tensor
    lengths: torch.Tensor

    def to(self, device: torch.device | str) -> "Batch":
        """Return the batch on a device; a copy from pinned memory does not wait."""
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in self))

    def pin_memory(self) -> "Batch":
        """Return the batch in pinned memory."""
        return Batch(*(tensor.pin_memory() for tensor in self))


class Row(NamedTuple):
    """One row: tokens, targets [row_tokens] and offsets [documents + 1] as in Batch, and its length."""

    tokens: np.ndarray
    targets: np.ndarray
    offsets: np.ndarray
    length: int


class Piece(NamedTuple):
    """Consecutive stream tokens of one unit."""

    unit: int
    position: int
    length: int


def pack_row(tokens: np.ndarray, labels: np.ndarray, *, starts: np.ndarray) -> Row:
    """Return a row of consecutive tokens; the last stream token is a target only.

    Args:
        tokens: [row_tokens + 1] int64, consecutive in the stream.
        labels: [row_tokens + 1] int64, what each token is as a target: itself or NO_TARGET.
        starts: [documents] ascending, where each document (or the rest of one) starts; the first is 0.
    """
    row_tokens = len(tokens) - 1
    targets = labels[1:].copy()
    targets[starts[1:] - 1] = NO_TARGET
    return Row(tokens[:-1], targets, np.append(starts[starts < row_tokens], row_tokens), row_tokens)


def pack_documents(tokens: np.ndarray, labels: np.ndarray, *, lengths: np.ndarray, row_tokens: int) -> Row:
    """Return a row of whole documents; the last token of each is a target only, and padding fills the row.

    Args:
        tokens: [sum of lengths] int64, the documents one after the other.
        labels: [sum of lengths] int64, what each token is as a target: itself or NO_TARGET.
        lengths: [documents] tokens of each, at least 2.
    """
    ends = np.cumsum(lengths)
    length = len(tokens) - len(lengths)
    row, targets = np.zeros(row_tokens, np.int64), np.full(row_tokens, NO_TARGET)
    kept = np.ones(len(tokens), bool)
    kept[ends - 1] = False
    row[:length] = tokens[kept]
    kept[ends - 1] = True
    kept[ends - lengths] = False
    targets[:length] = labels[kept]
    offsets = np.concatenate([[0], ends - np.arange(1, len(lengths) + 1)])
    return Row(row, targets, offsets if length == row_tokens else np.append(offsets, row_tokens), length)


def stack_rows(rows: Sequence[Row]) -> Batch:
    """Stack rows of one length, padding their offsets to the longest."""
    tokens, targets, offsets, lengths = zip(*rows, strict=True)
    padded = np.full((len(rows), max(map(len, offsets))), len(tokens[0]), np.int32)
    for i, row in enumerate(offsets):
        padded[i, : len(row)] = row
    parts = (np.stack(tokens), np.stack(targets), padded, np.array(lengths, np.int32))
    return Batch(*map(torch.from_numpy, parts))


class Window:
    """The documents that best_fit looks ahead, by age and by length.

    Args:
        size: documents it holds when filled.
        draw: returns the next document in the global order, of at least 2 tokens.
    """

    def __init__(self, size: int, draw: Callable[[], Piece]) -> None:
        self._size, self._draw = size, draw
        self._by_age: OrderedDict[int, Piece] = OrderedDict()
        self._by_length: list[tuple[int, int]] = []  # (tokens, -age): the last of equals is the oldest
        self._age = 0

    def pieces(self) -> list[Piece]:
        """Return the documents that wait, the oldest first."""
        return list(self._by_age.values())

    def put(self, piece: Piece) -> None:
        """Add a document as the youngest."""
        self._by_age[self._age] = piece
        insort(self._by_length, (piece.length, -self._age))
        self._age += 1

    def take_oldest(self) -> Piece:
        """Remove the oldest document: as it begins a row, none waits forever."""
        self._fill()
        oldest = self._remove_longest(next(iter(self._by_age.values())).length)
        assert oldest is not None
        return oldest

    def take(self, most: int) -> Piece | None:
        """Remove the oldest document if it has at most `most` tokens, else the longest that has, if any.

        Going by age until one does not fit keeps the mixture of the rows that of the order; always taking the
        longest would let short documents pile up before long ones that only an empty row can hold.
        """
        self._fill()
        oldest = next(iter(self._by_age.values()))
        return self._remove_longest(oldest.length if oldest.length <= most else most)

    def _fill(self) -> None:
        while len(self._by_age) < self._size:
            self.put(self._draw())

    def _remove_longest(self, most: int) -> Piece | None:
        """Remove the longest document of at most `most` tokens, the oldest of equals."""
        place = bisect_right(self._by_length, (most, 0)) - 1
        return self._by_age.pop(-self._by_length.pop(place)[1]) if place >= 0 else None
