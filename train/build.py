"""Every object of a run, built once and in order, from the configuration to the first batch."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from data.packing import Batch
from data.prefetch import Prefetcher
from model.config import Balancing
from model.flops import count_parameters
from model.router import Router
from model.transformer import Transformer
from parallel.apply import build_parts, parallelize
from parallel.collectives import Axis
from parallel.gradients import Gradients
from parallel.launch import launcher_grace_s
from parallel.mesh import Mesh
from parallel.optimizer import AdamW, choose_implementation
from parallel.pipeline import Pipeline, SingleStage
from parallel.placement import Shard
from train.checkpoint.contents import Resume, SaveMode, own_boxes
from train.checkpoint.resume import Start, load_checkpoint, load_weights, set_results_aside
from train.checkpoint.saving import Saver
from train.config import ConfigError, Device, Precision, RunConfig, user_errors
from train.curriculum_stages import CurriculumStage, doubts, tokens_at, total_steps
from train.guard.integrity import StateGuard
from train.guard.signals import StopRequest
from train.guard.spikes import Health
from train.guard.stragglers import SectionClock
from train.guard.watchdog import Watchdog
from train.monitor.metrics import MetricsWriter
from train.progress import RunProgress, restore_clocks
from train.training_data import build_data

log = logging.getLogger(__name__)

DTYPES = {Precision.bf16: torch.bfloat16, Precision.fp32: torch.float32}


@dataclass(kw_only=True)
class Run:
    """Everything that the training loop works with."""

    stages: list[CurriculumStage]
    stage: CurriculumStage
    """The curriculum stage that the run is in."""
    mesh: Mesh
    parts: list[Transformer]
    """Pipeline stages of this rank; the whole model without pp."""
    engine: SingleStage | Pipeline
    """Runs forward and backward over the micro-batches."""
    shards: list[Shard]
    """Part of every parameter that this rank updates."""
    gradients: Gradients
    """Where the gradients of all shards meet."""
    optimizer: AdamW
    loader: Prefetcher
    held_out: Callable[[RunConfig], list[Batch]]
    """Reads the held-out rows of this rank; the same rows at every evaluation of a curriculum stage."""
    biases: dict[str, Tensor]
    """Router biases of this rank's layers by their names in a checkpoint; empty if unused."""
    progress: RunProgress
    health: Health
    guard: StateGuard
    clock: SectionClock
    """Measures where this rank's time goes."""
    stop: StopRequest
    watchdog: Watchdog
    metrics: MetricsWriter | None
    """Writes the records; None on all ranks but 0."""
    saver: Saver

    @property
    def cfg(self) -> RunConfig:
        """Return the configuration of the present curriculum stage."""
        return self.stage.cfg

    @property
    def routers(self) -> list[Router]:
        """List the routers of this rank's layers, in the order of `layers`."""
        return [router for part in self.parts for router in part.routers()]

    @property
    def layers(self) -> list[int]:
        """List the numbers of this rank's layers."""
        return [router.layer for router in self.routers]

    @property
    def run_dir(self) -> Path:
        """Return the folder that the run writes to."""
        return Path(self.cfg.run_dir)

    @property
    def total_tokens(self) -> int:
        """Count the input tokens of the whole run."""
        return tokens_at(self.stages, total_steps(self.stages))


def build_run(
    stages: list[CurriculumStage], stage: CurriculumStage, start: Start, mesh: Mesh, stop: StopRequest,
    watchdog: Watchdog, console: Console,
) -> Run:  # fmt: skip
    """Build model, optimizer and data for a curriculum stage, and go on from a checkpoint where there is one.

    Raises:
        ConfigError: data that do not fit the configuration.
        NoCheckpointError: the checkpoint cannot be read after all.
    """
    cfg = stage.cfg
    with user_errors():
        choose_implementation(cfg.optimizer, on_gpu=mesh.device.type == "cuda")  # before anything is large
        loader, held_out = build_data(stages, stage, mesh, stop)
    progress, health = RunProgress(), Health(cfg.health)
    if start.resumed is not None:
        with user_errors():
            progress = restore_clocks(start.resumed, loader, health, cfg)
        if progress.step == stage.first_step:
            health.begin_level()
    if mesh.rank == 0 and cfg.checkpoint.resume is Resume.never:
        set_results_aside(Path(cfg.run_dir))
    parts, shards, gradients = build_model(cfg, mesh)
    optimizer = AdamW(gradients, cfg.optimizer)
    biases = router_biases(parts)
    load_start(start, shards=shards, optimizer=optimizer, biases=biases, world=mesh.world)
    for doubt in doubts(stages) if mesh.rank == 0 else []:
        log.warning("%s", doubt)
    saver = Saver(
        Path(cfg.run_dir, "checkpoints"), cfg.checkpoint, mesh.saving, step=progress.step,
        grace_s=launcher_grace_s(),
    )  # fmt: skip
    if cfg.checkpoint.mode is SaveMode["async"] and cfg.checkpoint.every is not None:
        saver.reserve(own_boxes(shards, optimizer, biases, mesh))
    return Run(
        stages=stages, stage=stage, mesh=mesh, parts=parts, engine=build_engine(parts, cfg, mesh),
        shards=shards, gradients=gradients, optimizer=optimizer, loader=loader, held_out=held_out,
        biases=biases, progress=progress, health=health,
        guard=StateGuard(shards, optimizer, biases, mesh, every=cfg.health.hash_every),
        clock=SectionClock(watches=cfg.health.slow_score is not None), stop=stop, watchdog=watchdog,
        metrics=build_metrics(stages, cfg, progress.step, console) if mesh.rank == 0 else None, saver=saver,
    )  # fmt: skip


def load_start(
    start: Start, *, shards: list[Shard], optimizer: AdamW, biases: dict[str, Tensor], world: Axis
) -> None:
    """Read what the run starts from into this rank's part of it; nothing if it starts from scratch."""
    if start.resumed is not None:
        load_checkpoint(start.resumed, shards=shards, optimizer=optimizer, biases=biases, world=world)
        log.info("resumed from %s", start.resumed.folder)
    elif start.initial is not None:
        load_weights(start.initial, shards=shards, biases=biases, world=world)
        log.info("weights are those of %s", start.initial.folder)


def router_biases(parts: Sequence[Transformer]) -> dict[str, Tensor]:
    """Return the router biases of this rank's layers, where they are used, by their names in a checkpoint."""
    routers = [router for part in parts for router in part.routers()]
    used = [router for router in routers if router.cfg.balancing is Balancing.bias]
    return {f"router.bias.{router.layer}": router.bias for router in used}


def build_metrics(
    stages: list[CurriculumStage], cfg: RunConfig, step: int, console: Console
) -> MetricsWriter:
    """Open what rank 0 writes its records to after `step`."""
    run_dir = Path(cfg.run_dir)
    metrics = MetricsWriter(
        run_dir, log_config=cfg.log, console=console, total_steps=total_steps(stages), step=step
    )
    metrics.start_wandb(cfg.wandb, name=cfg.name, run_dir=run_dir, config=asdict(cfg))
    metrics.start_tensorboard(cfg.tensorboard, run_dir=run_dir, step=step)
    return metrics


def build_model(cfg: RunConfig, mesh: Mesh) -> tuple[list[Transformer], list[Shard], Gradients]:
    """Build this rank's pipeline stages, initialised, its part of every parameter, and the gradients."""
    count = count_parameters(cfg.model)
    log.info("model: %s parameters, %s active a token", f"{count.total:,}", f"{count.active:,}")
    parts = build_parts(cfg.model, cfg.parallel, mesh, row_tokens=cfg.batch.row_tokens, router=cfg.router)
    shards, gradients = parallelize(
        parts, mesh, cfg.parallel, dtype=DTYPES[cfg.train.dtype], seed=cfg.seed,
        recompute=cfg.train.recompute, offload=cfg.optimizer.offload, overlap_groups=cfg.moe.overlap_groups,
    )  # fmt: skip
    return parts, shards, gradients


def build_engine(parts: list[Transformer], cfg: RunConfig, mesh: Mesh) -> SingleStage | Pipeline:
    """Build what runs forward and backward over batches of the configured size."""
    if mesh.pp.size == 1:
        return SingleStage(parts[0], zero_stage=cfg.parallel.zero_stage)
    if cfg.parallel.zero_stage == 2:
        log.info("parallel.zero_stage=2 works as 1 with pp > 1: a pipeline reduces gradients once a step")
    return Pipeline(
        parts, mesh, cfg.parallel.schedule, num_micro=cfg.num_micro_batches(mesh.dp.size),
        micro_rows=cfg.batch.micro_rows, row_tokens=cfg.batch.row_tokens, dtype=DTYPES[cfg.train.dtype],
    )  # fmt: skip


def enter_stage(run: Run, stage: CurriculumStage) -> None:
    """Go on with a curriculum stage of the same layout: its sizes, pipeline schedule and RoPE base."""
    count_data(run)
    run.stage = stage
    run.health.begin_level()
    for part in run.parts:
        part.rope_theta = stage.cfg.model.rope_theta
    run.engine = build_engine(run.parts, stage.cfg, run.mesh)
    log.info("stage %s: %d tokens a row, %d a step", stage.name, *stage.sizes)


def count_data(run: Run) -> dict[str, Any]:
    """Note in the progress what the present curriculum stage took; return the loader's state."""
    data = run.loader.state_dict()
    run.progress.count_sources(run.stage.name, data["source_tokens"], data["skipped_tokens"])
    return data


def device_type(device: Device) -> str:
    """Choose `cpu` or `cuda`.

    Raises:
        ConfigError: CUDA was asked for and is not there.
    """
    if device is Device.cuda and not torch.cuda.is_available():
        raise ConfigError("train.device=cuda, but torch sees no GPU; use train.device=auto or cpu")
    return "cuda" if device is not Device.cpu and torch.cuda.is_available() else "cpu"
