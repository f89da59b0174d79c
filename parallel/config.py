"""Degrees of parallelism and their arithmetic, without torch: a layout can be checked anywhere."""

import math
from dataclasses import dataclass
from enum import StrEnum

from model.config import divisors


class Offload(StrEnum):
    """Where the optimizer's masters and moments lie and its step runs."""

    none = "none"
    cpu = "cpu"


class StateExchange(StrEnum):
    """How lightning states pass between chunks."""

    allgather = "allgather"
    """One all-gather, hidden behind the gate's GEMM; holds the states of all chunks."""
    scan = "scan"
    """From chunk to chunk by send and receive, 2 cp - 2 messages one after the other; holds one state."""


class Recompute(StrEnum):
    """What a block's forward pass keeps for backward."""

    none = "none"
    """Everything."""
    selective = "selective"
    """Its input, and what attention would compute or communicate again: (o, log-sum-exp), states."""
    full = "full"
    """Its input alone."""


Schedule = StrEnum(
    "Schedule",
    {
        "1f1b": "1f1b",
        "interleaved": "interleaved",
        "interleaved_zero_bubble": "interleaved_zero_bubble",
        "zbv": "zbv",
        "dualpipev": "dualpipev",
    },
)
"""Order of forward and backward passes in a pipeline; the last three split the backward pass in two."""


V_SHAPED = (Schedule.zbv, Schedule.dualpipev)
"""A rank hands hidden states to itself."""
SPLIT_BACKWARD = (Schedule.interleaved_zero_bubble, *V_SHAPED)
"""Schedules that run the gradients of inputs and of weights as two passes."""


def stage_owner(stage: int, schedule: Schedule, pp: int) -> int:
    """Pipeline rank of a stage: round robin, or down and up again for the V-shaped schedules."""
    if schedule in V_SHAPED:
        return stage if stage < pp else 2 * pp - 1 - stage
    return stage % pp


def stages_of(rank: int, schedule: Schedule, pp: int) -> list[int]:
    """Stages of a pipeline rank, ascending."""
    return [s for s in range(num_stages(schedule, pp)) if stage_owner(s, schedule, pp) == rank]


def num_stages(schedule: Schedule, pp: int) -> int:
    """Stages of the whole pipeline: one a rank under 1F1B, two under all others."""
    return pp if pp == 1 or schedule is Schedule["1f1b"] else 2 * pp


@dataclass(kw_only=True)
class ParallelConfig:
    """Degrees of each axis; dp and edp follow from the world size."""

    pp: int = 1
    """Pipeline stages."""
    cp: int = 1
    """Ranks that share a row's tokens (context parallel)."""
    tp: int = 1
    """Ranks that share the heads and the vocabulary (tensor parallel)."""
    ep: int = 1
    """Ranks that share the experts of a layer (expert parallel)."""
    etp: int = 1
    """Ranks that share an expert's ffn (expert tensor parallel)."""
    schedule: Schedule = Schedule["1f1b"]
    """Pipeline schedule; all but 1f1b put two stages on each rank."""
    cp_state_exchange: StateExchange = StateExchange.allgather
    """How lightning states pass between the chunks of a row under context parallelism."""
    zero_stage: int = 1
    """1: gradients reduced once a step; 2: after every micro-batch; 3: parameters, too, kept sharded."""

    def __post_init__(self) -> None:
        """Check each value by itself."""
        for axis in ("pp", "cp", "tp", "ep", "etp"):
            degree = getattr(self, axis)
            if degree < 1:
                raise ValueError(f"parallel.{axis}={degree} must be at least 1")
        if self.zero_stage not in (1, 2, 3):
            raise ValueError(
                f"parallel.zero_stage={self.zero_stage} must be 1, 2 or 3; use 1 unless memory is short"
            )

    def dp(self, world_size: int) -> int:
        """Data-parallel degree of the dense grid: world_size / (pp cp tp).

        Raises:
            ValueError: the product does not divide the world size.
        """
        return self._rest(world_size, "pp", "cp", "tp")

    def edp(self, world_size: int) -> int:
        """Data-parallel degree of the expert grid: world_size / (pp ep etp).

        Raises:
            ValueError: the product does not divide the world size.
        """
        return self._rest(world_size, "pp", "ep", "etp")

    def _rest(self, world_size: int, *axes: str) -> int:
        product = math.prod(getattr(self, axis) for axis in axes)
        if world_size % product:
            values = ", ".join(f"parallel.{axis}={getattr(self, axis)}" for axis in axes)
            raise ValueError(
                f"{values}: their product {product} must divide the world size {world_size}; "
                f"choose a product among {divisors(world_size)}"
            )
        return world_size // product


@dataclass(kw_only=True)
class MoEConfig:
    """How the mixture of experts runs; nothing here changes what it computes."""

    overlap_groups: int = 1
    """Groups of a rank's tokens: one's rows travel while another's experts compute
    (arXiv 2501.08313 sec. 3.1)."""

    def __post_init__(self) -> None:
        """Check the range."""
        if self.overlap_groups < 1:
            raise ValueError(f"moe.overlap_groups={self.overlap_groups} must be at least 1")
