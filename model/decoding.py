"""Rows that come piece by piece: a state of constant size in lightning layers, a KV cache in softmax layers.

Only the seams of the model are used: `block.mixer.core`, `locate`, and a model without head gives hidden
states. Pieces of any sizes give what one forward pass over the whole rows gives. A document begins anywhere
in a row and forgets what was before it; so padding in front of a shorter prompt is a document like others.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.documents import Documents, locate_documents
from kernels.lightning_attention import lightning_attention_with_state
from kernels.reference import merge_attention
from kernels.softmax_attention import attend
from model.lightning import LightningCore
from model.transformer import Transformer


class Progress:
    """How far the rows have come; known on the host, so that no layer has to ask the device."""

    def __init__(self, rows: int) -> None:
        self.tokens = 0
        """Of each row, before the present piece."""
        self.starts = [0] * rows
        """Where the document began that was the last one of each row before the present piece."""
        self.going_on = [0] * rows
        """Tokens of the present piece that belong to it."""


class RecurrentCore(nn.Module):
    """Linear attention that goes on from the state [rows, heads, head_dim, head_dim] fp32 it has kept."""

    def __init__(self, core: LightningCore) -> None:
        super().__init__()
        self.inner = core
        self.state: Tensor | None = None

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, documents: Documents, *, filler: Callable[[], Any]
    ) -> tuple[Tensor, Any]:
        """q, k, v [rows, tokens, heads, head_dim] of the next tokens -> (o alike, result of filler)."""
        entering = self.state
        if entering is not None:
            goes_on = documents.positions[:, :1, None, None] > 0
            entering = torch.where(goes_on, entering, 0)
        o, self.state = lightning_attention_with_state(
            q, k, v, self.inner.slopes, documents, initial_state=entering
        )
        return o, filler()


class CachedCore(nn.Module):
    """Softmax attention to the new keys and values and those kept, [rows, capacity, kv_heads, head_dim]."""

    def __init__(self, progress: Progress, capacity: int) -> None:
        super().__init__()
        self.progress, self.capacity = progress, capacity
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, documents: Documents, *, filler: Callable[[], Any]
    ) -> tuple[Tensor, Any]:
        """q [rows, tokens, heads, head_dim], k and v with kv_heads -> (o like q, result of filler)."""
        if self.keys is None or self.values is None:
            shape = (k.shape[0], self.capacity, *k.shape[2:])
            self.keys, self.values = k.new_empty(shape), v.new_empty(shape)
        here = slice(self.progress.tokens, self.progress.tokens + q.shape[1])
        self.keys[:, here], self.values[:, here] = k, v
        if q.shape[1] == 1:
            return self._one(q, self.keys, self.values), filler()
        return self._several(q, k, v, documents, self.keys, self.values), filler()

    def _one(self, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """A token of each row: the heads of a group are the queries of one call, which copies no keys."""
        end, progress = self.progress.tokens + 1, self.progress
        starts = [
            start if on else progress.tokens
            for start, on in zip(progress.starts, progress.going_on, strict=True)
        ]
        first, seen = min(starts), None
        if max(starts) > first:
            places = torch.arange(first, end, device=q.device)
            seen = (places >= torch.tensor(starts, device=q.device)[:, None])[:, None, None]
        k, v = (x[:, first:end].transpose(1, 2) for x in (keys, values))
        queries = q[:, 0].unflatten(1, (k.shape[1], -1))
        return F.scaled_dot_product_attention(queries, k, v, attn_mask=seen).flatten(1, 2)[:, None]

    def _several(
        self, q: Tensor, k: Tensor, v: Tensor, documents: Documents, keys: Tensor, values: Tensor
    ) -> Tensor:
        """Attention inside the piece, merged with that of its first documents to what was kept of them."""
        o, lse = attend(q, k, v, documents=documents)
        o = o.to(lse.dtype)
        now = self.progress.tokens
        by_place = sorted(
            (start, on, row)
            for row, (start, on) in enumerate(zip(self.progress.starts, self.progress.going_on, strict=True))
            if on and start < now
        )
        for (start, on), group in groupby(by_place, key=lambda place: place[:2]):
            rows = [row for *_, row in group]
            at = slice(None) if len(rows) == len(q) else rows  # a list copies
            part = attend(q[at, :on], keys[at, start:now], values[at, start:now])
            o[at, :on] = merge_attention(o[at, :on], lse[at, :on], *part)[0]
        return o.to(q.dtype)


class Decoder:
    """Takes the next tokens of all rows, gives what the model makes of them; from `decoding`."""

    def __init__(self, model: Transformer, rows: int, capacity: int) -> None:
        assert model.norm is not None and model.head is not None
        self.model, self.norm, self.head = model, model.norm, model.head
        self.rows, self.capacity = rows, capacity
        self.progress = Progress(rows)

    def read(self, tokens: Tensor, begins: Tensor) -> Tensor:
        """Go on by a piece of each row.

        Args:
            tokens: [rows, tokens] int64, on the model's device.
            begins: [rows, tokens] bool on the host: tokens that begin a document; the first of a row always
                does.

        Returns:
            [rows, tokens, hidden] normed hidden states, for `logits` or `losses`.
        """
        progress, length = self.progress, tokens.shape[1]
        end = progress.tokens + length
        if len(tokens) != self.rows or end > self.capacity:
            raise ValueError(
                f"{len(tokens)} rows up to token {end}: made for {self.rows} rows of up to {self.capacity}"
            )
        places = [row.nonzero().flatten().tolist() for row in begins]
        progress.going_on = [next(iter(row), length) for row in places]
        bounds = [[0, *(place for place in row if place), length] for row in places]
        width = max(map(len, bounds))
        offsets = torch.tensor([row + [length] * (width - len(row)) for row in bounds], dtype=torch.int32)
        hidden = self.norm(self.model(tokens, offsets))
        for number, row in enumerate(places):
            if row:
                progress.starts[number] = progress.tokens + row[-1]
        progress.tokens = end
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., hidden] -> [..., vocab] fp32."""
        return self.head(hidden, None)

    def losses(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """[rows, tokens, hidden], [rows, tokens] int64 (negative = none) -> [rows, tokens] fp32 losses."""
        return self.head(hidden, targets)

    def locate(self, offsets: Tensor, tokens: int) -> Documents:
        """Documents of a piece; positions of the first ones count from where they began."""
        documents, progress = locate_documents(offsets, tokens), self.progress
        before = [
            progress.tokens - start if on else 0
            for start, on in zip(progress.starts, progress.going_on, strict=True)
        ]
        shift = torch.tensor(before, device=offsets.device, dtype=offsets.dtype)[:, None]
        return documents._replace(positions=documents.positions + shift * (documents.ids == 0))

    def state_bytes(self) -> int:
        """Memory of the lightning states, whatever the length of the rows."""
        cores = [core for core in self.model.modules() if isinstance(core, RecurrentCore)]
        return sum(core.state.nbytes for core in cores if core.state is not None)

    def cache_bytes(self) -> int:
        """Memory of all keys and values, for rows as long as the capacity."""
        cores = [core for core in self.model.modules() if isinstance(core, CachedCore)]
        return sum(x.nbytes for core in cores for x in (core.keys, core.values) if x is not None)


@contextmanager
def decoding(model: Transformer, *, rows: int, capacity: int) -> Iterator[Decoder]:
    """A whole model of one process as a decoder of `rows` rows of up to `capacity` tokens; without gradients.

    Inside, the model is in evaluation mode, so no expert drops a token, and belongs to the decoder.
    """
    mixers: Sequence[Any] = [block.mixer for block in model.blocks.values()]
    cores = [mixer.core for mixer in mixers]
    kept = model.locate, model.norm, model.head, model.training
    decoder = Decoder(model, rows, capacity)
    try:
        for mixer, core in zip(mixers, cores, strict=True):
            is_linear = isinstance(core, LightningCore)
            mixer.core = RecurrentCore(core) if is_linear else CachedCore(decoder.progress, capacity)
        model.locate, model.norm, model.head = decoder.locate, None, None
        model.eval()
        with torch.no_grad():
            yield decoder
    finally:
        for mixer, core in zip(mixers, cores, strict=True):
            mixer.core = core
        model.locate, model.norm, model.head, was_training = kept
        model.train(was_training)
