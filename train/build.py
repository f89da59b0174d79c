"""Every object of a run, built once and in order, from the configuration to the first batch."""

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from data.dataset import TokenDataset
from data.loader import Loader
from data.packing import Batch
from model.flops import count_parameters
from model.moe import Router
from model.transformer import Transformer
from parallel.apply import build_parts, parallelize
from parallel.mesh import Mesh
from parallel.pipeline import Pipeline, SingleStage
from parallel.placement import Shard
from train.checkpoint import Resume, find_checkpoint, load_checkpoint, set_results_aside
from train.config import ConfigError, Device, Precision, RunConfig, user_errors
from train.metrics import MetricsWriter
from train.optimizer import build_optimizer
from train.signals import StopRequest

log = logging.getLogger(__name__)

DTYPES = {Precision.bf16: torch.bfloat16, Precision.fp32: torch.float32}


@dataclass
class RunProgress:
    """The clocks of a run; all of them are in the checkpoint."""

    step: int = 0
    """Steps taken, skipped ones included."""
    tokens: int = 0
    """Input tokens consumed since step 0."""
    optimizer_steps: int = 0
    """Updates made."""

    def advance(self, tokens: int, *, skipped: bool) -> None:
        """Count one step of `tokens` input tokens."""
        self.step += 1
        self.tokens += tokens
        self.optimizer_steps += not skipped


@dataclass
class Run:
    """Everything that the training loop works with."""

    cfg: RunConfig
    mesh: Mesh
    parts: list[Transformer]
    """This rank's pipeline stages; the whole model without pp."""
    engine: SingleStage | Pipeline
    """Runs forward and backward over the micro-batches."""
    shards: list[Shard]
    """This rank's part of every parameter."""
    optimizer: torch.optim.Optimizer
    loader: Loader
    held_out: Callable[[], list[Batch]]
    """This rank's held-out rows, the same every time."""
    progress: RunProgress
    stop: StopRequest
    metrics: MetricsWriter | None
    """Rank 0 only."""

    @property
    def routers(self) -> list[Router]:
        """Routers of this rank's layers, in the order of `layers`."""
        return [router for part in self.parts for router in part.routers()]

    @property
    def layers(self) -> list[int]:
        """Numbers of this rank's layers."""
        return [int(layer) for part in self.parts for layer in part.blocks]

    @property
    def run_dir(self) -> Path:
        """Where the run writes."""
        return Path(self.cfg.run_dir)

    @property
    def total_tokens(self) -> int:
        """Input tokens of the whole run."""
        return self.cfg.train.steps * self.cfg.batch.global_tokens


def build_run(cfg: RunConfig, mesh: Mesh, stop: StopRequest, console: Console) -> Run:
    """Build model, optimizer and data, and go on from a checkpoint where there is one.

    Raises:
        ConfigError: data that do not fit the configuration.
        CheckpointError: no usable checkpoint where one is needed.
    """
    run_dir = Path(cfg.run_dir)
    with user_errors():
        loader, held_out = build_data(cfg, mesh)
    found = find_checkpoint(run_dir, cfg.checkpoint.resume)
    if mesh.rank == 0 and cfg.checkpoint.resume is Resume.never:
        set_results_aside(run_dir)
    count = count_parameters(cfg.model)
    log.info("model: %s parameters, %s active a token", f"{count.total:,}", f"{count.active:,}")
    dtype = DTYPES[cfg.train.dtype]
    parts = build_parts(cfg.model, cfg.parallel, mesh, row_tokens=cfg.batch.row_tokens)
    shards = parallelize(
        parts,
        mesh,
        cfg.parallel,
        dtype=dtype,
        seed=cfg.seed,
        recompute=cfg.train.recompute,
        offload=cfg.optimizer.offload,
    )
    engine = build_engine(parts, cfg, mesh, dtype)
    optimizer = build_optimizer(shards, cfg.optimizer)
    progress = RunProgress()
    if found is not None:
        manifest = load_checkpoint(found, shards=shards, optimizer=optimizer)
        with user_errors():
            loader.load_state_dict(manifest["data"])
        progress = RunProgress(**manifest["progress"])
        log.info("resumed from %s", found)
    metrics = None
    if mesh.rank == 0:
        metrics = MetricsWriter(run_dir, console=console, total_steps=cfg.train.steps, step=progress.step)
        metrics.start_wandb(cfg.wandb, name=cfg.name, run_dir=run_dir, config=asdict(cfg))
    return Run(cfg, mesh, parts, engine, shards, optimizer, loader, held_out, progress, stop, metrics)


def build_engine(
    parts: list[Transformer], cfg: RunConfig, mesh: Mesh, dtype: torch.dtype
) -> SingleStage | Pipeline:
    """What runs forward and backward for batches of the configured size."""
    if mesh.pp.size == 1:
        return SingleStage(parts[0], zero_stage=cfg.parallel.zero_stage)
    if cfg.parallel.zero_stage == 2:
        log.info("parallel.zero_stage=2 works as 1 with pp > 1: a pipeline reduces gradients once a step")
    return Pipeline(
        parts,
        mesh,
        cfg.parallel.schedule,
        num_micro=cfg.num_micro_batches(mesh.dp.size),
        micro_rows=cfg.batch.micro_rows,
        row_tokens=cfg.batch.row_tokens,
        dtype=dtype,
    )


def build_data(cfg: RunConfig, mesh: Mesh) -> tuple[Loader, Callable[[], list[Batch]]]:
    """The training loader, and a function that reads the held-out rows."""
    sources = [(TokenDataset(source.path), source.weight) for source in cfg.data.sources]
    common: dict[str, Any] = {
        "row_tokens": cfg.batch.row_tokens,
        "micro_rows": cfg.batch.micro_rows,
        "rank": mesh.dp.rank,
        "size": mesh.dp.size,
        "vocab_size": cfg.model.vocab_size,
        "eval_fraction": cfg.data.eval_fraction,
    }
    rows = cfg.batch.global_tokens // cfg.batch.row_tokens
    loader = Loader(sources, split="train", global_rows=rows, seed=cfg.seed, **common)

    def held_out() -> list[Batch]:
        return Loader(sources, split="eval", global_rows=cfg.eval.rows, seed=0, **common).next_step()

    if cfg.eval.every is not None:
        held_out()  # an empty split is an error now, not at the first evaluation
    return loader, held_out


def device_type(device: Device) -> str:
    """`cpu` or `cuda`.

    Raises:
        ConfigError: CUDA was asked for and is not there.
    """
    if device is Device.cuda and not torch.cuda.is_available():
        raise ConfigError("train.device=cuda, but torch sees no GPU; use train.device=auto or cpu")
    return "cuda" if device is not Device.cpu and torch.cuda.is_available() else "cpu"
