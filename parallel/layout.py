"""Which layouts a model may have: every axis must divide what it cuts, and torch's schedules have rules.

A ValueError names key, value, rule and legal values.
"""

import torch

from model.config import ModelConfig, require_divisor
from parallel.config import SPLIT_BACKWARD, V_SHAPED, ParallelConfig, Recompute, Schedule, num_stages


def check_layout(
    model: ModelConfig, axes: ParallelConfig, recompute: Recompute, *, dp: int, edp: int, row_tokens: int,
    num_micro: int,
) -> None:  # fmt: skip
    """Raise a ValueError unless every axis divides what it cuts.

    Args:
        num_micro: micro-batches of a step on each of dp ranks.
    """
    sizes = [
        ("tp", "model.num_heads", model.num_heads),
        ("tp", "model.vocab_size", model.vocab_size),
        ("ep", "model.num_experts", model.num_experts),
        ("etp", "model.expert_ffn_size", model.expert_ffn_size),
    ]
    for axis, key, size in sizes:
        require_divisor(f"parallel.{axis}", getattr(axes, axis), key, size)
    if model.num_kv_heads % axes.tp and axes.tp % model.num_kv_heads:
        raise ValueError(
            f"parallel.tp={axes.tp} must divide model.num_kv_heads={model.num_kv_heads} "
            "or be a multiple of it"
        )
    if axes.cp > 1:  # a rank holds two chunks of each row
        require_divisor("2 * parallel.cp", 2 * axes.cp, "batch.row_tokens", row_tokens)
    tokens = row_tokens // axes.cp
    require_divisor("parallel.tp", axes.tp, "batch.row_tokens / parallel.cp", tokens)
    if model.num_experts // axes.ep < edp:
        for key, size in (
            ("model.hidden_size", model.hidden_size),
            ("model.expert_ffn_size / parallel.etp", model.expert_ffn_size // axes.etp),
        ):
            rule = "edp (more edp ranks than experts a rank, so weights are cut)"
            require_divisor(rule, edp, key, size)
    if axes.pp > 1:
        _check_pipeline(model, axes, recompute, dp=dp, num_micro=num_micro)


def _check_pipeline(
    model: ModelConfig, axes: ParallelConfig, recompute: Recompute, *, dp: int, num_micro: int
) -> None:
    """Rules of torch's schedules, some of which it breaks without a word."""
    schedule, pp = axes.schedule, axes.pp
    stages = num_stages(schedule, pp)
    micro = f"{num_micro} micro-batches (batch.global_tokens / (row_tokens * micro_rows * dp))"
    if model.num_layers < stages:
        raise ValueError(
            f"parallel.pp={pp} with parallel.schedule={schedule} needs {stages} stages; "
            f"model.num_layers={model.num_layers} must be at least that"
        )
    if schedule in V_SHAPED and torch.__version__ < "2.13":
        raise ValueError(
            f"parallel.schedule={schedule} gives wrong gradients in torch {torch.__version__}; "
            "it needs 2.13 or newer; use schedule 1f1b, interleaved or interleaved_zero_bubble"
        )
    if schedule in SPLIT_BACKWARD and axes.zero_stage == 3:
        raise ValueError(
            f"parallel.zero_stage=3 with parallel.schedule={schedule} gives wrong gradients in FSDP2; "
            "use zero_stage 1 or 2, or schedule 1f1b or interleaved"
        )
    if schedule in SPLIT_BACKWARD and recompute is not Recompute.none:
        raise ValueError(
            f"train.recompute={recompute} with parallel.schedule={schedule} would recompute "
            "up to four times; it must be none; use train.recompute=none, or schedule 1f1b or interleaved"
        )
    if schedule in SPLIT_BACKWARD and dp * axes.cp == 1 and axes.ep * axes.etp < axes.tp:
        raise ValueError(
            f"parallel.schedule={schedule} loses gradients if experts are sharded over edp and the rest "
            "is not; set parallel.ep * parallel.etp = parallel.tp, or dp * cp above 1"
        )
    least = {Schedule["1f1b"]: pp, Schedule.dualpipev: 2 * pp}.get(schedule, 1)
    if num_micro < least:
        raise ValueError(f"parallel.schedule={schedule} needs at least {least}, not {micro}")
    rounds = max(1, num_micro // pp)
    if schedule in (Schedule.interleaved, Schedule.interleaved_zero_bubble) and num_micro % rounds:
        raise ValueError(f"parallel.schedule={schedule} needs a multiple of {rounds}, not {micro}")
