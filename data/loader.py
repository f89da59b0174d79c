"""Rows of a run in their global order, and the share of one data-parallel rank.

Invariant: the tokens of row n of a run depend on datasets, weights, seed and row_tokens, never on rank, size
or micro_rows. The state is what was drawn from each source, so it survives a change of any size.
"""

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from data.dataset import TokenDataset
from data.packing import Batch, pack_row, stack_rows
from data.stream import TokenStream


class Loader:
    """Micro-batches of one data-parallel rank, one optimizer step at a time.

    Args:
        sources: datasets with their weights.
        split: "train" or "eval".
        row_tokens: input tokens of a row, which consumes one stream token more.
        global_rows: rows of an optimizer step over all ranks.
        micro_rows: rows of one micro-batch of one rank.
        rank, size: place on the data-parallel axis.
    """

    def __init__(
        self,
        sources: Sequence[tuple[TokenDataset, float]],
        *,
        split: str,
        row_tokens: int,
        global_rows: int,
        micro_rows: int,
        rank: int,
        size: int,
        seed: int,
        vocab_size: int,
        eval_fraction: float,
    ) -> None:
        if not sources:
            raise ValueError("data.sources is empty; name at least one: data.sources=[{path: PREFIX}]")
        if split not in ("train", "eval"):
            raise ValueError(f"split={split!r} must be 'train' or 'eval'")
        if global_rows <= 0 or global_rows % (micro_rows * size):
            raise ValueError(
                f"batch.global_tokens = {global_rows} rows of batch.row_tokens={row_tokens} must divide by "
                f"batch.micro_rows={micro_rows} x data-parallel size={size}; change one of them"
            )
        for dataset, _ in sources:
            if dataset.manifest and dataset.manifest["max_token_id"] >= vocab_size:
                raise ValueError(_bad_token(dataset.prefix, dataset.manifest["max_token_id"], vocab_size))
        self._streams = [
            TokenStream(dataset, split=split, eval_fraction=eval_fraction, seed=seed, source=i)
            for i, (dataset, _) in enumerate(sources)
        ]
        fingerprints = [dataset.fingerprint for dataset, _ in sources]
        self._order = {
            "split": split,
            "seed": seed,
            "eval_fraction": eval_fraction,
            "fingerprints": fingerprints,
        }
        self._shares = integer_shares([weight for _, weight in sources])
        self._tokens, self._rows = [0] * len(sources), [0] * len(sources)
        self._row_tokens, self._micro_rows, self._vocab_size = row_tokens, micro_rows, vocab_size
        self._global_rows = global_rows
        # Global row of this rank's i-th row of micro-batch m: (m * size + rank) * micro_rows + i.
        self._mine = np.arange(global_rows).reshape(-1, size, micro_rows)[:, rank].ravel()

    def next_step(self) -> list[Batch]:
        """Return this rank's micro-batches of the next optimizer step, their offsets padded to one width."""
        plan = [self._draw() for _ in range(self._global_rows)]
        step = stack_rows([self._read_row(*plan[g]) for g in self._mine])
        return [Batch(*parts) for parts in zip(*(t.split(self._micro_rows) for t in step), strict=True)]

    def state_dict(self) -> dict[str, Any]:
        """Return the place in the data order as plain JSON, the same on every rank."""
        return {**self._order, "shares": self._shares, "tokens": list(self._tokens), "rows": list(self._rows)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved place; changed weights begin a new mixture, whose row counts start at 0."""
        for name, here in self._order.items():
            if state[name] != here:
                prefixes = ", ".join(stream.dataset.prefix for stream in self._streams)
                raise ValueError(
                    f"the saved data order has {name}={state[name]}, this run {here} (sources {prefixes}); "
                    "go on with the same datasets and settings, or start a new run with checkpoint.init"
                )
        self._tokens = list(state["tokens"])
        self._rows = list(state["rows"]) if state["shares"] == self._shares else [0] * len(self._shares)

    def _draw(self) -> tuple[int, int]:
        """Give the next row to the source that lacks most; return the source and a position in its stream."""
        total, count = sum(self._shares), sum(self._rows) + 1
        lacks = [share * count - total * rows for share, rows in zip(self._shares, self._rows, strict=True)]
        source = lacks.index(max(lacks))
        position = self._tokens[source]
        self._tokens[source] += self._row_tokens + 1
        self._rows[source] += 1
        return source, position

    def _read_row(self, source: int, position: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        stream = self._streams[source]
        span = stream.read(position, count=self._row_tokens + 1)
        outside = np.flatnonzero((span.tokens < 0) | (span.tokens >= self._vocab_size))
        if len(outside):
            document = span.documents[np.searchsorted(span.starts, outside[0], side="right") - 1]
            where = f"{stream.dataset.prefix}: document {document}"
            raise ValueError(_bad_token(where, span.tokens[outside[0]], self._vocab_size))
        return pack_row(span.tokens, starts=span.starts)


def integer_shares(weights: Sequence[float]) -> list[int]:
    """Return the smallest integers in the proportion of the weights as written: [0.7, 0.3] -> [7, 3]."""
    exact = [Fraction(repr(float(weight))) for weight in weights]
    scale = math.lcm(*(weight.denominator for weight in exact))
    shares = [int(weight * scale) for weight in exact]
    return [share // math.gcd(*shares) for share in shares]


def _bad_token(where: str, token: int, vocab_size: int) -> str:
    return (
        f"{where} has token id {token}, outside model.vocab_size={vocab_size}; "
        "raise model.vocab_size or prepare the data with the model's tokenizer"
    )
