"""The rows of a run in their global order, planned from document lengths alone.

Invariant: a row depends on lengths, settings, seed, and the row lengths and mixtures so far, never on ranks
or batch sizes; the state is a few integers a unit and the documents that wait in the window.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

from data.config import DataConfig, LongDocuments, Packing
from data.mixture import Deficits, Mixture, Unit, unit_shares
from data.packing import Piece, Window
from data.stream import DocumentOrder, split_documents

log = logging.getLogger(__name__)


@dataclass
class Counts:
    """What became of the tokens and documents of some steps, over all ranks."""

    real_tokens: int = 0
    """Inputs that are no padding."""
    padding_tokens: int = 0
    truncated_tokens: int = 0
    """Tokens of long documents that no row will hold."""
    documents: int = 0
    """Documents that were read to their end."""
    splits: int = 0
    """Times that a document was cut at the end of a row and goes on in a later one."""
    one_token_documents: int = 0
    """Documents, or rests of split ones, that best_fit leaves out: one token has no target."""
    source_tokens: list[int] = field(default_factory=list)
    """Stream tokens that the rows took of each source."""
    bucket_tokens: list[int] = field(default_factory=list)
    """The same for each length bucket; one if there are no buckets."""

    @property
    def padding_fraction(self) -> float:
        """Padding among all tokens of the rows."""
        return self.padding_tokens / max(1, self.padding_tokens + self.real_tokens)

    def add(self, other: "Counts") -> None:
        """Count other steps, too."""
        for item in fields(self):
            mine, theirs = getattr(self, item.name), getattr(other, item.name)
            if isinstance(mine, list):
                theirs = [a + b for a, b in zip(mine, theirs, strict=True)] if mine else list(theirs)
                setattr(self, item.name, theirs)
            else:
                setattr(self, item.name, mine + theirs)


class Plan(NamedTuple):
    """Rows of one step in their global order, each the pieces that it is made of, and what they count."""

    rows: list[list[Piece]]
    counts: Counts


def build_units(
    lengths: Sequence[np.ndarray], cfg: DataConfig, *, split: str, seed: int, buckets: bool
) -> list[Unit]:
    """Return the units of sources with these document lengths [documents], by source and bucket.

    A source or bucket without documents to train on has no unit.
    """
    units = []
    for source, all_lengths in enumerate(lengths):
        documents = split_documents(all_lengths, split=split, eval_fraction=cfg.eval_fraction)
        bounds = cfg.length_bounds if buckets else []
        bucket_of = np.searchsorted(bounds, all_lengths[documents], side="right")
        max_epochs = cfg.sources[source].max_epochs if split == "train" else None
        for bucket in range(len(bounds) + 1):
            order = DocumentOrder(
                all_lengths,
                documents[bucket_of == bucket],
                key=(seed, source, bucket) if buckets else (seed, source),
            )
            usable = order.epoch_tokens > (len(order.documents) if cfg.packing is Packing.best_fit else 0)
            if usable:
                limit = None if max_epochs is None else int(Fraction(repr(max_epochs)) * order.epoch_tokens)
                units.append(Unit(source, bucket, order, limit))
    return units


class Planner:
    """Draws documents from the units by their shares and packs them into rows."""

    def __init__(self, units: Sequence[Unit], cfg: DataConfig) -> None:
        self._units, self._cfg = units, cfg
        self._positions, self._taken = [0] * len(units), [0] * len(units)
        self._truncates = cfg.long_documents is LongDocuments.truncate
        self._deficits = Deficits(len(units))
        self._window = Window(cfg.window, self._draw_document)
        self._exhausted: set[int] = set()
        self._warned: set[int] = set()
        self._row_tokens, self._mixture = 0, Mixture(())  # of the step that is being planned
        self._counts = Counts()

    def plan(self, row_tokens: int, num_rows: int, mixture: Mixture) -> Plan:
        """Return the next rows.

        Raises:
            ValueError: the mixture does not fit the sources, or they are exhausted.
        """
        self._row_tokens, self._mixture = row_tokens, mixture
        self._exhausted = {i for i in range(len(self._units)) if self._is_exhausted(i)}
        self._share_out()
        num_sources = 1 + max(unit.source for unit in self._units)
        num_buckets = 1 + max(unit.bucket for unit in self._units)
        self._counts = counts = Counts(source_tokens=[0] * num_sources, bucket_tokens=[0] * num_buckets)
        make = self._best_fit if self._cfg.packing is Packing.best_fit else self._concatenate
        rows = [make() for _ in range(num_rows)]
        for unit, _, length in (piece for row in rows for piece in row):
            self._taken[unit] += length
            counts.source_tokens[self._units[unit].source] += length
            counts.bucket_tokens[self._units[unit].bucket] += length
        counts.padding_tokens = num_rows * row_tokens - counts.real_tokens
        return Plan(rows, counts)

    def state_dict(self) -> dict[str, Any]:
        """Return the place in the data as plain JSON.

        `positions` are stream tokens drawn from each unit, `taken` those that rows took; `window` holds unit,
        position and length of the documents that wait.
        """
        return {
            "positions": list(self._positions),
            "taken": list(self._taken),
            "window": [list(piece) for piece in self._window.pieces()],
            **self._deficits.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved place."""
        self._positions, self._taken = list(state["positions"]), list(state["taken"])
        self._deficits.load_state_dict(state)
        self._window = Window(self._cfg.window, self._draw_document)
        for piece in state["window"]:
            self._window.put(Piece(*piece))

    def _concatenate(self) -> list[Piece]:
        """A row is consecutive tokens of one unit."""
        size = self._row_tokens + 1
        unit = self._deficits.pick(size)
        piece = Piece(unit, self._positions[unit], size)
        self._advance(unit, size, charge=size)
        order = self._units[unit].order
        end = piece.position + size
        ended = order.index(end)
        self._counts.documents += ended - order.index(piece.position)
        document, rest = order.find(end)
        self._counts.splits += rest < order.lengths[document]
        self._counts.real_tokens += self._row_tokens
        return [piece]

    def _best_fit(self) -> list[Piece]:
        """A row begins with the oldest document, which may be too long if rows have become shorter."""
        most = self._row_tokens + 1
        piece = self._window.take_oldest()
        rest = Piece(piece.unit, piece.position + most, piece.length - most)
        if rest.length > 0:
            piece = piece._replace(length=most)
            if self._truncates:
                self._counts.truncated_tokens += rest.length
            elif rest.length == 1:
                self._counts.one_token_documents += 1
            else:
                self._counts.splits += 1
                self._window.put(rest)
        pieces, room = [piece], self._row_tokens - (piece.length - 1)
        while room and (following := self._window.take(room + 1)):
            pieces.append(following)
            room -= following.length - 1
        self._counts.real_tokens += self._row_tokens - room
        return pieces

    def _draw_document(self) -> Piece:
        """The next document in the global order, or as much of it as a row holds."""
        while True:
            unit = self._deficits.pick(self._row_tokens + 1)
            position = self._positions[unit]
            rest = self._units[unit].order.find(position)[1]
            length = min(rest, self._row_tokens + 1)
            self._advance(unit, rest if self._truncates else length, charge=length)
            if rest == 1:
                self._counts.one_token_documents += 1
                continue
            if self._truncates:
                self._counts.truncated_tokens += rest - length
            if rest > length and not self._truncates:
                self._counts.splits += 1
            else:
                self._counts.documents += 1
            return Piece(unit, position, length)

    def _advance(self, unit: int, tokens: int, *, charge: int) -> None:
        self._positions[unit] += tokens
        self._deficits.charge(unit, charge)
        if self._is_exhausted(unit):
            self._exhausted.add(unit)
            self._share_out()

    def _is_exhausted(self, unit: int) -> bool:
        """Whether what it would give next is beyond max_epochs."""
        _, _, order, limit = self._units[unit]
        if limit is None:
            return False
        position = self._positions[unit]
        following = self._row_tokens + 1
        if self._cfg.packing is Packing.best_fit:
            rest = order.find(position)[1]
            following = rest if self._truncates else min(rest, following)
        return position + following > limit

    def _share_out(self) -> None:
        shares = unit_shares(self._mixture, self._units, self._exhausted)
        for i in sorted(self._exhausted - self._warned):
            source, bucket, _, _ = self._units[i]
            log.warning(
                "data.sources[%d] (%s), bucket %d: max_epochs=%g is reached; its share goes to others",
                source, self._cfg.sources[source].name, bucket, self._cfg.sources[source].max_epochs,
            )  # fmt: skip
            self._warned.add(i)
        self._deficits.set_shares(shares)
