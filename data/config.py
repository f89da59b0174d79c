"""Settings of the data layer: which token files, in which proportions, how packed, what is held out."""

import math
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import pairwise


class Packing(StrEnum):
    """How documents become rows."""

    concatenate = "concatenate"
    """One source's documents end to end, cut where the row ends; no padding."""
    best_fit = "best_fit"
    """Documents of all sources in order, a row's end filled with those that fit best, then padding."""


# Not a class, because a member named split would hide the method of str.
LongDocuments = StrEnum("LongDocuments", {"split": "split", "truncate": "truncate"})
"""What best_fit does with the rest of a document that is longer than a row: it goes on as a new document in a
later row, or is dropped; both are counted."""


@dataclass(kw_only=True)
class SourceConfig:
    """One tokenized dataset."""

    path: str | None = None
    """PREFIX of PREFIX.bin and PREFIX.idx; this or dataset."""
    dataset: str | None = None
    """Text that is tokenized before the first step: globs, or NAME[:CONFIG][@REVISION] of a dataset."""
    split: str = "train"
    """Of a named dataset."""
    text_key: str = "text"
    """Key of the text in .jsonl, .parquet and named datasets."""
    max_documents: int | None = None
    """First documents of dataset that are taken; null = all."""
    weight: float = 1.0
    """Share of the tokens, relative to the other sources; 0.7 and 0.3 mean the same as 7 and 3."""
    max_epochs: float | None = None
    """How often its documents may be seen; then the other sources take its share. null = without end."""

    @property
    def name(self) -> str:
        """What the user gave."""
        return self.path or self.dataset or ""


@dataclass(kw_only=True)
class DataConfig:
    """The mixture that a run trains and evaluates on."""

    sources: list[SourceConfig] = field(default_factory=list)
    """Datasets; tokens are shared out by weight."""
    tokenizer: str | None = None
    """tokenizer.json or its folder, for every sources[*].dataset."""
    cache_dir: str = "corpus/cache"
    """Where the tokens of sources[*].dataset are kept, in a folder for each content."""
    eval_fraction: float = 0.01
    """Fraction of each source's documents that only the eval split sees."""
    packing: Packing = Packing.concatenate
    """How documents become rows."""
    window: int = 256
    """Documents that best_fit looks ahead."""
    long_documents: LongDocuments = LongDocuments.split
    """What best_fit does with the rest of a document that is longer than a row."""
    length_bounds: list[int] = field(default_factory=lambda: [32768, 131072])
    """Borders in tokens of the length buckets short, medium, long; a document of 32768 tokens is medium."""
    length_shares: list[float] | None = None
    """Shares of the buckets in the tokens, one more than bounds; null = no buckets, lengths as they come."""
    no_loss_tokens: list[int] = field(default_factory=list)
    """Token ids that are never a target."""
    predict_end: bool = True
    """Whether the last token of a document is a target."""

    def __post_init__(self) -> None:
        for i, source in enumerate(self.sources):
            if not 0 < source.weight < math.inf:
                raise ValueError(
                    f"data.sources[{i}].weight={source.weight:g} must be > 0; to leave a source out, drop it"
                )
            if source.max_epochs is not None and not 0 < source.max_epochs < math.inf:
                raise ValueError(
                    f"data.sources[{i}].max_epochs={source.max_epochs:g} must be > 0; null sets no limit"
                )
            self._check_origin(f"data.sources[{i}]", source)
        if not 0 <= self.eval_fraction < 1:
            raise ValueError(f"data.eval_fraction={self.eval_fraction:g} must be >= 0 and < 1; try 0.01")
        if self.window < 1:
            raise ValueError(f"data.window={self.window} must be at least 1; try 256")
        if self.long_documents is LongDocuments.truncate and self.packing is not Packing.best_fit:
            raise ValueError(
                f"data.long_documents=truncate has no meaning with data.packing={self.packing}; "
                "set data.packing=best_fit or leave it out"
            )
        if any(token < 0 for token in self.no_loss_tokens):
            raise ValueError(f"data.no_loss_tokens={self.no_loss_tokens} must be token ids, >= 0")
        self._check_buckets()

    def _check_origin(self, key: str, source: SourceConfig) -> None:
        if (source.path is None) == (source.dataset is None):
            raise ValueError(
                f"{key} has path={source.path} and dataset={source.dataset}; give one of them: the PREFIX of "
                "prepared files, or text to tokenize"
            )
        if source.dataset is not None and self.tokenizer is None:
            raise ValueError(
                f"{key}.dataset={source.dataset} needs data.tokenizer; name a tokenizer.json or its folder"
            )
        if source.max_documents is not None and source.max_documents < 1:
            raise ValueError(f"{key}.max_documents={source.max_documents} must be at least 1; null takes all")
        for name in ("split", "text_key", "max_documents"):
            value = getattr(source, name)
            if source.dataset is None and value != getattr(SourceConfig, name):
                raise ValueError(
                    f"{key}.{name}={value} has no meaning with path; leave it out, or give dataset"
                )

    def _check_buckets(self) -> None:
        bounds, shares = list(self.length_bounds), self.length_shares
        if any(bound < 2 for bound in bounds) or any(low >= high for low, high in pairwise(bounds)):
            raise ValueError(f"data.length_bounds={bounds} must ascend from 2 on; try [32768, 131072]")
        if shares is None:
            return
        if len(shares) != len(bounds) + 1:
            raise ValueError(
                f"data.length_shares={list(shares)} must have {len(bounds) + 1} values, one more than "
                f"data.length_bounds={bounds}"
            )
        if not all(0 <= share < math.inf for share in shares) or not any(shares):
            raise ValueError(f"data.length_shares={list(shares)} must be >= 0 and not all 0")
