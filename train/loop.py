"""The training loop: a step, and periodic work as visible lines."""

import logging
import math
from collections.abc import Sequence
from dataclasses import asdict

import torch

from data.mixture import ExhaustedError
from data.packing import Batch
from model.flops import training_flops_per_token
from train.build import Run, count_data, enter_stage
from train.checkpoint.contents import SaveMode, git_commit, own_boxes
from train.config import ConfigError, user_errors
from train.curriculum_stages import stage_of, total_steps
from train.guard.integrity import DamagedStateError
from train.guard.signals import Ending, StoppedEarly
from train.guard.stragglers import Section, find_slow, gather_times
from train.monitor.alerts import Alert
from train.monitor.expert_counts import read_counts
from train.monitor.metrics import Throughput, peak_flops
from train.monitor.tracing import Tracer
from train.step import StepResult, evaluate, train_step

log = logging.getLogger(__name__)


def train(run: Run) -> tuple[Ending, str]:
    """Train to the last step, a stop request or a stage on another layout; the last thing done is a save.

    A run that skips too many steps in a row ends as FAILED, one whose memory changed by itself as REQUEUE,
    both unsaved; so does one that was asked to stop before its first step.

    Returns:
        How the run ended, and why.
    """
    try:
        return _to_the_end(run)
    except DamagedStateError as error:
        log.error("step %d: %s", run.progress.step, error)
        return Ending.REQUEUE, str(error)
    except StoppedEarly as early:
        return Ending.REQUEUE, str(early)
    except Exception:
        run.saver.settle(run.cfg.health.checkpoint_timeout_s)
        raise


def _to_the_end(run: Run) -> tuple[Ending, str]:
    progress, end = run.progress, total_steps(run.stages)
    if progress.step >= end:
        log.info("finished: %s is at step %d of %d", run.run_dir, progress.step, end)
        return Ending.DONE, "the last step was reached before"
    run.stop.leave_early(run.mesh.world, "before the first step of this start")
    recorder = Recorder(run)
    tracer = Tracer(run.cfg.profile, run.run_dir, rank=run.mesh.rank, total_steps=end)
    while True:
        limits = run.cfg.health
        number = progress.step + 1
        with run.watchdog.section(f"step {number}", limits.step_timeout_s), tracer.step(number):
            batches = next_batches(run)
            result = train_step(run, batches)
        report(run, run.saver.read_failures())
        recorder.observe(batches, result)
        cfg, step, last = run.cfg, progress.step, progress.step >= end
        following = stage_of(run.stages, step)
        moves = not last and following.cfg.parallel != cfg.parallel
        ends = last or result.stop or moves
        saves = ends or (cfg.checkpoint.every is not None and step % cfg.checkpoint.every == 0)
        run.guard.remember(progress.optimizer_steps, step, saves=saves)
        eval_loss = None
        if cfg.eval.every is not None and (last or step % cfg.eval.every == 0):
            with recorder.throughput.paused(), run.watchdog.section("evaluation", limits.eval_timeout_s):
                eval_loss = evaluate(run)
        if step == 1 or last or step % cfg.log.every == 0 or eval_loss is not None:
            recorder.record(result, eval_loss)
        if reason := result.verdict.gave_up:
            log.error("%s", reason)
            return Ending.FAILED, reason
        if saves:
            with (
                recorder.throughput.paused(),
                run.watchdog.section("checkpoint", limits.checkpoint_timeout_s),
            ):
                failures = save(run, SaveMode.sync if ends else cfg.checkpoint.mode)
            if failures and ends:
                return Ending.FAILED, failures[-1]
        if last:
            return Ending.DONE, "train.steps reached"
        if result.stop:
            log.warning("asked to stop: saved step %d", step)
            return Ending.REQUEUE, run.stop.signal_name or "asked to stop by another rank"
        if moves:
            log.info("stage %s runs on another layout: start the same command again", following.name)
            return Ending.REQUEUE, f"curriculum stage {following.name} runs on another layout"
        if following is not run.stage:
            enter_stage(run, following)


def next_batches(run: Run) -> list[Batch]:
    """Read this rank's micro-batches of the next step.

    Raises:
        ConfigError: data that cannot be used, or their end: then the last step is saved first.
    """
    try:
        with user_errors(), run.clock.section(Section.data):
            return run.loader.next_step()
    except ConfigError as error:
        if not isinstance(error.__cause__, ExhaustedError) or not run.progress.step:
            raise
        failures = save(run, SaveMode.sync)
        outcome = failures[-1] if failures else f"step {run.progress.step} is saved"
        raise ConfigError(f"{error}; {outcome}") from error


def save(run: Run, mode: SaveMode) -> list[str]:
    """Save weights, moments, clocks and data position of this step; return what failed, reported already.

    Raises:
        DamagedStateError: on every rank, if weights or moments changed since the update.
    """
    run.guard.check(run.progress.optimizer_steps)
    data = count_data(run)
    facts = {
        "step": run.progress.step,
        "git_commit": git_commit(),
        "progress": asdict(run.progress),
        "data": data,
        "health": run.health.state_dict(),
        "config": asdict(run.cfg),
        "pool_rows": run.cfg.pool_rows(run.mesh.world_size),
        "torch": torch.__version__,
    }
    boxes = own_boxes(run.shards, run.optimizer, run.biases, run.mesh)
    run.saver.save(run.progress.step, boxes, facts, mode)
    failures = run.saver.read_failures()
    report(run, failures)
    return failures if mode is SaveMode.sync and run.saver.saved_step != run.progress.step else []


def report(run: Run, failures: Sequence[str]) -> None:
    """Log which saves failed, on rank 0; all ranks know the same."""
    if run.metrics is not None:
        for failure in failures:
            log.error("%s", failure)
            run.metrics.alert(Alert("Checkpoint failed", failure))


class Recorder:
    """Makes a record of the steps since the last one; every rank has the pooled counts, rank 0 writes."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.throughput = Throughput(run.progress.tokens)
        self.squares = self.lengths = self.skipped = self.steps = 0
        self.spike_score: float | None = None

    def observe(self, batches: Sequence[Batch], result: StepResult) -> None:
        """Note what a step did, and its document lengths: attention's work depends on them."""
        self.steps += 1
        verdict = result.verdict
        self.skipped += verdict.skipped
        scores = [score for score in (self.spike_score, verdict.score) if score is not None]
        self.spike_score = max(scores, default=None)
        if verdict.spike and self.run.metrics is not None:
            clipped = verdict.norm_limit < math.inf
            kept = f"clipped to norm {verdict.norm_limit:.4g}" if clipped else "not skipped"
            done = "skipped" if verdict.skipped else kept
            log.warning("step %d: spike, %s: %s", self.run.progress.step, done, verdict.spike)
        for batch in batches:
            lengths = batch.offsets.diff(dim=1).double()
            self.squares += int(lengths.square().sum())
            self.lengths += int(lengths.sum())
        if self.run.metrics is not None:
            self.run.metrics.advance(self.run.progress.step)

    def record(self, result: StepResult, eval_loss: float | None) -> None:
        """Write one record and start the next interval."""
        run, cfg, progress = self.run, self.run.cfg, self.run.progress
        num_micro = cfg.num_micro_batches(run.mesh.dp.size)
        experts = read_counts(run.routers, run.layers, cfg.model.num_layers, num_micro, run.mesh.world)
        counts = run.loader.read_counts()
        speed = self.throughput.read(progress.tokens)
        flops = training_flops_per_token(cfg.model, self.squares / self.lengths)
        peak, cuda = peak_flops(run.mesh.device), run.mesh.device.type == "cuda"
        record = {
            "step": progress.step,
            "tokens": progress.tokens,
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "lr": result.lr,
            "stage": run.stage.number,
            "row_tokens": cfg.batch.row_tokens,
            "global_tokens": cfg.batch.global_tokens,
            "tokens_per_second": speed,
            "mfu": speed * flops / (peak * run.mesh.world_size) if peak else None,
            "max_memory_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else None,
            "skipped": self.skipped,
            "spike_score": self.spike_score,
            "padding": counts.padding_fraction,
            "truncated_tokens": counts.truncated_tokens,
            "checkpoint_seconds": run.saver.read_stall_s(),
            "checkpoint_age_steps": progress.step - run.saver.saved_step,
            "data_wait_ms": 1000 * run.loader.read_wait_seconds() / self.steps,
            "slow_score": self.report_slow(),
            **experts.summary(),
        }
        if eval_loss is not None:
            record["eval_loss"] = eval_loss
        if run.metrics is not None:
            run.metrics.write(record, {"step": progress.step, **experts.record()})
        self.squares = self.lengths = self.skipped = self.steps = 0
        self.spike_score = None

    def report_slow(self) -> float | None:
        """Log which ranks keep the others waiting; return the lowest score (1 = none, None = not watched)."""
        limit, mesh = self.run.cfg.health.slow_score, self.run.mesh
        if limit is None:
            return None
        slow = find_slow(gather_times(self.run.clock.read(), mesh), stages=mesh.pp.size, limit=limit)
        for one in slow if self.run.metrics is not None else []:
            log.warning("step %d: rank %d is slow in %s: score %.2f", self.run.progress.step, *one)
        return min((one.score for one in slow), default=1.0)
