"""One optimizer step; the loss is the mean over the target tokens of the global batch, on any layout."""

import logging
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from data.config import Packing
from data.packing import Batch
from parallel.collectives import all_reduce_sum
from parallel.context import zigzag
from parallel.gradients import clip_factor
from parallel.pipeline import MicroBatch
from train.build import Run
from train.guard.integrity import digests, some
from train.guard.spikes import Rerun, Verdict, find_non_finite
from train.guard.stragglers import Section

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepResult:
    """What every rank knows after a step."""

    loss: float
    """Cross-entropy a target token of the global batch, without aux."""
    grad_norm: float
    """Gradient norm of the whole model, before clipping."""
    lr: float
    """Learning rate of this step."""
    verdict: Verdict
    """Whether the step was skipped, and what was unusual."""
    stop: bool
    """Whether some rank was asked to stop."""


def train_step(run: Run, batches: Sequence[Batch]) -> StepResult:
    """Run forward and backward over this rank's micro-batches, then update, decided alike on every rank.

    Raises:
        DamagedStateError: on every rank, before the update, if weights or moments changed since the last.
    """
    cfg, progress = run.cfg, run.progress
    for router in run.routers:
        router.begin_step()
    before = router_counts(run) if cfg.health.rerun is Rerun.on_suspicion else {}
    sums = compute_gradients(run, batches)
    loss_sum, square, stops, damaged = sums.tolist()  # the one host read of a step
    if before and not damaged and run.health.suspects(loss_sum, math.sqrt(square)):
        sums = compute_again(run, batches, before)
        loss_sum, square, stops, damaged = sums.tolist()
    if damaged:
        run.guard.fail()
    grad_norm = math.sqrt(square)
    verdict = run.health.judge(loss_sum, grad_norm)
    progress.advance(cfg.batch.global_tokens, skipped=verdict.skipped)
    lr = run.stage.lr_at(progress.tokens, run.total_tokens)
    if not verdict.skipped:
        run.optimizer.set_lr(lr)
        max_norm = min(cfg.optimizer.max_grad_norm, verdict.norm_limit)
        with run.clock.section(Section.optimizer):
            run.optimizer.step(clip_factor(grad_norm, max_norm))
        for router in run.routers:
            router.end_step()
    elif not math.isfinite(loss_sum + grad_norm):
        warn_of_source(run, batches, loss_sum)
    run.gradients.drop()
    return StepResult(loss_sum, grad_norm, lr, verdict, stops > 0)


def compute_gradients(run: Run, batches: Sequence[Batch]) -> torch.Tensor:
    """Compute the step's gradients and leave them in the masters.

    Returns:
        [loss, square of the gradient norm, ranks asked to stop, ranks with damaged state]: summed over all
        ranks, fp64, on the device.
    """
    targets = all_reduce_sum(count_targets(batches).to(run.mesh.device), run.mesh.dp)
    loss_weight = 1 / (len(batches) * run.cfg.model.num_layers)
    with run.clock.section(Section.compute):
        loss = run.engine.forward_backward(local_batches(run, batches), targets, loss_weight)
    loss /= run.mesh.tp.size  # every tp rank has the same losses
    run.gradients.collect()
    squares = run.gradients.square_sum().to(run.mesh.device)
    notes = [squares.new_tensor(run.stop.is_set), run.guard.damage(run.progress.optimizer_steps)]
    return all_reduce_sum(torch.stack([loss, squares, *notes]), run.mesh.world)


def compute_again(
    run: Run, batches: Sequence[Batch], before: Mapping[torch.Tensor, torch.Tensor]
) -> torch.Tensor:
    """Compute a suspicious step's gradients once more, say whether all bits agree, keep the second ones.

    `before` is what the routers had counted until then, from `router_counts`.
    """
    names, first = hash_step(run)
    run.gradients.drop()
    for buffer, value in before.items():
        buffer.copy_(value)
    sums = compute_gradients(run, batches)
    differs = (hash_step(run)[1] != first).tolist()
    found = [name for name, other in zip(names, differs, strict=True) if other]
    step, ranks = run.progress.step + 1, int(all_reduce_sum(torch.tensor(bool(found)).long(), run.mesh.world))
    if found:
        log.warning("step %d: rank %d on %s computed other bits of %s when it computed them again", step,
                    run.mesh.rank, platform.node(), some(found))  # fmt: skip
    if run.metrics is not None and ranks:
        log.warning("step %d: computed again, %d ranks got other bits: a transient error; the second result"
                    " counts", step, ranks)  # fmt: skip
    elif run.metrics is not None:
        log.warning("step %d: computed again with the same bits: no transient error", step)
    return sums


def hash_step(run: Run) -> tuple[list[str], torch.Tensor]:
    """Name and hash what this rank computed in a step: its micro-batches' losses, its gradients."""
    results = {f"loss of micro-batch {i}": loss for i, loss in enumerate(run.engine.micro_losses)}
    results |= {f"gradient of {s.name}": s.master.grad for s in run.shards if s.master.grad is not None}
    return list(results), digests(results.values())


def router_counts(run: Run) -> dict[torch.Tensor, torch.Tensor]:
    """Copy what the routers of this rank have counted, by the buffer."""
    return {buffer: buffer.clone() for router in run.routers for buffer in router.buffers(recurse=False)}


def warn_of_source(run: Run, batches: Sequence[Batch], loss_sum: float) -> None:
    """Log where non-finite values arose, if it was on this rank."""
    dp, micro_rows = run.mesh.dp, run.cfg.batch.micro_rows
    shards = run.shards if math.isfinite(loss_sum) else []  # a bad loss spoils every rank's gradients

    def documents_at(number: int, bad: torch.Tensor) -> list[str]:
        places = zigzag(torch.arange(run.cfg.batch.row_tokens)[None], run.mesh.cp)[0]
        found = []
        for row in bad.any(1).nonzero().flatten().tolist():
            starts = batches[number].offsets[row].cpu().long()
            indices = torch.searchsorted(starts, places[bad[row]], right=True).unique() - 1
            found += [run.loader.documents[number][row][i] for i in indices.tolist()]
        return [f"data.sources[{source}] document {document}" for source, document in found]

    losses = run.engine.micro_losses
    found = find_non_finite(losses, shards, dp=dp, micro_rows=micro_rows, documents_at=documents_at)
    if found:
        log.warning("step %d: non-finite on rank %d: %s", run.progress.step, run.mesh.rank, found)


@torch.no_grad()
def evaluate(run: Run) -> float:
    """Return the mean loss per target token over the held-out rows, the same rows every time."""
    for part in run.parts:
        part.eval()
    batches = run.held_out(run.cfg)
    loss_sum = run.engine.loss_sum(local_batches(run, batches)) / run.mesh.tp.size
    for part in run.parts:
        part.train()
    targets = all_reduce_sum(count_targets(batches).to(run.mesh.device), run.mesh.dp)
    return (all_reduce_sum(loss_sum, run.mesh.world) / targets).item()


def local_batches(run: Run, batches: Sequence[Batch]) -> list[MicroBatch]:
    """Cut this rank's tokens out of the micro-batches, on its device."""
    moved = [batch.to(run.mesh.device) for batch in batches]
    cp, first = run.mesh.cp, run.progress.step * len(batches)
    is_padded = run.cfg.data.packing is Packing.best_fit
    return [
        MicroBatch(
            zigzag(b.tokens, cp),
            zigzag(b.targets, cp),
            batch.offsets,
            torch.full((len(b.offsets),), number),
            b.lengths if is_padded else None,
        )
        for number, (batch, b) in enumerate(zip(batches, moved, strict=True), start=first)
    ]


def count_targets(batches: Sequence[Batch]) -> torch.Tensor:
    """Count the target tokens of these micro-batches, a scalar."""
    return torch.stack([(batch.targets >= 0).sum() for batch in batches]).sum()
