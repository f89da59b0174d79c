"""Endless shuffled documents of one split of one dataset, and their tokens.

Invariant: a token is a pure function of (dataset, split, seed, source, bucket, position), and each epoch
visits every document once. Raw Philox output and sorting are all it takes: no NumPy release may change those.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from data.dataset import TokenDataset


class Span(NamedTuple):
    """Consecutive tokens [tokens]; start and number of each document (or part of one) in them [documents].

    `ends` are the places of tokens that are the last of their document.
    """

    tokens: np.ndarray
    starts: np.ndarray
    documents: np.ndarray
    ends: np.ndarray


FIRST, NONE = np.zeros(1, np.int64), np.empty(0, np.int64)


class DocumentOrder:
    """Documents in training order, epoch after epoch, from their lengths alone; positions count tokens.

    Args:
        lengths: [all documents] int64, in tokens.
        documents: [documents] numbers of those to visit, none empty.
        key: what the order depends on: seed and source, and the bucket if there are any.
    """

    def __init__(self, lengths: np.ndarray, documents: np.ndarray, *, key: Sequence[int]) -> None:
        self.lengths, self.documents = lengths, documents
        self.epoch_tokens = int(lengths[documents].sum())
        self._key = tuple(key)
        self._epoch = lru_cache(maxsize=2)(self._shuffle)  # two, because a row may reach over an epoch's end

    def find(self, position: int) -> tuple[int, int]:
        """Return the document at a position, and its tokens from there on."""
        epoch, offset = divmod(position, self.epoch_tokens)
        order, ends = self._epoch(epoch)
        place = ends.searchsorted(offset, side="right")
        return int(order[place]), int(ends[place]) - offset

    def index(self, position: int) -> int:
        """Return how many documents end at or before a position."""
        epoch, offset = divmod(position, self.epoch_tokens)
        return epoch * len(self.documents) + int(self._epoch(epoch)[1].searchsorted(offset, side="right"))

    def _shuffle(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the epoch's documents in order, and the tokens up to the end of each: [documents] int64."""
        keys = np.random.Philox(np.random.SeedSequence([*self._key, epoch])).random_raw(len(self.documents))
        order = self.documents[np.argsort(keys, kind="stable")]
        return order, np.cumsum(self.lengths[order])


class TokenStream:
    """Random access to the tokens of a dataset in a given order of its documents."""

    def __init__(self, dataset: TokenDataset, order: DocumentOrder) -> None:
        self.dataset, self.order = dataset, order

    def read(self, position: int, *, count: int) -> Span:
        """Return `count` tokens from stream position `position` on."""
        tokens = np.empty(count, np.int64)
        document, rest = self.order.find(position)
        if count <= rest:  # of one document, as nearly always with best_fit: without the lists it is faster
            self.dataset.read(document, int(self.order.lengths[document]) - rest, tokens)
            return Span(tokens, FIRST, np.array([document]), np.array([count - 1]) if count == rest else NONE)
        starts, documents, ends = [], [], []
        filled = 0
        while filled < count:
            document, rest = self.order.find(position + filled)
            part = tokens[filled : filled + rest]
            self.dataset.read(document, int(self.order.lengths[document]) - rest, part)
            starts.append(filled)
            documents.append(document)
            filled += len(part)
            if len(part) == rest:
                ends.append(filled - 1)
        return Span(tokens, np.array(starts), np.array(documents), np.array(ends, np.int64))


def split_documents(lengths: np.ndarray, *, split: str, eval_fraction: float) -> np.ndarray:
    """Return the numbers of a split's non-empty documents, ascending, from the lengths of all [documents].

    A hash of the number decides, so that all seeds agree on what is held out. From two documents on and with
    eval_fraction > 0 neither split is empty; a single document is for training.
    """
    documents = np.flatnonzero(lengths)
    bits = documents.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)  # the splitmix64 mixer
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    bits ^= bits >> np.uint64(31)
    held_out = bits < np.uint64(int(eval_fraction * 2**64))
    if len(documents) and eval_fraction > 0:
        held_out[bits.argmin()] = True
        held_out[bits.argmax()] = False
    return documents[held_out if split == "eval" else ~held_out]
