"""Document structure of packed rows: every kernel and twin reads it from here.

Invariant: `offsets` is sorted, starts with 0 and is padded with the row length: a row needs no count.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Documents(NamedTuple):
    """Where the documents of a batch of packed rows lie."""

    offsets: Tensor
    """[rows, max_documents + 1] int32: start of each document, padded with the row length."""
    ids: Tensor
    """[rows, tokens]: number of the token's document in its row, from 0."""
    positions: Tensor
    """[rows, tokens]: distance to the start of the token's document."""
    on_host: list[list[int]] | None = None
    """`offsets`, where they were known without reading them from the device."""


def locate_documents(offsets: Tensor, tokens: int) -> Documents:
    """Number every token by document and by position.

    Args:
        offsets: [rows, max_documents + 1] int32, as in `Documents`.
        tokens: row length.
    """
    step = torch.arange(tokens, device=offsets.device, dtype=offsets.dtype).expand(offsets.shape[0], -1)
    ids = torch.searchsorted(offsets[:, 1:].contiguous(), step.contiguous(), right=True)
    return Documents(offsets, ids, step - offsets.gather(1, ids))
