"""Rows and batches of packed documents.

Invariant: inputs are stream tokens in order; a target is the next token of the same document, or NO_TARGET.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

NO_TARGET = -100


class Batch(NamedTuple):
    """Rows of packed documents.

    Attributes:
        tokens: [rows, row_tokens] int64.
        targets: [rows, row_tokens] int64, NO_TARGET at the last token of a document.
        offsets: [rows, max_documents + 1] int32, where each document starts, padded with row_tokens; so
            the first entry is 0 and the last always row_tokens.
    """

    tokens: torch.Tensor
    targets: torch.Tensor
    offsets: torch.Tensor

    def to(self, device: torch.device | str) -> "Batch":
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in self))


def pack_row(tokens: np.ndarray, *, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the tokens, targets and offsets of one row; the last stream token is a target only.

    Args:
        tokens: [row_tokens + 1] int64, consecutive in the stream.
        starts: [documents] ascending, where each document (or the rest of one) starts; the first is 0.
    """
    row_tokens = len(tokens) - 1
    targets = tokens[1:].copy()
    targets[starts[1:] - 1] = NO_TARGET
    return tokens[:-1], targets, np.append(starts[starts < row_tokens], row_tokens)


def stack_rows(rows: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> Batch:
    """Stack rows of one length, padding their offsets to the longest."""
    tokens, targets, offsets = zip(*rows, strict=True)
    padded = np.full((len(rows), max(map(len, offsets))), len(tokens[0]), np.int32)
    for i, row in enumerate(offsets):
        padded[i, : len(row)] = row
    return Batch(*map(torch.from_numpy, (np.stack(tokens), np.stack(targets), padded)))
