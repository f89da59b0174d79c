"""Settings of the data layer: which token files, in which proportions, and how much is held out."""

import math
from dataclasses import dataclass, field


@dataclass(kw_only=True)
class SourceConfig:
    """One tokenized dataset."""

    path: str
    """PREFIX of PREFIX.bin and PREFIX.idx."""
    weight: float = 1.0
    """Share of the rows, relative to the other sources; 0.7 and 0.3 mean the same as 7 and 3."""


@dataclass(kw_only=True)
class DataConfig:
    """The mixture that a run trains and evaluates on."""

    sources: list[SourceConfig] = field(default_factory=list)
    """Tokenized datasets; rows are shared out by weight."""
    eval_fraction: float = 0.01
    """Fraction of each source's documents that only the eval split sees."""

    def __post_init__(self) -> None:
        for i, source in enumerate(self.sources):
            if not 0 < source.weight < math.inf:
                raise ValueError(
                    f"data.sources[{i}].weight={source.weight:g} must be > 0; to leave a source out, drop it"
                )
        if not 0 <= self.eval_fraction < 1:
            raise ValueError(f"data.eval_fraction={self.eval_fraction:g} must be >= 0 and < 1; try 0.01")
