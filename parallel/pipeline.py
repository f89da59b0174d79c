"""Forward and backward over the micro-batches of a step: plain in one stage, scheduled over several.

Both forms take the same micro-batches and return this rank's share of the loss; gradients are plain sums.
The schedules are torch's, stages are cut by cost, layer names stay global.
"""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import (
    PipelineScheduleMulti,
    PipelineScheduleSingle,
    Schedule1F1B,
    ScheduleDualPipeV,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)

from model.transformer import Transformer
from parallel.collectives import Axis, all_reduce_sum
from parallel.config import Schedule, num_stages, stage_owner, stages_of
from parallel.mesh import Mesh
from parallel.zero import prepare_backward

SCHEDULES: dict[Schedule, type[PipelineScheduleSingle] | type[PipelineScheduleMulti]] = {
    Schedule["1f1b"]: Schedule1F1B,
    Schedule.interleaved: ScheduleInterleaved1F1B,
    Schedule.interleaved_zero_bubble: ScheduleInterleavedZeroBubble,
    Schedule.zbv: ScheduleZBVZeroBubble,
    Schedule.dualpipev: ScheduleDualPipeV,
}


class MicroBatch(NamedTuple):
    """What one rank computes at once, on its device but for `offsets` and `number`."""

    tokens: Tensor
    """[rows, tokens/cp] int64."""
    targets: Tensor
    """[rows, tokens/cp] int64, negative = none."""
    offsets: Tensor
    """[rows, max_documents + 1] int32, best on the host; the same width in all micro-batches of a step."""
    number: Tensor
    """[rows] int64 on the host, the same in each row: counts the micro-batches of the run."""
    lengths: Tensor | None = None
    """[rows] int32: tokens of each row before its padding, which is the last document; None = no padding."""


def split_layers(costs: Sequence[float], num_stages: int) -> list[range]:
    """Cut layers into consecutive stages so that the dearest stage is as cheap as can be.

    Args:
        costs: of each layer, those of embedding and head added to the first and the last.

    Raises:
        ValueError: fewer layers than stages.
    """
    if len(costs) < num_stages:
        raise ValueError(f"{len(costs)} layers cannot fill {num_stages} pipeline stages; use fewer stages")
    total = [0.0, *itertools.accumulate(costs)]
    layers = len(costs)
    best = [
        [total[end]] for end in range(layers + 1)
    ]  # best[end][s]: dearest of s + 1 stages over layers < end
    cut: list[list[int]] = [[0] for _ in range(layers + 1)]
    for stage in range(1, num_stages):
        for end in range(layers + 1):
            choices = [
                (max(best[start][stage - 1], total[end] - total[start]), start) for start in range(stage, end)
            ]
            value, start = min(choices) if choices else (float("inf"), 0)
            best[end].append(value)
            cut[end].append(start)
    ends = [layers]
    for stage in range(num_stages - 1, 0, -1):
        ends.append(cut[ends[-1]][stage])
    ends.append(0)
    return [range(a, b) for a, b in itertools.pairwise(reversed(ends))]


class SingleStage:
    """The whole model on this rank's pipeline stage: micro-batches one after the other."""

    def __init__(self, model: Transformer, *, zero_stage: int) -> None:
        self.model, self.zero_stage = model, zero_stage
        self.micro_losses: list[Tensor] = []
        """Of the last step's micro-batches, [rows, tokens/cp] each."""

    def forward_backward(
        self, batches: Sequence[MicroBatch], target_count: Tensor, loss_weight: float
    ) -> Tensor:
        """Accumulate gradients of the loss divided by target_count; this rank's share of it, fp64."""
        total = torch.zeros((), dtype=torch.float64, device=target_count.device)
        self.micro_losses = []
        for number, batch in enumerate(batches, start=1):
            is_last = number == len(batches)
            reduces, frees = is_last or self.zero_stage > 1, is_last or self.zero_stage == 3
            prepare_backward(self.model, reduces=reduces, frees=frees)
            losses = self.model(
                batch.tokens, batch.offsets, targets=batch.targets, number=batch.number,
                lengths=batch.lengths, loss_weight=loss_weight,
            )  # fmt: skip
            loss = losses.sum() / target_count
            loss.backward()
            total += loss.detach()
            self.micro_losses.append(losses.detach())
        return total

    def loss_sum(self, batches: Sequence[MicroBatch]) -> Tensor:
        """Sum of the losses of this rank's tokens, forward only, fp64."""
        losses = [self.model(b.tokens, b.offsets, targets=b.targets, lengths=b.lengths) for b in batches]
        return torch.stack([each.double().sum() for each in losses]).sum()


class Pipeline:
    """Several stages: torch's schedule drives them; gradients are reduced once, at the end of the step."""

    def __init__(
        self, parts: Sequence[Transformer], mesh: Mesh, schedule: Schedule, *, num_micro: int,
        micro_rows: int, row_tokens: int, dtype: torch.dtype,
    ) -> None:  # fmt: skip
        """Lay the stages over mesh.pp.

        Args:
            parts: this rank's stages, ascending.
            num_micro: micro-batches of a step.
            row_tokens: of the whole row, before cp cuts it.
            dtype: of the hidden states.
        """
        self.parts, self.pp, self.schedule_kind = list(parts), mesh.pp, schedule
        self.numbers = stages_of(mesh.pp.rank, schedule, mesh.pp.size)
        self.num_stages = num_stages(schedule, mesh.pp.size)
        tokens = row_tokens // mesh.cp.size
        self.ids = torch.empty(micro_rows, tokens, dtype=torch.int64, device=mesh.device)
        hidden = (micro_rows, tokens // mesh.tp.size, self.parts[0].cfg.hidden_size)
        self.hidden = torch.empty(hidden, dtype=dtype, device=mesh.device, requires_grad=True)
        self.losses = torch.empty(
            micro_rows, tokens, dtype=torch.float32, device=mesh.device, requires_grad=True
        )
        self.target_count = torch.ones((), device=mesh.device)
        self.micro_losses: list[Tensor] = []
        """Of the last step's micro-batches, scalars; none on ranks without the last stage."""
        stages = [self._stage(n, part, mesh) for n, part in zip(self.numbers, self.parts, strict=True)]
        is_single = schedule is Schedule["1f1b"]
        self.schedule = SCHEDULES[schedule](
            stages[0] if is_single else stages,  # type: ignore[arg-type]
            num_micro,
            loss_fn=lambda losses, targets: losses.sum() / self.target_count,
            scale_grads=False,  # the loss is normalised by tokens already
        )

    def _stage(self, number: int, part: Transformer, mesh: Mesh) -> PipelineStage:
        return PipelineStage(
            part, number, self.num_stages, mesh.device, input_args=self.ids if number == 0 else self.hidden,
            output_args=self.losses if number == self.num_stages - 1 else self.hidden, group=mesh.pp.group,
        )  # fmt: skip

    def forward_backward(
        self, batches: Sequence[MicroBatch], target_count: Tensor, loss_weight: float
    ) -> Tensor:
        """As SingleStage's; 0 on ranks without the last stage."""
        for part in self.parts:
            prepare_backward(part, reduces=True, frees=True)
        self.target_count = target_count
        columns = zip(*batches, strict=True)
        tokens, targets, offsets, number = (torch.cat(part) for part in itertools.islice(columns, 4))
        (lengths,) = (None if part[0] is None else torch.cat(part) for part in columns)
        losses: list[Tensor] = []
        # Tensors alone: torch 2.11 asks each argument whether it requires a gradient.
        arguments: dict[str, Any] = {
            "offsets": offsets,
            "targets": targets,
            "number": number,
            "loss_weight": torch.full((len(offsets),), loss_weight, dtype=torch.float64),
        }
        if lengths is not None:
            arguments["lengths"] = lengths
        first = (tokens,) if 0 in self.numbers else ()
        target = targets if self.num_stages - 1 in self.numbers else None
        self.schedule.step(*first, target=target, losses=losses, **arguments)
        zero = torch.zeros((), dtype=torch.float64, device=tokens.device)
        self.micro_losses = [loss.detach() for loss in losses]
        return sum((loss.double() for loss in self.micro_losses), zero)

    def loss_sum(self, batches: Sequence[MicroBatch]) -> Tensor:
        """As SingleStage's, one micro-batch after the other; 0 on ranks without the last stage."""
        total = torch.zeros((), dtype=torch.float64, device=self.ids.device)
        mine = dict(zip(self.numbers, self.parts, strict=True))
        for batch in batches:
            x = batch.tokens
            for number in range(self.num_stages):
                if number:
                    x = self._hand_over(x, number)
                if number in mine:
                    x = mine[number](x, batch.offsets, targets=batch.targets, lengths=batch.lengths)
            if self.num_stages - 1 in mine:
                total += x.double().sum()
        return total

    def _hand_over(self, x: Tensor, stage: int) -> Tensor:
        """Send x from the stage before to `stage`; what its rank receives, x elsewhere."""
        source, target = (stage_owner(s, self.schedule_kind, self.pp.size) for s in (stage - 1, stage))
        if source == target:
            return x
        if self.pp.rank == source:
            dist.send(x.contiguous(), self.pp.ranks[target], group=self.pp.group)
        elif self.pp.rank == target:
            x = torch.empty_like(self.hidden)
            dist.recv(x, self.pp.ranks[source], group=self.pp.group)
        return x


def gather_layers(values: Tensor, layers: Sequence[int], num_layers: int, axis: Axis) -> Tensor:
    """[num_layers, ...] from each rank's [layers, ...], summed into place over the axis."""
    whole = values.new_zeros((num_layers, *values.shape[1:]))
    whole[list(layers)] = values
    return all_reduce_sum(whole, axis)
