"""Rows of a run in their global order, and the share of one data-parallel rank.

Invariant: the tokens of row n of a run depend on datasets, settings, seed, and the row lengths and mixtures
so far, never on rank, size or micro_rows. The state is the planner's, so it survives a change of any size.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import numpy as np

from data.config import DataConfig, Packing
from data.dataset import TokenDataset
from data.mixture import Mixture, unit_shares
from data.packing import NO_TARGET, Batch, Piece, Row, pack_documents, pack_row, stack_rows
from data.planner import Counts, Planner, build_units
from data.stream import Span, TokenStream


@dataclass(frozen=True)
class Shape:
    """Sizes of a step."""

    row_tokens: int
    """Input tokens of a row, which consumes at least one stream token more."""
    global_rows: int
    """Rows of an optimizer step over all ranks."""
    micro_rows: int
    """Rows of one micro-batch of one rank."""


class Step(NamedTuple):
    """One step as prepared, and the state and counts that belong to it once it is handed out."""

    batches: list[Batch]
    counts: Counts
    state: dict[str, Any]
    documents: list[list[np.ndarray]]
    """Of each row of each micro-batch: [documents, 2], source and number of each, in the order of offsets."""


class Loader:
    """Micro-batches of one data-parallel rank, one optimizer step at a time.

    The eval split knows no length buckets and no max_epochs: it is read from its start, as it comes.

    Args:
        datasets: one for each of cfg.sources.
        split: "train" or "eval".
        shape: sizes of the steps that name no other.
        rank, size: place on the data-parallel axis.
        buckets: length buckets even without cfg.length_shares, because a mixture will name shares.
    """

    def __init__(
        self, datasets: Sequence[TokenDataset], cfg: DataConfig, *, split: str, shape: Shape, rank: int,
        size: int, seed: int, vocab_size: int, buckets: bool = False,
    ) -> None:  # fmt: skip
        if not datasets:
            raise ValueError("data.sources is empty; name at least one: data.sources=[{path: PREFIX}]")
        if split not in ("train", "eval"):
            raise ValueError(f"split={split!r} must be 'train' or 'eval'")
        for dataset in datasets:
            if dataset.manifest and dataset.manifest["max_token_id"] >= vocab_size:
                raise ValueError(_bad_token(dataset.prefix, dataset.manifest["max_token_id"], vocab_size))
        self._cfg, self._shape, self._rank, self._size = cfg, shape, rank, size
        self._datasets, self._vocab_size = datasets, vocab_size
        self._buckets = split == "train" and (buckets or cfg.length_shares is not None)
        lengths = [dataset.document_lengths for dataset in datasets]
        self._units = build_units(lengths, cfg, split=split, seed=seed, buckets=self._buckets)
        for i, dataset in enumerate(datasets):
            if all(unit.source != i for unit in self._units):
                raise ValueError(_empty_split(dataset, split, cfg))
        self._streams = [TokenStream(datasets[unit.source], unit.order) for unit in self._units]
        self._planner = Planner(self._units, cfg)
        self._counts, self._skipped = Counts(), [0] * len(datasets)
        shares = cfg.length_shares if self._buckets else None
        self.mixture = Mixture(
            tuple(source.weight for source in cfg.sources), None if shares is None else tuple(shares)
        )
        self._order = {
            "split": split,
            "seed": seed,
            "eval_fraction": cfg.eval_fraction,
            "fingerprints": [dataset.fingerprint for dataset in datasets],
            "packing": cfg.packing.value,
            "length_bounds": list(cfg.length_bounds) if self._buckets else None,
        }
        self.check(shape, self.mixture)

    def check(self, shape: Shape, mixture: Mixture) -> None:
        """Refuse a step of these sizes and shares.

        Raises:
            ValueError: with keys, values, rule and remedy.
        """
        if shape.global_rows <= 0 or shape.global_rows % (shape.micro_rows * self._size):
            raise ValueError(
                f"batch.global_tokens = {shape.global_rows} rows of batch.row_tokens={shape.row_tokens} must "
                f"divide by batch.micro_rows={shape.micro_rows} x data-parallel size={self._size}; "
                "change one of them"
            )
        self.check_mixture(mixture)

    def check_mixture(self, mixture: Mixture) -> None:
        """Refuse shares that the sources cannot give.

        Raises:
            ValueError: with keys, values, rule and remedy.
        """
        shares = mixture.length_shares
        if len(mixture.weights) != len(self._datasets) or not _are_shares(mixture.weights):
            raise ValueError(
                f"the mixture has weights {mixture.weights}; it must have {len(self._datasets)}, one for "
                "each of data.sources, all >= 0 and not all 0"
            )
        if shares is not None and not self._buckets:
            raise ValueError(f"length_shares={shares} need length buckets; set data.length_shares")
        num_buckets = len(self._cfg.length_bounds) + 1
        if shares is not None and (len(shares) != num_buckets or not _are_shares(shares)):
            raise ValueError(
                f"length_shares={shares} must have {num_buckets} values, one more than "
                f"data.length_bounds={list(self._cfg.length_bounds)}, all >= 0 and not all 0"
            )
        unit_shares(mixture, self._units)

    def next_step(self, shape: Shape | None = None, mixture: Mixture | None = None) -> list[Batch]:
        """Return this rank's micro-batches of the next optimizer step, their offsets padded to one width.

        Args:
            shape: sizes of this step; those of __init__ unless given.
            mixture: shares of this step; those of the configuration unless given.
        """
        step = self.prepare(shape or self._shape, mixture or self.mixture)
        self._counts.add(step.counts)
        return step.batches

    def prepare(self, shape: Shape, mixture: Mixture) -> Step:
        """Go on by one step without counting it, for one who hands it out later."""
        self.check(shape, mixture)
        plan = self._planner.plan(shape.row_tokens, shape.global_rows, mixture)
        # Global row of this rank's i-th row of micro-batch m: (m * size + rank) * micro_rows + i.
        mine = np.arange(shape.global_rows).reshape(-1, self._size, shape.micro_rows)[:, self._rank].ravel()
        rows, documents = zip(*(self._read_row(plan.rows[g], shape.row_tokens) for g in mine), strict=True)
        parts = zip(*(tensor.split(shape.micro_rows) for tensor in stack_rows(rows)), strict=True)
        groups = [list(documents[i : i + shape.micro_rows]) for i in range(0, len(rows), shape.micro_rows)]
        return Step([Batch(*part) for part in parts], plan.counts, self.state_dict(), groups)

    def skip(self, shape: Shape, mixture: Mixture) -> None:
        """Go on by one step that nobody reads; the state says how many tokens were skipped."""
        self.check_mixture(mixture)
        counts = self._planner.plan(shape.row_tokens, shape.global_rows, mixture).counts
        self._skipped = [a + b for a, b in zip(self._skipped, counts.source_tokens, strict=True)]

    def read_counts(self) -> Counts:
        """Return what became of tokens and documents since the last call, over all ranks."""
        counts, self._counts = self._counts, Counts()
        return counts

    def state_dict(self) -> dict[str, Any]:
        """Return the place in the data order as plain JSON, the same on every rank."""
        taken = [0] * len(self._datasets)
        state = self._planner.state_dict()
        for unit, tokens in zip(self._units, state["taken"], strict=True):
            taken[unit.source] += tokens
        units = [[unit.source, unit.bucket] for unit in self._units]
        tokens = {"source_tokens": taken, "skipped_tokens": self._skipped}
        return {**self._order, "units": units, **tokens, **state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved place; shape, weights, window and max_epochs may have changed.

        Raises:
            ValueError: the state belongs to other data or another order.
        """
        for name, here in self._order.items():
            if name not in state or state[name] != here:
                prefixes = ", ".join(dataset.prefix for dataset in self._datasets)
                if name == "fingerprints":
                    pairs = zip(self._datasets, state.get(name) or [], strict=False)
                    changed = [dataset.prefix for dataset, saved in pairs if dataset.fingerprint != saved]
                    prefixes += f"; changed: {', '.join(changed) or 'their number'}"
                raise ValueError(
                    f"the saved data order has {name}={state.get(name)}, this run {here} "
                    f"(sources {prefixes}); go on with the same datasets and settings, "
                    "or start a new run with checkpoint.init"
                )
        self._planner.load_state_dict(state)
        self._skipped = list(state.get("skipped_tokens", self._skipped))  # older states know of none

    def _read_row(self, pieces: Sequence[Piece], row_tokens: int) -> tuple[Row, np.ndarray]:
        """Read one row: in best_fit pieces of one document each, in concatenation one piece of many.

        Returns:
            It, and source and number of its documents [documents, 2].
        """
        spans = [self._streams[unit].read(position, count=length) for unit, position, length in pieces]
        tokens = np.concatenate([span.tokens for span in spans])
        if tokens.min() < 0 or tokens.max() >= self._vocab_size:
            self._refuse(pieces, spans)
        lengths = np.array([piece.length for piece in pieces])
        labels = tokens.copy() if self._cfg.no_loss_tokens or not self._cfg.predict_end else tokens
        if self._cfg.no_loss_tokens:
            labels[np.isin(tokens, self._cfg.no_loss_tokens)] = NO_TARGET
        if not self._cfg.predict_end:
            begins = np.cumsum(lengths) - lengths
            ends = [span.ends + begin for span, begin in zip(spans, begins, strict=True)]
            labels[np.concatenate(ends)] = NO_TARGET
        sources = [self._units[piece.unit].source for piece in pieces]
        numbers = [span.documents for span in spans]
        documents = np.column_stack([np.repeat(sources, list(map(len, numbers))), np.concatenate(numbers)])
        if self._cfg.packing is Packing.concatenate:
            return pack_row(tokens, labels, starts=spans[0].starts), documents
        return pack_documents(tokens, labels, lengths=lengths, row_tokens=row_tokens), documents

    def _refuse(self, pieces: Sequence[Piece], spans: Sequence[Span]) -> NoReturn:
        """Name the document with a token outside the vocabulary."""
        for piece, (tokens, starts, documents, _) in zip(pieces, spans, strict=True):
            outside = np.flatnonzero((tokens < 0) | (tokens >= self._vocab_size))
            if len(outside):
                document = documents[np.searchsorted(starts, outside[0], side="right") - 1]
                prefix = self._datasets[self._units[piece.unit].source].prefix
                where = f"{prefix}: document {document}"
                raise ValueError(_bad_token(where, tokens[outside[0]], self._vocab_size))
        raise AssertionError("no token is outside the vocabulary")


def _are_shares(values: Sequence[float]) -> bool:
    return all(0 <= value < math.inf for value in values) and any(values)


def _empty_split(dataset: TokenDataset, split: str, cfg: DataConfig) -> str:
    return (
        f"{dataset.prefix}: the {split} split is empty ({dataset.num_documents} documents, "
        f"{dataset.num_tokens} tokens, data.eval_fraction={cfg.eval_fraction:g}); eval needs "
        "data.eval_fraction > 0 and two documents with tokens, train one, and data.packing=best_fit one of "
        "two tokens or more"
    )


def _bad_token(where: str, token: int, vocab_size: int) -> str:
    return (
        f"{where} has token id {token}, outside model.vocab_size={vocab_size}; "
        "raise model.vocab_size or prepare the data with the model's tokenizer"
    )
