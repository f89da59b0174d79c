"""One optimizer step; the loss is the mean over the target tokens of the global batch, on any layout."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from data.packing import Batch
from parallel.collectives import all_reduce_sum
from parallel.grad import scale_gradients, square_sum
from parallel.placement import collect_gradients, drop_gradients, publish
from parallel.zero import sync_gradients
from train.build import Run
from train.optimizer import set_lr
from train.schedule import lr_factor


@dataclass(frozen=True)
class StepResult:
    """What every rank knows after a step."""

    loss: float
    """Cross-entropy a target token of the global batch, without aux."""
    grad_norm: float
    """Of the whole model, before clipping."""
    lr: float
    """Learning rate of this step."""
    skipped: bool
    """A non-finite loss or norm: nothing was updated."""
    stop: bool
    """Some rank was asked to stop."""


def train_step(run: Run, batches: Sequence[Batch]) -> StepResult:
    """Forward and backward over this rank's micro-batches, then one update, decided alike on every rank."""
    cfg, progress = run.cfg, run.progress
    targets = all_reduce_sum(count_targets(batches).to(run.mesh.device), run.mesh)
    for router in run.model.routers():
        router.aux_loss.zero_()
    loss = forward_backward(run, batches, targets)
    collect_gradients(run.shards)
    squares = square_sum(run.shards)
    sums = all_reduce_sum(torch.stack([loss, squares, squares.new_tensor(run.stop.is_set)]), run.mesh)
    loss_sum, square, stops = sums.tolist()  # the one host read of a step
    grad_norm = math.sqrt(square)
    skipped = not math.isfinite(loss_sum + grad_norm)
    progress.advance(cfg.batch.global_tokens, skipped=skipped)
    lr = cfg.optimizer.lr * lr_factor(progress.tokens, run.total_tokens, cfg.schedule)
    if not skipped:
        if grad_norm > cfg.optimizer.max_grad_norm:
            scale_gradients(run.shards, cfg.optimizer.max_grad_norm / grad_norm)
        set_lr(run.optimizer, lr)
        run.optimizer.step()
        publish(run.shards)
    drop_gradients(run.shards)
    return StepResult(loss_sum, grad_norm, lr, skipped, stops > 0)


def forward_backward(run: Run, batches: Sequence[Batch], targets: torch.Tensor) -> torch.Tensor:
    """Accumulate the gradients of this rank's share of the loss; returns the share, an fp64 scalar.

    Args:
        targets: number of target tokens of the global batch, on the device.
    """
    aux_weight = run.cfg.router.aux_loss_coefficient / (len(batches) * run.cfg.model.num_layers)
    total = torch.zeros((), dtype=torch.float64, device=run.mesh.device)
    for number, batch in enumerate(batches, start=1):
        sync_gradients(run.model, run.cfg.parallel.zero_stage > 1 or number == len(batches))
        batch = batch.to(run.mesh.device)
        losses = run.model(batch.tokens, batch.offsets, targets=batch.targets, aux_weight=aux_weight)
        loss = losses.sum() / targets
        loss.backward()
        total += loss.detach()
    return total


@torch.no_grad()
def evaluate(run: Run) -> float:
    """Mean loss a target token over the held-out rows, the same rows every time."""
    run.model.eval()
    batches = run.held_out()
    sums = torch.zeros(2, dtype=torch.float64, device=run.mesh.device)
    for batch in batches:
        batch = batch.to(run.mesh.device)
        sums[0] += run.model(batch.tokens, batch.offsets, targets=batch.targets).sum()
        sums[1] += (batch.targets >= 0).sum()
    run.model.train()
    loss, targets = all_reduce_sum(sums, run.mesh).tolist()
    return loss / targets


def count_targets(batches: Sequence[Batch]) -> torch.Tensor:
    """Target tokens of these micro-batches, a scalar."""
    return torch.stack([(batch.targets >= 0).sum() for batch in batches]).sum()
