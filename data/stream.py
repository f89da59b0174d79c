"""Endless shuffled token stream of one split of one dataset.

Invariant: a token is a pure function of (dataset, split, seed, source, position), and each epoch visits every
document of the split once. Raw Philox output and sorting are all it takes: no NumPy release may change those.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from data.dataset import TokenDataset


class Span(NamedTuple):
    """Consecutive tokens [tokens]; start and number of each document (or part of one) in them [documents]."""

    tokens: np.ndarray
    starts: np.ndarray
    documents: np.ndarray


class TokenStream:
    """Random access to the tokens of one split, in training order."""

    def __init__(
        self, dataset: TokenDataset, *, split: str, eval_fraction: float, seed: int, source: int
    ) -> None:
        self.dataset = dataset
        self._documents = split_documents(dataset.document_lengths, split=split, eval_fraction=eval_fraction)
        if not len(self._documents):
            raise ValueError(
                f"{dataset.prefix}: the {split} split is empty ({dataset.num_documents} documents, "
                f"{dataset.num_tokens} tokens, data.eval_fraction={eval_fraction:g}); "
                "eval needs data.eval_fraction > 0 and two documents with tokens, train one"
            )
        self._key = (seed, source)
        self._epoch_tokens = int(dataset.document_lengths[self._documents].sum())
        self._epoch = lru_cache(maxsize=2)(
            self._shuffle
        )  # two, because a row may reach over the end of an epoch

    def read(self, position: int, *, count: int) -> Span:
        """Return `count` tokens from stream position `position` on."""
        tokens = np.empty(count, np.int64)
        starts, documents = [], []
        filled = 0
        while filled < count:
            epoch, offset = divmod(position + filled, self._epoch_tokens)
            order, ends = self._epoch(epoch)
            place = np.searchsorted(ends, offset, side="right")
            document, rest = int(order[place]), int(ends[place]) - offset
            part = tokens[filled : filled + rest]
            self.dataset.read(document, int(self.dataset.document_lengths[document]) - rest, part)
            starts.append(filled)
            documents.append(document)
            filled += len(part)
        return Span(tokens, np.array(starts), np.array(documents))

    def _shuffle(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the epoch's documents in order, and the tokens up to the end of each: [documents] int64."""
        keys = np.random.Philox(np.random.SeedSequence([*self._key, epoch])).random_raw(len(self._documents))
        order = self._documents[np.argsort(keys, kind="stable")]
        return order, np.cumsum(self.dataset.document_lengths[order])


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
