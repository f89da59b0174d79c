"""Which source and length bucket gives the next tokens: the one that lacks most, in exact arithmetic.

Invariant: after any number of tokens each unit is within a few draws of its share, however the mixture
changed on the way; nothing is random, and nothing depends on ranks or batches.
"""

import math
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

from data.stream import DocumentOrder

FINEST = 2**48  # integer shares add up to at most about this; weights finer than that are rounded


class ExhaustedError(ValueError):
    """All sources have given what they may."""


@dataclass(frozen=True)
class Mixture:
    """Shares of the tokens of a step."""

    weights: tuple[float, ...]
    """Of each source, relative; 0 leaves it out."""
    length_shares: tuple[float, ...] | None = None
    """Of each length bucket, relative; None: lengths as they come."""


class Unit(NamedTuple):
    """What has a share and a place in the data of its own: a source, or a length bucket of one."""

    source: int
    bucket: int
    order: DocumentOrder
    max_tokens: int | None
    """Stream tokens that it may give."""


def unit_shares(mixture: Mixture, units: Sequence[Unit], exhausted: Collection[int] = ()) -> list[int]:
    """Return integers in the proportion of the units' shares of the tokens.

    Sources share a bucket by weight. An exhausted unit's share goes to the others of its bucket; if there are
    none, to all: then the result may be all 0.

    Raises:
        ValueError: a bucket has a share but no documents.
    """
    weights = [_exact(weight) for weight in mixture.weights]
    if mixture.length_shares is None:
        tokens: Counter[int] = Counter()
        for unit in units:
            tokens[unit.source] += unit.order.epoch_tokens
        inside = [weights[u.source] * Fraction(u.order.epoch_tokens, tokens[u.source]) for u in units]
        buckets = _sum_by_bucket(units, inside)
    else:
        inside = [weights[unit.source] for unit in units]
        buckets = dict(enumerate(map(_exact, mixture.length_shares)))
    sums = _sum_by_bucket(units, inside)
    for bucket, share in buckets.items():
        if share and not sums.get(bucket):
            raise ValueError(
                f"data.length_shares[{bucket}]={float(share):g}, but no source with a weight has documents "
                "in that bucket; set the share to 0, change data.length_bounds or add longer documents"
            )
    live = [0 if i in exhausted else weight for i, weight in enumerate(inside)]
    sums = _sum_by_bucket(units, live)
    return _integers(
        [
            buckets[unit.bucket] * weight / sums[unit.bucket] if weight else Fraction(0)
            for unit, weight in zip(units, live, strict=True)
        ]
    )


class Deficits:
    """What each unit still has to give, in tokens times the sum of the shares: integers, so nothing drifts.

    Args:
        num_units: as many as there are shares.
    """

    def __init__(self, num_units: int) -> None:
        self._credits, self._scale = [0] * num_units, 1
        self._shares: list[int] = []
        self._active: list[int] = []

    def set_shares(self, shares: Sequence[int]) -> None:
        """Go on with other shares; what was lacking stays lacking. If all are 0, there is nothing to pick."""
        scale = sum(shares)
        if scale not in (0, self._scale):
            self._credits = [credit * scale // self._scale for credit in self._credits]
            self._scale = scale
        self._shares, self._active = list(shares), [i for i, share in enumerate(shares) if share]

    def pick(self, size: int) -> int:
        """Return the unit that will lack most after `size` more tokens; the first of equals."""
        if not self._active:
            raise ExhaustedError(
                "every source of the mixture has given all of its max_epochs; "
                "raise data.sources[*].max_epochs, add data or train fewer tokens"
            )
        credits, shares = self._credits, self._shares
        lacking = [credits[i] + shares[i] * size for i in self._active]
        return self._active[lacking.index(max(lacking))]

    def charge(self, unit: int, tokens: int) -> None:
        """Count tokens that a unit gave."""
        for i in self._active:
            self._credits[i] += self._shares[i] * tokens
        self._credits[unit] -= self._scale * tokens

    def state_dict(self) -> dict[str, Any]:
        """Return credits and their scale as plain JSON."""
        return {"credits": list(self._credits), "scale": self._scale}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from saved credits; the shares are set anew."""
        self._credits, self._scale = list(state["credits"]), state["scale"]


def _exact(weight: float) -> Fraction:
    """The number as written: 0.7 is 7/10."""
    return Fraction(repr(float(weight)))


def _sum_by_bucket(units: Sequence[Unit], values: Sequence[Fraction | int]) -> dict[int, Fraction]:
    sums: dict[int, Fraction] = {}
    for unit, value in zip(units, values, strict=True):
        sums[unit.bucket] = sums.get(unit.bucket, Fraction(0)) + value
    return sums


def _integers(exact: Sequence[Fraction]) -> list[int]:
    """Return the smallest integers in the proportion of the numbers, rounded if they would be huge."""
    scale = math.lcm(*(number.denominator for number in exact))
    shares = [int(number * scale) for number in exact]
    if (total := sum(shares)) > FINEST:
        shares = [-(-share * FINEST // total) for share in shares]  # upwards: a share above 0 stays above 0
    divisor = math.gcd(*shares) or 1
    return [share // divisor for share in shares]
