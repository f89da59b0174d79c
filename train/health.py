"""Numbers that go wrong: where a non-finite value arose, and when a run that keeps skipping ends.

Invariant: decisions follow from values that are the same on every rank, so all ranks decide alike.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from parallel.mesh import Axis
from parallel.placement import Shard

NAMED = 5  # things that a message spells out


@dataclass(kw_only=True)
class HealthConfig:
    """What a run does about numbers that go wrong."""

    max_skips_in_row: int | None = 10
    """Skipped steps in a row at which the run ends as FAILED, without saving; null = never."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.max_skips_in_row is not None and self.max_skips_in_row < 1:
            raise ValueError(
                f"health.max_skips_in_row={self.max_skips_in_row} must be at least 1, or null = never"
            )


class Health:
    """Judges each step by its loss and gradient norm; the state is the same on every rank."""

    def __init__(self, cfg: HealthConfig) -> None:
        self.cfg = cfg
        self.skips_in_row = 0

    def judge(self, loss: float, grad_norm: float) -> bool:
        """Whether the step is skipped, once a step, before its update."""
        skipped = not math.isfinite(loss + grad_norm)
        self.skips_in_row = self.skips_in_row + 1 if skipped else 0
        return skipped

    @property
    def gave_up(self) -> str:
        """Why the run ends; "" while it goes on."""
        limit = self.cfg.max_skips_in_row
        if limit is None or self.skips_in_row < limit:
            return ""
        return (
            f"{self.skips_in_row} steps in a row were skipped (health.max_skips_in_row={limit}); this step was "
            "not saved, the last checkpoint is from before"
        )

    def state_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {"skips_in_row": self.skips_in_row}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state."""
        self.skips_in_row = state["skips_in_row"]


@torch.no_grad()
def find_non_finite(losses: Sequence[Tensor], shards: Sequence[Shard], *, dp: Axis, micro_rows: int) -> str:
    """Where this rank sees non-finite values; "" = nowhere. Reads from the device: for skipped steps only.

    Args:
        losses: of each micro-batch of the step, [micro_rows, tokens/cp] or a scalar.
        shards: whose gradients to look at where the losses are finite.
    """
    found = []
    for number, loss in enumerate(losses):
        bad = ~loss.isfinite()
        if bad.any():
            rows = bad.any(1).nonzero().flatten().tolist() if bad.dim() else range(micro_rows)
            first = (number * dp.size + dp.rank) * micro_rows
            found.append(f"loss of micro-batch {number}, rows {[first + row for row in rows]} of the step")
    if not found:
        names = [s.name for s in shards if s.master.grad is not None and not s.master.grad.isfinite().all()]
        found = [f"gradient of {name}" for name in names]
    more = f" and {len(found) - NAMED} more" if len(found) > NAMED else ""
    return "; ".join(found[:NAMED]) + more
