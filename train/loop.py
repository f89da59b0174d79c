"""The training loop: a step, and periodic work as visible lines."""

import logging
from collections.abc import Sequence
from dataclasses import asdict

import torch

from data.packing import Batch
from model.flops import training_flops_per_token
from parallel.pipeline import gather_layers
from train.build import Run
from train.checkpoint import save_checkpoint
from train.config import user_errors
from train.metrics import Throughput, max_violation, peak_flops
from train.signals import Ending
from train.step import StepResult, evaluate, train_step

log = logging.getLogger(__name__)


def train(run: Run) -> Ending:
    """Train to the last step or to a stop request; either way the last thing done is a checkpoint."""
    cfg, progress = run.cfg, run.progress
    if progress.step >= cfg.train.steps:
        log.info("finished: %s is at step %d of train.steps=%d", run.run_dir, progress.step, cfg.train.steps)
        return Ending.DONE
    recorder = Recorder(run)
    while True:
        with user_errors():
            batches = run.loader.next_step()
        result = train_step(run, batches)
        recorder.observe(batches, result)
        step, last = progress.step, progress.step >= cfg.train.steps
        eval_loss = None
        if cfg.eval.every is not None and (last or step % cfg.eval.every == 0):
            with recorder.throughput.paused():
                eval_loss = evaluate(run)
        if step == 1 or last or step % cfg.log.every == 0 or eval_loss is not None:
            recorder.record(result, eval_loss)
        if last or result.stop or (cfg.checkpoint.every is not None and step % cfg.checkpoint.every == 0):
            with recorder.throughput.paused():
                save(run)
        if last:
            return Ending.DONE
        if result.stop:
            log.warning("asked to stop: saved step %d", step)
            return Ending.REQUEUE


def save(run: Run) -> None:
    """Save weights, moments, clocks and data position of this step."""
    facts = {
        "progress": asdict(run.progress),
        "data": run.loader.state_dict(),
        "config": asdict(run.cfg),
        "torch": torch.__version__,
    }
    path = save_checkpoint(
        run.run_dir,
        run.progress.step,
        shards=run.shards,
        optimizer=run.optimizer,
        mesh=run.mesh,
        facts=facts,
        keep=run.cfg.checkpoint.keep,
    )
    log.info("saved %s", path)


class Recorder:
    """Makes a record of the steps since the last one; every rank has the pooled counts, rank 0 writes."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.throughput = Throughput(run.progress.tokens)
        self.squares = self.lengths = self.skipped = 0

    def observe(self, batches: Sequence[Batch], result: StepResult) -> None:
        """Note what a step did, and its document lengths: attention's work depends on them."""
        self.skipped += result.skipped
        for batch in batches:
            lengths = batch.offsets.diff(dim=1).double()
            self.squares += int(lengths.square().sum())
            self.lengths += int(lengths.sum())
        if self.run.metrics is not None:
            self.run.metrics.advance(self.run.progress.step)

    def record(self, result: StepResult, eval_loss: float | None) -> None:
        """Write one record and start the next interval."""
        run, cfg, progress = self.run, self.run.cfg, self.run.progress
        load = self._all_layers([router.load for router in run.routers])
        aux_loss = self._all_layers([router.aux_loss for router in run.routers]).mean().item()
        speed = self.throughput.read(progress.tokens)
        flops = training_flops_per_token(cfg.model, self.squares / self.lengths)
        peak, cuda = peak_flops(run.mesh.device), run.mesh.device.type == "cuda"
        record = {
            "step": progress.step,
            "tokens": progress.tokens,
            "loss": result.loss,
            "aux_loss": aux_loss / cfg.num_micro_batches(run.mesh.dp.size),
            "grad_norm": result.grad_norm,
            "lr": result.lr,
            "row_tokens": cfg.batch.row_tokens,
            "global_tokens": cfg.batch.global_tokens,
            "tokens_per_second": speed,
            "mfu": speed * flops / (peak * run.mesh.world_size) if peak else None,
            "max_memory_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else None,
            "drop_rate": 0.0,  # the router is dropless
            "max_violation": max_violation(load),
            "skipped": self.skipped,
        }
        if eval_loss is not None:
            record["eval_loss"] = eval_loss
        if run.metrics is not None:
            experts = {
                "step": progress.step,
                "load": load.tolist(),
                "dropped": torch.zeros_like(load).tolist(),
                "moved": [0] * cfg.model.num_layers,
            }
            run.metrics.write(record, experts)
        for router in run.routers:
            router.load.zero_()
        self.squares = self.lengths = self.skipped = 0

    def _all_layers(self, values: list[torch.Tensor]) -> torch.Tensor:
        """[num_layers, ...] of all pipeline stages."""
        run = self.run
        return gather_layers(torch.stack(values), run.layers, run.cfg.model.num_layers, run.mesh.pp)
